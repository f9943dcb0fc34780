"""The parts of torch's allocator interface where plain forwarding would be wrong."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing.reductions as reductions

import egm_alloc
from tests.allocator.conftest import GIB, MIB, block, tier
from tests.simulator import run_script

pytestmark = pytest.mark.simulated


def test_memory_fraction_binds_hbm_and_not_the_extended_tier() -> None:
    hbm = torch.cuda.get_device_properties(0).total_memory
    egm_alloc.enable(threshold_gib=2)
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        large = block(hbm // 2)  # more than the fraction, and not in HBM
        assert tier(large) == "extended"
        assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.25)
        small = [block(512 * MIB) for _ in range(hbm // 4 // (512 * MIB))]
        assert {tier(tensor) for tensor in small} == {"device"}
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(GIB)
        del large, small
        torch.cuda.empty_cache()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            [block(512 * MIB) for _ in range(hbm // 4 // (512 * MIB) + 1)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_fraction_out_of_range_changes_nothing() -> None:
    egm_alloc.enable()
    with pytest.raises((ValueError, RuntimeError)):
        torch.cuda.set_per_process_memory_fraction(1.5)
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


def test_memory_fraction_from_the_settings_is_respected() -> None:
    run_script(
        """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=2)
hbm = torch.cuda.get_device_properties(0).total_memory
large = torch.empty(hbm // 2, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(large).tier == "extended"
assert abs(torch.cuda.get_per_process_memory_fraction() - 0.25) < 1e-6
""",
        env={"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.25"},
    )


def test_extended_tensor_cannot_be_shared_between_processes() -> None:
    egm_alloc.enable(threshold_gib=1)
    with pytest.raises(RuntimeError, match="managed memory cannot be shared"):
        reductions.reduce_tensor(block(GIB))


# Torch keeps what a process has shared until that process ends, hence one of its own.
@pytest.mark.parametrize("nbytes", [MIB, GIB], ids=["device-tier", "extended-device-memory"])
def test_plain_device_memory_can_be_shared_between_processes(nbytes: int) -> None:
    run_script(
        f"""
import torch, egm_alloc
import torch.multiprocessing.reductions as reductions
egm_alloc.enable(threshold_gib=1, backing="device")
assert reductions.reduce_tensor(torch.empty({nbytes}, dtype=torch.uint8, device="cuda"))
"""
    )


def test_copies_between_devices_and_host_keep_contents() -> None:
    egm_alloc.enable(threshold_gib=1 / 1024)
    source = torch.arange(1 << 20, dtype=torch.int32)
    on_first = source.to("cuda:0")
    on_second = on_first.to("cuda:1")
    assert tier(on_first) == tier(on_second) == "extended"
    assert on_second.device.index == 1
    assert torch.equal(on_second.cpu(), source)
    assert torch.cuda.current_device() == 0


def test_current_device_is_left_as_it_was() -> None:
    egm_alloc.enable(threshold_gib=1)
    with torch.cuda.device(1):
        tensors = [block(GIB, 0), block(GIB, 1)]
        assert torch.cuda.current_device() == 1
        del tensors
        torch.cuda.empty_cache()
        egm_alloc.stats(0)
        assert torch.cuda.current_device() == 1
