"""Counters of both tiers, and the table of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import egm_alloc
from egm_alloc.stats import format_bytes, format_table
from tests.simulator import run_script

MIB, GIB = 1 << 20, 1 << 30


def block(nbytes: int, device: int = 0) -> torch.Tensor:
    """Return an uninitialised tensor of `nbytes` bytes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")


@pytest.mark.simulated
def test_tiers_are_counted_apart() -> None:
    egm_alloc.enable(threshold_gib=1)
    before = egm_alloc.stats()
    small, large = block(MIB), block(2 * GIB)
    after = egm_alloc.stats()
    assert after.device_tier.allocated_bytes - before.device_tier.allocated_bytes == MIB
    managed = after.extended["managed"]
    assert managed.allocated_bytes == managed.reserved_bytes == 2 * GIB
    assert managed.segments == 1
    assert managed.allocations - before.extended["managed"].allocations == 1
    assert after.extended_tier == egm_alloc.TierStats(2 * GIB, 2 * GIB)
    del small, large


@pytest.mark.simulated
def test_freed_block_stays_reserved_until_emptied() -> None:
    egm_alloc.enable(threshold_gib=1)
    frees = egm_alloc.stats().extended["managed"].frees
    tensor = block(2 * GIB)
    del tensor
    cached = egm_alloc.stats().extended["managed"]
    assert (cached.allocated_bytes, cached.reserved_bytes) == (0, 2 * GIB)
    assert cached.frees == frees + 1
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended["managed"].reserved_bytes == 0


@pytest.mark.simulated
def test_peak_starts_again_when_reset() -> None:
    egm_alloc.enable(threshold_gib=1)
    tensor = block(2 * GIB)
    del tensor
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended["managed"].reserved_peak_bytes >= 2 * GIB
    egm_alloc.reset_peak_stats()
    assert egm_alloc.stats().extended["managed"].reserved_peak_bytes == 0


@pytest.mark.simulated
def test_backing_device_has_its_own_counters() -> None:
    egm_alloc.enable(threshold_gib=1, backing="device")
    tensor = block(GIB)
    extended = egm_alloc.stats().extended
    assert extended["device"].allocated_bytes == GIB
    assert extended["managed"].allocated_bytes == 0
    del tensor


@pytest.mark.simulated
def test_devices_are_counted_apart() -> None:
    egm_alloc.enable(threshold_gib=1)
    tensor = block(GIB, device=1)
    assert egm_alloc.stats(0).extended_tier.allocated_bytes == 0
    for device in (1, "cuda:1", torch.device("cuda", 1), tensor.device):
        assert egm_alloc.stats(device).extended_tier.allocated_bytes == GIB
    with torch.cuda.device(1):
        for current in (None, "cuda", torch.device("cuda")):
            assert egm_alloc.stats(current).device == 1


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("device", "error"),
    [
        (-1, ValueError),
        (2, ValueError),
        ("cuda:9", ValueError),
        ("cpu", ValueError),
        ("nonsense", ValueError),
        (torch.device("cpu"), ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ([0], TypeError),
    ],
)
def test_bad_device_is_refused(device: Any, error: type[Exception]) -> None:
    torch.ones(1, device="cuda")
    for function in (egm_alloc.stats, egm_alloc.reset_peak_stats, egm_alloc.memory_summary):
        with pytest.raises(error, match=r"^device is "):
            function(device)
    egm_alloc.stats(0)


@pytest.mark.simulated
def test_asking_does_not_bring_cuda_up() -> None:
    result = run_script(
        """
import torch, egm_alloc
for device in (None, 7):  # which devices there are is not asked either
    stats = egm_alloc.stats(device)
    egm_alloc.reset_peak_stats(device)
    egm_alloc.memory_summary(device)
print(stats.device_tier, stats.extended_tier, torch.cuda.is_initialized())
"""
    )
    zeros = "TierStats(allocated_bytes=0, reserved_bytes=0)"
    assert result.stdout.strip() == f"{zeros} {zeros} False"


@pytest.mark.simulated
def test_summary_shows_state_and_sizes() -> None:
    egm_alloc.enable(threshold_gib=0.5)
    tensor = block(3 * GIB)
    lines = egm_alloc.memory_summary().splitlines()
    assert lines[0] == "egm_alloc on cuda:0: on, mode tiered, threshold 0.5 GiB"
    (managed,) = [cells for cells in map(str.split, lines) if cells[:2] == ["extended", "managed"]]
    assert managed[2:6] == ["3.00", "GiB", "3.00", "GiB"]
    del tensor
    egm_alloc.disable()
    assert egm_alloc.memory_summary().splitlines()[0] == "egm_alloc on cuda:0: off"


@pytest.mark.simulated
def test_torch_counts_both_tiers() -> None:
    egm_alloc.enable(threshold_gib=1)
    before = torch.cuda.memory_allocated()
    tensors = [block(MIB), block(2 * GIB)]
    assert torch.cuda.memory_allocated() - before == 2 * GIB + MIB
    assert torch.cuda.memory_reserved() >= 2 * GIB + MIB
    del tensors


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (5 * MIB // 2, "2.50 MiB"),
        (3 * GIB, "3.00 GiB"),
        (200 * GIB, "200.00 GiB"),
    ],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_table_lines_up() -> None:
    assert format_table(["a", "long"], [["wider", "1"], ["b", ""]]) == (
        "a      long\n-----  ----\nwider     1\nb"
    )
