"""The C pair in the forms that torch takes, as Python sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import egm_alloc
from tests.simulator import run_script

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.simulated
def test_pool_holds_managed_memory_whatever_the_size() -> None:
    pool = egm_alloc.mem_pool()
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    info = egm_alloc.info(tensor)
    assert (info.tier, info.backing, info.owner) == ("extended", "managed", "pair")
    assert info.prefetched
    assert egm_alloc.stats().extended["managed"].allocated_bytes >= 64 * MIB
    del tensor, pool


@pytest.mark.simulated
def test_pool_takes_torchs_options_and_no_others() -> None:
    egm_alloc.mem_pool(no_split=True)
    with pytest.raises(TypeError):
        egm_alloc.mem_pool(no_spilt=True)


@pytest.mark.simulated
def test_pool_that_torch_would_ignore_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with pytest.raises(RuntimeError, match="PYTORCH_NO_CUDA_MEMORY_CACHING turns off"):
        egm_alloc.mem_pool()


@pytest.mark.simulated
def test_pair_replaces_torchs_allocator() -> None:
    result = run_script(
        """
import torch, egm_alloc
torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
assert not egm_alloc.is_enabled()
tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
print(egm_alloc.info(tensor).owner, egm_alloc.info(tensor).segment_bytes)
try:
    egm_alloc.enable()
except RuntimeError as error:
    print("refused")
""",
        env={"EGM_ALLOC_AUTO_ENABLE": "0"},
    )
    assert result.stdout == "pair 1048576\nrefused\n"


@pytest.mark.simulated
@pytest.mark.parametrize("way", ["fails", "limit"])
def test_no_memory_in_torchs_place_is_torchs_error(way: str) -> None:
    result = run_script(
        """
import contextlib, sys, torch, egm_alloc
from tests.simulator import sim
if sys.argv[1] == "limit":
    egm_alloc.enable(limit_gib=0.25)
    egm_alloc.disable()
torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
fails = sys.argv[1] == "fails"
with sim.fail_call("cudaMallocManaged", times=-1) if fails else contextlib.nullcontext():
    try:
        torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        print(error)
print(torch.empty(1 << 20, dtype=torch.uint8, device="cuda").numel())
print(torch.empty(0, device="cuda").numel())
""",
        way,
        env={"EGM_ALLOC_AUTO_ENABLE": "0"},
    )
    assert "could not allocate 0.50 GiB (536870912 bytes) on device 0" in result.stdout
    assert result.stdout.endswith("\n1048576\n0\n")
    reason = {"fails": "cudaMallocManaged failed", "limit": "extended tier's limit of 0.25 GiB"}
    assert reason[way] in result.stderr


def test_allocator_is_one_object() -> None:
    assert egm_alloc.pluggable_allocator() is egm_alloc.pluggable_allocator()


def test_header_is_where_get_include_says() -> None:
    header = Path(egm_alloc.get_include()) / "egm_alloc.h"
    assert "managed_malloc" in header.read_text()
