"""What the tests of the backings share.

A backing gets all of them by being in ``egm_alloc.config.BACKINGS``. Pinned memory is real memory
of this machine even on the simulator, so sizes are tens of MiB at most.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

import egm_alloc
from egm_alloc.config import BACKINGS
from tests.allocator.conftest import GIB, MIB, block, clean_cache
from tests.simulator import sim

__all__ = ["clean_cache"]

# A segment of torch's for each rounding that it knows (2 MiB, 20 MiB, the next 2 MiB), and sizes
# that are nobody's multiple.
SIZES = (1, 2, 511, 512, 513, 4095, MIB - 1, MIB, MIB + 1, 5 * MIB + 3, 20 * MIB, 33 * MIB + 7)


# Smaller ones of torch's share segments, so they are not split.
LEAST_SPLIT = 10 * MIB


def has_host_numa() -> bool:
    """Whether the driver maps memory of a host NUMA node, asked from the driver."""
    host_numa_vmm = 141  # CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    torch.cuda.init()
    value = ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    device = torch.cuda.current_device()
    status = driver.cuDeviceGetAttribute(ctypes.byref(value), host_numa_vmm, device)
    return bool(status == 0 and value.value)


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest) -> str:
    """Each backing that the machine has, in turn."""
    name = str(request.param)
    if not sim.active:
        skip_what_the_gpu_lacks(name)
    return name


def skip_beyond_budget(nbytes: int) -> None:
    """Skip a test whose managed memory would be more than half of what a real GPU has free."""
    free, _ = torch.cuda.mem_get_info()
    if nbytes > free // 2:
        pytest.skip(f"needs {nbytes / GIB:.1f} GiB in half of the free {free / GIB:.1f} GiB")


def skip_what_the_gpu_lacks(backing: str) -> None:
    """Skip a test of a backing that a real GPU cannot have, or not without danger."""
    if backing == "managed":
        skip_beyond_budget(GIB)
    if backing in ("numa", "split") and not has_host_numa():
        pytest.skip("this driver cannot map memory of a host NUMA node")


@pytest.fixture(autouse=True)
def on() -> None:
    """Switch on; nothing is extended but what a test places, and nothing is spilled."""
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)


def make(nbytes: int, backing: str, device: int = 0, fraction: float | None = None) -> torch.Tensor:
    """Return an uninitialised tensor of `nbytes` bytes in one kind of memory."""
    with egm_alloc.place(backing, device_fraction=fraction, min_bytes=0):
        tensor = block(nbytes, device)
    in_hbm = nbytes == 0 or (backing == "split" and nbytes < LEAST_SPLIT)
    assert egm_alloc.info(tensor).backing == (None if in_hbm else backing)
    return tensor


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    """Return random bytes on the CPU, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def counters(backing: str, device: int = 0) -> egm_alloc.BackingStats:
    """Return the counters of one backing."""
    return egm_alloc.stats(device).extended[backing]


@contextlib.contextmanager
def busy(stream: torch.cuda.Stream) -> Iterator[None]:
    """Keep a stream at work in the block, until it is waited for; a real GPU for half a second."""
    if sim.active:
        with sim.holding(stream):
            yield
    else:
        # A kernel that is launched for the first time may wait for all work on the device.
        torch.ones(1, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
        yield


def held_by_device(device: int = 0) -> object:
    """Return what was given out on a device: by the simulated machine, or by torch's books."""
    torch.cuda.synchronize()
    if not sim.active:
        kinds = egm_alloc.stats(device).extended.values()
        return torch.cuda.memory_reserved(device), [(k.reserved_bytes, k.segments) for k in kinds]
    nodes = [sim.host_numa(node)["taken"] for node in range(sim.host_nodes)]
    return sim.live_allocations(device), sim.hbm(device)["taken"], sim.reserved_bytes(), nodes


@pytest.fixture
def initialised() -> Iterator[None]:
    """Have torch make what it makes once, on both devices, and keep a small block in HBM.

    Once a stream was recorded, each diversion asks torch for a few bytes of HBM; beside that block
    they take no segment of their own.
    """
    small = [block(1, device) for device in range(torch.cuda.device_count())]
    for tensor in small:
        tensor.cpu()
    torch.cuda.empty_cache()
    yield
    del small
