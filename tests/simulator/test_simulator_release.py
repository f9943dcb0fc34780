"""Memory that is taken away while somebody may still use it."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch

from tests.simulator import Simulator, cuda, vmm

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _machine(simulator: Simulator) -> None:
    torch.cuda.synchronize()


def _unmap() -> None:
    with vmm.mapped(2 << 20, "host-numa:0"):
        pass


def _unregister() -> None:
    memory = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cuda.register(address, 1 << 20)
    cuda.unregister(address)


@pytest.mark.parametrize("act", [_unmap, _unregister])
def test_memory_that_goes_while_a_stream_is_pending_is_counted(
    simulator: Simulator, act: Callable[[], None]
) -> None:
    stream, other = torch.cuda.Stream(device=0), torch.cuda.Stream(device=1)
    simulator.hold(other)
    act()  # held, but with nothing to do
    assert simulator.unmapped_while_busy() == 0
    event = other.record_event()
    stream.synchronize()  # not the one
    act()
    act()
    assert simulator.unmapped_while_busy() == 2
    event.synchronize()
    act()
    assert simulator.unmapped_while_busy() == 2
    simulator.reset()
    assert simulator.unmapped_while_busy() == 0


def test_refused_unmapping_is_not_counted(simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    simulator.hold(stream)
    stream.record_event()
    for refused in (lambda: vmm.unmap(0, 2 << 20), lambda: cuda.unregister(1 << 20)):
        with pytest.raises(cuda.CudaError):
            refused()
    assert simulator.unmapped_while_busy() == 0
    cuda.last_error()
