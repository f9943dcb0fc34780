"""Train with DDP or FSDP, one process per GPU, natively and with extended tensors.

The embedding table, its gradient and Adam's moments are above the threshold: with egm_alloc they
are in managed memory, and NCCL reduces gradients there. Both trainings begin from the same seed
with deterministic algorithms, and each rank compares its losses bit for bit.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --fsdp
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

GIB = 1 << 30
WARM_UP = 3
VOCABULARY, WIDTH, BATCH, TOKENS = 1 << 18, 1024, 16, 256  # a table of 1 GiB
THRESHOLD_GIB = 0.25


@dataclass
class Outcome:
    """What one training came to on this rank.

    Parameters
    ----------
    losses : list of float
        Of each step.
    seconds : float
        The median step after warm-up.
    extended_bytes : int
        The most that the extended tier held.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    extended_bytes: int = 0


class Model(nn.Module):
    """A large table, and a little work on what is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of tokens (batch, tokens)."""
        found: torch.Tensor = self.layers(self.table(tokens))
        return found.square().mean()


def model_on(device: int, fsdp: bool) -> nn.Module:
    """Return the model, replicated on every GPU or divided among them."""
    with torch.device("cuda"):
        model = Model()
        if fsdp:
            fully_shard(model.table)  # on its own, so that it is whole only while it is used
            fully_shard(model)
            return model
        return DistributedDataParallel(
            model, device_ids=[device], gradient_as_bucket_view=True, static_graph=True
        )


def train(steps: int, rank: int, fsdp: bool) -> Outcome:
    """Train from the seed on, with the allocator as it is."""
    import egm_alloc

    torch.manual_seed(0)
    device = torch.cuda.current_device()
    egm_alloc.reset_peak_stats(device)
    model = model_on(device, fsdp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1 + rank)  # each rank has tokens of its own
    outcome = Outcome()
    times = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator).cuda()
        distributed.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        outcome.losses.append(float(loss.detach()))
    outcome.seconds = statistics.median(times[WARM_UP:])
    extended = egm_alloc.stats(device).extended.values()
    outcome.extended_bytes = sum(backing.reserved_peak_bytes for backing in extended)
    return outcome


def free_everything() -> None:
    """Give back what a training has left."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    """Train both ways and compare; the status is 1 if the losses of any rank differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--fsdp", action="store_true", help="divide the model: fully_shard")
    options = parser.parse_args()
    steps = options.steps
    if steps <= WARM_UP:
        parser.error(f"--steps is {steps}; allowed: more than {WARM_UP}, which are not timed")
    count = torch.cuda.device_count()
    if count < 2 or "Simulated" in torch.cuda.get_device_name():
        raise SystemExit("ddp: this needs two real GPUs, for NCCL to reduce gradients between them")
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("ddp: start it with torchrun --nproc-per-node 2 examples/ddp.py")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl", device_id=torch.device(torch.cuda.current_device()))
    rank = distributed.get_rank()
    try:
        import egm_alloc

        egm_alloc.disable()
        native = train(steps, rank, options.fsdp)
        free_everything()
        egm_alloc.enable(threshold_gib=THRESHOLD_GIB)
        extended = train(steps, rank, options.fsdp)
        differ = torch.tensor([native.losses != extended.losses], dtype=torch.int32).cuda()
        distributed.all_reduce(differ)  # in how many ranks
        different = int(differ.item())
        if rank == 0:
            print(
                f"{distributed.get_world_size()} x {torch.cuda.get_device_name()}: native "
                f"{native.seconds * 1e3:.1f} ms a step, extended {extended.seconds * 1e3:.1f} ms "
                f"({extended.seconds / native.seconds:.3f} of native) with "
                f"{extended.extended_bytes / GIB:.2f} GiB in the extended tier\n"
                + (f"losses differ in {different} ranks" if different else "losses are equal")
            )
            if extended.extended_bytes == 0:
                print("ddp: nothing was extended, so nothing is compared")
        return int(different > 0 or extended.extended_bytes == 0)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
