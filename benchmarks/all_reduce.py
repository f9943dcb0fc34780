"""The bandwidth of NCCL's all-reduce for tensors in each kind of memory, beside HBM.

    torchrun --nproc-per-node 2 -m benchmarks.all_reduce

Managed memory stays under half of what each card has free.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import distributed

import egm_alloc
from benchmarks.rows import GIB
from egm_alloc.cli.measure import KINDS


def seconds(tensor: torch.Tensor) -> float:
    """Return the time of one all-reduce, the slowest rank's."""
    distributed.barrier()
    torch.cuda.synchronize()
    start = time.perf_counter()
    distributed.all_reduce(tensor)
    torch.cuda.synchronize()
    took = torch.tensor(time.perf_counter() - start, device="cuda")
    distributed.all_reduce(took, distributed.ReduceOp.MAX)
    return float(took)


def main() -> None:
    """Print a line for each kind of memory; they take turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all_reduce")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    distributed.init_process_group("nccl")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.cuda.set_device(rank)
    egm_alloc.enable(threshold_gib=1024)
    nbytes = int(options.gib * GIB)
    if 3 * nbytes > torch.cuda.mem_get_info()[0] // 2:
        raise SystemExit(f"all_reduce: 3 x {options.gib} GiB is more than half of the free HBM")
    tensors = {}
    for kind in KINDS:
        with egm_alloc.place(kind):
            tensors[kind] = torch.zeros(nbytes // 4, device="cuda")
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.turns + 1):
        for kind, tensor in tensors.items():
            took = seconds(tensor)
            if turn > 0:  # the first connects
                times[kind].append(took)
    if rank == 0:
        native = statistics.median(times["device"])
        print(f"{ranks} x {torch.cuda.get_device_name()}, all-reduce of {options.gib:g} GiB")
        for kind, each in times.items():
            median = statistics.median(each)
            bus = nbytes * 2 * (ranks - 1) / ranks / median / 1e9
            print(f"{kind:8s} {bus:7.1f} GB/s bus bandwidth, {median / native:6.2f} x HBM's time")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
