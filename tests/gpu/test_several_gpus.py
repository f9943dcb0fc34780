"""Several real GPUs: copies between them, NCCL, and data-parallel training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import egm_alloc

MIB, GIB = 1 << 20, 1 << 30
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("managed", "pinned", "numa", "split")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ALL_REDUCE = """
import sys, torch, egm_alloc
from torch import distributed
rank = int(sys.argv[2])
torch.cuda.set_device(rank)
store = f"file://{sys.argv[3]}"
distributed.init_process_group("nccl", store, rank=rank, world_size=2)
with egm_alloc.place(sys.argv[1]):
    tensor = torch.arange(16 << 20, dtype=torch.float32, device="cuda")
assert egm_alloc.info(tensor).backing == sys.argv[1]
tensor += rank
distributed.all_reduce(tensor)
expected = 2 * torch.arange(16 << 20, dtype=torch.float32, device="cuda") + 1
assert torch.equal(tensor, expected)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_copies_between_gpus_keep_contents(
    kind: str, source: int, target: int, budget: Callable[[int], None]
) -> None:
    budget(GIB)
    with egm_alloc.place(kind):
        tensor = torch.arange(16 * MIB, dtype=torch.int32, device=f"cuda:{source}")
    assert egm_alloc.info(tensor).backing == kind
    copied = tensor.to(f"cuda:{target}")
    assert torch.equal(copied.cpu(), torch.arange(16 * MIB, dtype=torch.int32))
    with egm_alloc.place(kind):
        back = torch.empty_like(tensor)
    back.copy_(copied)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("registered", ["0", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_reduce_of_extended_tensors_is_right(
    kind: str, registered: str, tmp_path: Path
) -> None:
    # With it on, torch registers every segment with NCCL as a user's buffer.
    environment = {**os.environ, "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": registered}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_REDUCE, kind, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


@pytest.mark.parametrize("options", [[], ["--fsdp"]])
def test_training_on_two_gpus_has_native_losses(options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "ddp.py"), "--steps", "6", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses are equal" in done.stdout
