"""The parts of torch's allocator interface where plain forwarding would be wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

import egm_alloc
from build_backend import cuda_headers
from tests.allocator.conftest import GIB, MIB, block, tier
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated


def test_memory_fraction_binds_hbm_and_not_the_extended_tier() -> None:
    hbm = torch.cuda.get_device_properties(0).total_memory
    egm_alloc.enable(threshold_gib=2, spill=False)
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


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_extended_tier_may_be_larger_than_hbm_whatever_the_fraction(fraction: float) -> None:
    hbm = sim.hbm()["capacity"]
    egm_alloc.enable(threshold_gib=1, spill=False)
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        held = [block(hbm) for _ in range(3)]
        assert {tier(tensor) for tensor in held} == {"extended"}
        del held
        torch.cuda.empty_cache()
        egm_alloc.disable()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(int(hbm * fraction) + 2 * MIB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


COLLECTS = """
import torch, egm_alloc
from tests.simulator import sim
egm_alloc.enable(threshold_gib=1)
torch.cuda.set_per_process_memory_fraction(0.9)
MIB = 1 << 20
def cached_after(extended_gib):
    held = [torch.empty(extended_gib << 30, dtype=torch.uint8, device="cuda")]
    cached = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    del cached
    with sim.call_log() as log:
        small = torch.empty(700 * MIB, dtype=torch.uint8, device="cuda")
    del small, held
    torch.cuda.empty_cache()
    return "cudaFree" not in log.names
print(cached_after(8), cached_after(32))
"""


def test_extended_memory_does_not_set_off_torchs_garbage_collection() -> None:
    ran = run_script(
        COLLECTS,
        hbm_gib=16,
        env={"PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.6"},
    )
    assert ran.stdout.split() == ["True", "True"]


def test_memory_fraction_binds_again_after_a_failed_diversion() -> None:
    egm_alloc.enable(threshold_gib=2, limit_gib=100, spill=False)
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                block(64 * GIB)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            [block(GIB) for _ in range(3)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_fraction_counts_extended_device_memory_as_hbm() -> None:
    egm_alloc.enable(threshold_gib=1, backing="device", spill=False)
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            [block(GIB) for _ in range(3)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_fraction_counts_what_split_tensors_have_in_hbm() -> None:
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)
    torch.cuda.set_per_process_memory_fraction(0.25)  # 2 GiB
    try:
        with egm_alloc.place("split", device_fraction=0.75):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                block(3 * GIB)
            held = [block(2 * GIB)]
        held.append(block(512 * MIB))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(4 * MIB)
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
        torch.cuda.set_per_process_memory_fraction(0.5, 0)
        tensors = [block(GIB, 0), block(GIB, 1)]
        assert torch.cuda.current_device() == 1
        del tensors
        torch.cuda.empty_cache()
        egm_alloc.stats(0)
        assert torch.cuda.current_device() == 1
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


# What cuDNN's convolutions ask before they choose a workspace; Python has no way to it.
CACHE_INFO = """
#include <c10/cuda/CUDACachingAllocator.h>
extern "C" size_t largest_block(int device) {
  size_t largest = 0;
  auto* const allocator = c10::cuda::CUDACachingAllocator::get();
  allocator->cacheInfo(static_cast<c10::DeviceIndex>(device), &largest);
  return largest;
}
"""


@pytest.fixture(scope="module")
def cache_info(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cache_info")
    (folder / "cache_info.cpp").write_text(CACHE_INFO)
    torch_folder = Path(torch.__file__).parent
    assert torch.version.cuda is not None
    cuda = cuda_headers.include_folders(
        torch.version.cuda, sys.path, os.environ, platform.machine()
    )
    library = folder / "cache_info.so"
    includes = [f"-I{path}" for path in (torch_folder / "include", *cuda)]
    source = str(folder / "cache_info.cpp")
    libraries = [source, f"-L{torch_folder / 'lib'}", "-lc10", "-lc10_cuda"]
    subprocess.run(
        ["g++", "-w", "-fPIC", "-shared", "-o", str(library), "-std=c++20", *includes, *libraries],
        check=True,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
    )
    loaded = ctypes.CDLL(str(library))
    loaded.largest_block.restype = ctypes.c_size_t
    return loaded


def test_largest_block_for_workspaces_is_no_more_than_hbm_can_give(
    cache_info: ctypes.CDLL,
) -> None:
    hbm = torch.cuda.get_device_properties(0).total_memory
    egm_alloc.enable(threshold_gib=1)
    cached = block(64 * GIB)
    del cached
    assert 0 < cache_info.largest_block(0) <= hbm
