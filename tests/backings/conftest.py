"""What the tests of the backings share.

A backing gets all of them by being in ``egm_alloc.config.BACKINGS``. Pinned memory is real memory
of this machine even on the simulator, so sizes are tens of MiB at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import egm_alloc
from egm_alloc.config import BACKINGS
from tests.allocator.conftest import MIB, block, clean_cache
from tests.simulator import sim

__all__ = ["clean_cache"]

# A segment of torch's for each rounding that it knows (2 MiB, 20 MiB, the next 2 MiB), and sizes
# that are nobody's multiple.
SIZES = (1, 2, 511, 512, 513, 4095, MIB - 1, MIB, MIB + 1, 5 * MIB + 3, 20 * MIB, 33 * MIB + 7)


# Smaller ones of torch's share segments, so they are not split.
LEAST_SPLIT = 10 * MIB


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest) -> str:
    """Each backing in turn."""
    return str(request.param)


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


def held_by_device(device: int = 0) -> object:
    """Return everything that the simulated machine has given out on a device."""
    torch.cuda.synchronize()
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
