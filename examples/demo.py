"""Train a small transformer with and without egm_alloc, and show that only the memory differs.

The embedding table, its gradient and the key-value cache are above the threshold, so with egm_alloc
they are in managed memory. Each way runs in a process of its own, from the same seed, with
deterministic algorithms: the losses must agree bit for bit.

    python examples/demo.py
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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

GIB = 1 << 30
WARM_UP = 3
WIDTH, HEADS, LAYERS, CLASSES = 1024, 8, 4, 4096
BATCH, TOKENS = 8, 128


@dataclass(frozen=True)
class Sizes:
    """The sizes of the large tensors, in float32 elements and GiB."""

    vocabulary: int
    context: int
    threshold_gib: float

    @classmethod
    def that_fit(cls, free_bytes: int) -> Sizes:
        """Return the largest sizes whose extended memory is at most half of the free memory.

        A GPU that is asked for more managed memory than it has free can slow down everybody on it.
        """
        for scale in (1, 2, 4, 8, 16):
            sizes = cls(393216 // scale, 4096 // scale, 0.5 / scale)
            if sizes.extended_bytes() <= free_bytes // 2:
                return sizes
        raise SystemExit(f"demo: {free_bytes / GIB:.2f} GiB free on the GPU is too little")

    def extended_bytes(self) -> int:
        """Return the bytes of the table, its gradient and the cache."""
        table = self.vocabulary * WIDTH * 4
        cache = LAYERS * 2 * BATCH * self.context * WIDTH * 4
        return 2 * table + cache


class Block(nn.Module):
    """One transformer layer whose attention also sees a cache of earlier keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output (batch, tokens, width) and this pass's keys and values.

        `cache` has the shape (2, batch, heads, context, head width).
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        old = query @ cache[0].transpose(-1, -2)
        new = query @ key.transpose(-1, -2)
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        new = new.masked_fill(future, float("-inf"))
        weights = torch.cat([old, new], -1).mul((WIDTH // HEADS) ** -0.5).softmax(-1)
        context = cache.shape[3]
        attended = weights[..., :context] @ cache[1] + weights[..., context:] @ value
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp(self.norm2(x)), torch.stack([key, value]).detach()


class Model(nn.Module):
    """A transformer with a large embedding table and a large key-value cache."""

    cache: torch.Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)
        shape = (LAYERS, 2, BATCH, HEADS, sizes.context, WIDTH // HEADS)
        self.register_buffer("cache", torch.zeros(shape))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return logits (batch, tokens, classes) and each layer's keys and values."""
        x = self.table(ids)
        made = []
        for layer, block in enumerate(self.blocks):
            x, key_value = block(x, self.cache[layer])
            made.append(key_value)
        return self.head(x), made

    def remember(self, made: list[torch.Tensor], step: int) -> None:
        """Write one pass's keys and values into the cache, over the oldest."""
        context = self.cache.shape[4]
        start = step * TOKENS % context
        for layer, key_value in enumerate(made):
            self.cache[layer, :, :, :, start : start + TOKENS] = key_value


def train(model: Model, steps: int, ids: torch.Tensor) -> tuple[list[str], list[float]]:
    """Return the losses as exact hexadecimal texts and the seconds of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        logits, made = model(ids)
        loss = functional.cross_entropy(logits.flatten(0, 1), ids.flatten() % CLASSES)
        loss.backward()
        optimizer.step()
        model.remember(made, step)
        losses.append(float(loss.item()).hex())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def allocate_only(model: Model, steps: int) -> None:
    """Make and drop the large tensors of training steps; launches no arithmetic that matters."""
    for _ in range(steps):
        model.table.weight.grad = None
        scores = torch.empty(BATCH, HEADS, TOKENS, model.cache.shape[4] + TOKENS, device="cuda")
        model.table.weight.grad = torch.empty_like(model.table.weight)
        del scores


def is_simulated() -> bool:
    """Return whether the device is the simulated one of ``tests.simulator``."""
    return "EGM_SIM_MACHINE" in os.environ


def where(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Return a row that says where a tensor lives, asked from egm_alloc and from the driver."""
    import egm_alloc

    info, pages = egm_alloc.info(tensor), egm_alloc.residency(tensor)
    return {
        "name": name,
        "gib": tensor.nbytes / GIB,
        "tier": info.tier,
        "backing": info.backing or "-",
        "memory_type": pages.memory_type,
        "host_gib": pages.host_bytes / GIB,
        # Every page of these tensors was written, so what the CPU has no page for is in HBM.
        "hbm_gib": (pages.device_node_bytes + pages.unmapped_bytes) / GIB,
    }


def run_worker(which: str, steps: int, simulated: bool) -> None:
    """Run the program one way, ``"native"`` or ``"egm_alloc"``, and print the results as JSON."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(1234)
    sizes = Sizes.that_fit(torch.cuda.mem_get_info()[0])
    if which == "egm_alloc":
        import egm_alloc

        egm_alloc.enable(threshold_gib=sizes.threshold_gib)
    with torch.device("cuda"):
        model = Model(sizes)
    report: dict[str, Any] = {"threshold_gib": sizes.threshold_gib}
    if simulated:
        allocate_only(model, steps)
    else:
        generator = torch.Generator().manual_seed(5678)
        ids = torch.randint(sizes.vocabulary, (BATCH, TOKENS), generator=generator).cuda()
        report["losses"], report["seconds"] = train(model, steps, ids)
    report["peak_gib"] = torch.cuda.memory_stats()["allocated_bytes.all.peak"] / GIB
    report["snapshot_segments"] = len(torch.cuda.memory_snapshot())
    if which == "egm_alloc":
        gradient = model.table.weight.grad
        assert gradient is not None
        report["where"] = [
            where("embedding table", model.table.weight),
            where("its gradient", gradient),
            where("key-value cache", model.cache),
            where("a linear weight", model.head.weight),
        ]
        report["summary"] = egm_alloc.memory_summary()
        del gradient, model
        gc.collect()
        torch.cuda.empty_cache()
        report["left_bytes"] = egm_alloc.stats().extended_tier.reserved_bytes
    print(json.dumps(report))


def run_in_process(which: str, steps: int) -> dict[str, Any]:
    """Run one way in a fresh process and return its report."""
    command = [sys.executable, __file__, "--worker", which, "--steps", str(steps)]
    # cuBLAS is deterministic only with a fixed workspace (cuBLAS, "Results reproducibility").
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "EGM_ALLOC_AUTO_ENABLE": "0",
    }
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"demo: the {which} run failed with exit status {result.returncode}")
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def print_losses(native: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Print both runs' losses and step times; return whether the losses agree bit for bit."""
    print("step  loss, plain torch       loss, egm_alloc         same bits")
    pairs = list(zip(native["losses"], ours["losses"], strict=True))
    for step, (a, b) in enumerate(pairs):
        first, second = float.fromhex(a), float.fromhex(b)
        print(f"{step:4}  {first:<22.17g}  {second:<22.17g}  {'yes' if a == b else 'NO'}")
    same = all(a == b for a, b in pairs)
    print(
        "Every loss agrees bit for bit."
        if same
        else "The losses differ: memory must not change arithmetic, so this is a bug."
    )
    times = [statistics.median(run["seconds"][WARM_UP:]) * 1e3 for run in (native, ours)]
    print(
        f"\nMedian step after {WARM_UP} for warm-up: plain torch {times[0]:.2f} ms, "
        f"egm_alloc {times[1]:.2f} ms, ratio {times[1] / times[0]:.3f}"
    )
    return same


def print_where(rows: list[dict[str, Any]]) -> None:
    """Print where each large tensor lives."""
    print("tensor            size GiB  tier      backing  driver says  in HBM  on the host (GiB)")
    for row in rows:
        print(
            f"{row['name']:<16}  {row['gib']:8.3f}  {row['tier']:<8}  {row['backing']:<7}  "
            f"{row['memory_type']:<11}  {row['hbm_gib']:6.3f}  {row['host_gib']:11.3f}"
        )


def main() -> int:
    """Run both ways and print the comparison; return 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="training steps (default 20)")
    parser.add_argument("--worker", choices=["native", "egm_alloc"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the steps of warm-up")
    simulated = is_simulated()
    if arguments.worker:
        run_worker(arguments.worker, arguments.steps, simulated)
        return 0
    if simulated:
        print("simulated: kernels do not run, so losses and times mean nothing and are not shown")
    elif not torch.cuda.is_available():
        raise SystemExit("demo: no GPU here; 'make demo' runs it on a simulated one")
    else:
        print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
    native = run_in_process("native", arguments.steps)
    ours = run_in_process("egm_alloc", arguments.steps)
    print(f"threshold {ours['threshold_gib']:g} GiB\n")
    same = simulated or print_losses(native, ours)
    print("\nWhere the bytes live (pages: asked from the driver)")
    print_where(ours["where"])
    print(
        f"\ntorch.cuda still works: peak {ours['peak_gib']:.2f} GiB with egm_alloc, "
        f"{native['peak_gib']:.2f} without; {ours['snapshot_segments']} segments in the snapshot\n"
    )
    print(ours["summary"])
    print(f"\nExtended bytes left after the tensors died and empty_cache: {ours['left_bytes']}")
    extended = all(row["tier"] == "extended" for row in ours["where"][:3])
    return 0 if same and extended and ours["left_bytes"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
