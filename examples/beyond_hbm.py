"""Train a model whose optimizer states do not fit in HBM, in four ways, and compare.

HBM is made small by plain ballast that holds the rest of it. The ways:

native      all of HBM, for comparison: the losses to be equal to, the time to come near to
place       Adam's moments in pinned host memory by egm_alloc.place(), all else in HBM
spill       nothing said: what HBM cannot hold goes to host memory by itself
cpu adam    what one would do today: moments and the update on the CPU

    python examples/beyond_hbm.py

Each way runs in a process of its own, from the same seed, with deterministic algorithms.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

GIB, MIB = 1 << 30, 1 << 20
WAYS = ("native", "place", "spill", "cpu adam")
WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """The size of the job; layers of ``width`` with 12 ``width`` squared parameters each."""

    width: int = 2048
    layers: int = 6
    batch: int = 8
    tokens: int = 512
    steps: int = 12


@dataclass
class Outcome:
    """What one way came to.

    Parameters
    ----------
    losses : list of float
        Of each step.
    seconds : float
        The median step after warm-up.
    moment_bytes : int
        Adam's moments.
    host_bytes : int
        Extended memory in host memory at the end.
    peak_bytes : int
        The most that torch held, both tiers.
    backings : list of str
        Where the moments are.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    moment_bytes: int = 0
    host_bytes: int = 0
    peak_bytes: int = 0
    backings: list[str] = field(default_factory=list)


def model_of(job: Job) -> nn.Module:
    """Return a transformer encoder without dropout."""
    layer = nn.TransformerEncoderLayer(
        job.width, nhead=16, dim_feedforward=4 * job.width, dropout=0.0, batch_first=True
    )
    return nn.TransformerEncoder(layer, job.layers, enable_nested_tensor=False)


class Trainer:
    """One way to train: where the moments are, and who updates."""

    def __init__(self, way: str, job: Job) -> None:
        self.way = way
        self.model = model_of(job).cuda()
        self.data = torch.randn(job.batch, job.tokens, job.width, device="cuda")
        self.masters = list(self.model.parameters())
        if way == "cpu adam":
            on_cpu = (p.detach().cpu().pin_memory() for p in self.masters)
            self.masters = [nn.Parameter(p) for p in on_cpu]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def step(self) -> float:
        """Train one step and return its loss."""
        self.model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(self.data).float().square().mean()
        loss.backward()
        self._update()
        return float(loss.detach())

    def _update(self) -> None:
        import egm_alloc

        if self.way == "cpu adam":
            self._update_on_cpu()
        elif self.way == "place" and not self.optimizer.state:
            with egm_alloc.place("pinned", tag="optimizer"):  # the first step makes the moments
                self.optimizer.step()
        else:
            self.optimizer.step()

    def _update_on_cpu(self) -> None:
        pairs = list(zip(self.masters, self.model.parameters(), strict=True))
        for master, p in pairs:
            if master.grad is None:
                master.grad = torch.empty_like(master).pin_memory()
            assert p.grad is not None
            master.grad.copy_(p.grad, non_blocking=True)
        torch.cuda.synchronize()
        self.optimizer.step()
        with torch.no_grad():
            for master, p in pairs:
                p.copy_(master, non_blocking=True)

    def moments(self) -> list[torch.Tensor]:
        """Return Adam's moments."""
        states = self.optimizer.state.values()
        return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


def train(way: str, job: Job, hbm_bytes: int | None) -> Outcome:
    """Train in one way; `hbm_bytes` is what the ballast leaves of HBM, None for no ballast."""
    import egm_alloc

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    outcome = Outcome()
    free, _ = torch.cuda.mem_get_info()
    ballast_bytes = 0 if hbm_bytes is None else max(0, free - hbm_bytes)
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")
    if way in {"place", "spill"}:
        egm_alloc.enable(threshold_gib=1024, spill=way == "spill")
    trainer = Trainer(way, job)
    times = []
    for _ in range(job.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        outcome.losses.append(trainer.step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    outcome.seconds = statistics.median(times[WARM_UP:])
    moments = trainer.moments()
    outcome.moment_bytes = sum(moment.nbytes for moment in moments)
    outcome.peak_bytes = torch.cuda.max_memory_reserved() - ballast.nbytes
    found = egm_alloc.stats().extended
    outcome.host_bytes = sum(found[kind].allocated_bytes for kind in ("pinned", "numa"))
    for moment in moments:
        backing = egm_alloc.info(moment).backing or "hbm" if moment.is_cuda else "cpu"
        if backing not in outcome.backings:
            outcome.backings.append(backing)
    return outcome


def link_gbs() -> float:
    """Return the bandwidth of a kernel that reads pinned host memory, in GB/s."""
    import egm_alloc

    egm_alloc.enable(threshold_gib=1024)
    with egm_alloc.place("pinned"):
        tensor = torch.ones(256 * MIB // 4, dtype=torch.int32, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        tensor.max()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tensor.nbytes / best / 1e9


def in_process(*arguments: str) -> Any:
    """Run this file with arguments in a fresh process and return the JSON of its last line."""
    print(f"beyond_hbm: {' '.join(arguments[:2])}", file=sys.stderr, flush=True)  # takes a while
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "EGM_ALLOC_AUTO_ENABLE": "0"}
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise SystemExit(
            f"beyond_hbm: {' '.join(arguments)} failed\n{result.stdout}{result.stderr}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def compare(job: Job) -> int:
    """Run every way and print the table; return 0 if the losses are equal."""
    simulated = "Simulated" in torch.cuda.get_device_name()
    if simulated:
        print("Simulated device: kernels do nothing, so losses and times mean nothing.\n")
    size = ["--job", json.dumps(asdict(job))]
    native = Outcome(**in_process("--way", "native", *size))
    # What is needed without the moments, and a little to breathe.
    hbm_bytes = native.peak_bytes - native.moment_bytes + max(native.moment_bytes // 8, 48 * MIB)
    small = ["--hbm-bytes", str(hbm_bytes)]
    outcomes = {"native": native}
    for way in WAYS[1:]:
        outcomes[way] = Outcome(**in_process("--way", way, *size, *small))
    link = in_process("--link")
    moved = {way: 2 * each.host_bytes for way, each in outcomes.items()}  # read and written
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; Adam's moments "
        f"{native.moment_bytes / GIB:.2f} GiB; native peak {native.peak_bytes / GIB:.2f} GiB, the "
        f"others have {hbm_bytes / GIB:.2f} GiB of HBM; link {link:.1f} GB/s\n"
    )
    print("way        step ms  over native  link explains  on the host  moments     losses")
    print("---------  -------  -----------  -------------  -----------  ----------  ------")
    equal = True
    for way, each in outcomes.items():
        worst = max(abs(a - b) for a, b in zip(each.losses, native.losses, strict=True))
        same = each.losses == native.losses
        equal = equal and (same or way == "cpu adam")
        over = (each.seconds - native.seconds) * 1e3
        explained = moved[way] / link / 1e6
        print(
            f"{way:9s}  {each.seconds * 1e3:7.1f}  {over:8.1f} ms  {explained:10.1f} ms  "
            f"{each.host_bytes / GIB:7.2f} GiB  {' '.join(sorted(each.backings)):10s}  "
            + ("equal" if same else f"differ by {worst:.2g}")
        )
    print("\n'link explains': bytes of moments on the host, read and written once, over the link.")
    return 0 if equal else 1


def main() -> int:
    """Compare, or run one part in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a job of some 100 MiB")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--hbm-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("beyond_hbm: no GPU here")
    if arguments.link:
        print(json.dumps(link_gbs()))
        return 0
    if arguments.way:
        outcome = train(arguments.way, Job(**json.loads(arguments.job)), arguments.hbm_bytes)
        gc.collect()
        print(json.dumps(asdict(outcome)))
        return 0
    return compare(
        Job(width=512, layers=4, batch=2, tokens=64, steps=4) if arguments.small else Job()
    )


if __name__ == "__main__":
    sys.exit(main())
