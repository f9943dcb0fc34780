"""Putting the allocator in torch's place: once, before or after CUDA is up, or refused."""

from __future__ import annotations

import pytest
import torch

import egm_alloc
from tests.simulator import run_script

pytestmark = pytest.mark.simulated


def test_enable_is_idempotent_and_keeps_the_backends_name() -> None:
    egm_alloc.enable(threshold_gib=1)
    egm_alloc.enable(threshold_gib=1)
    assert egm_alloc.is_enabled()
    assert torch.cuda.memory.get_allocator_backend() == "native"
    egm_alloc.disable()
    egm_alloc.disable()
    assert not egm_alloc.is_enabled()


def test_import_enables_without_initialising_cuda() -> None:
    run_script(
        """
import torch, egm_alloc
assert egm_alloc.is_enabled()
assert not torch.cuda.is_initialized()
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "extended"
"""
    )


def test_enabled_after_cuda_is_up() -> None:
    run_script(
        """
import torch
before = torch.ones(4, device="cuda")
import egm_alloc
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "extended"
assert egm_alloc.info(before).tier == "device"
del before, tensor
torch.cuda.empty_cache()
"""
    )


def test_fork_before_cuda_use() -> None:
    run_script(
        """
import os, torch, egm_alloc
child = os.fork()
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "extended"
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


def test_process_ends_cleanly_with_live_and_cached_tensors() -> None:
    result = run_script(
        """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
live = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
cached = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
del cached
"""
    )
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("environment", "prepare", "words"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "", "cudaMallocAsync"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
        ({}, "torch.cuda.init(); torch.cuda.caching_allocator_enable(False)", "caching is off"),
        (
            {"EGM_ALLOC_AUTO_ENABLE": "0"},
            "import egm_alloc\n"
            "torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())",
            "pluggable",
        ),
    ],
    ids=["cudaMallocAsync", "no-caching-variable", "caching-switched-off", "pluggable"],
)
def test_refused_over_what_is_not_torchs_caching_allocator(
    environment: dict[str, str], prepare: str, words: str
) -> None:
    run_script(
        f"""
import warnings, torch
{prepare}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import egm_alloc
try:
    egm_alloc.enable()
except RuntimeError as error:
    message = str(error)
else:
    raise AssertionError("not refused")
assert {words!r} in message, message
assert "\\n" not in message.strip(), message
assert not egm_alloc.is_enabled()
""",
        env=environment,
    )


def test_allocator_replaced_afterwards_is_noticed() -> None:
    run_script(
        """
import torch, egm_alloc
assert egm_alloc.is_enabled()
torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
assert not egm_alloc.is_enabled()
try:
    egm_alloc.enable()
except RuntimeError as error:
    assert "replaced" in str(error), error
else:
    raise AssertionError("not refused")
"""
    )


def test_caching_switched_off_later_diverts_nothing() -> None:
    run_script(
        """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
torch.cuda.init()
torch.cuda.caching_allocator_enable(False)
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "device"
assert egm_alloc.stats(0).extended["managed"].allocations == 0
assert not egm_alloc.is_enabled()
assert ": off" in egm_alloc.memory_summary()
try:
    with egm_alloc.place("pinned"):
        raise AssertionError("not refused")
except RuntimeError as error:
    assert "is off" in str(error), error
del tensor
torch.cuda.caching_allocator_enable(True)
assert egm_alloc.is_enabled()
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "extended"
assert egm_alloc.stats(0).extended["managed"].allocations == 1
"""
    )
