"""Managed memory of the simulated device: advice, prefetch, residency, eviction."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from tests.simulator import Completed, Simulator, cuda

MIB = 1 << 20
SIZE = 64 * MIB

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _machine(simulator: Simulator) -> None:
    cuda.call("cudaSetDevice", 0)
    cuda.last_error()


def test_new_managed_memory_is_nowhere(simulator: Simulator) -> None:
    with cuda.managed(SIZE) as address:
        assert cuda.pointer_type(address) == "managed"
        assert simulator.resident_bytes(address, SIZE, "unpopulated") == SIZE
        assert simulator.hbm()["resident"] == 0


def test_prefetch_populates_and_moves(simulator: Simulator) -> None:
    with cuda.managed(SIZE) as address:
        cuda.prefetch(address, SIZE, "device:1")
        assert simulator.resident_bytes(address, SIZE, 1) == SIZE
        assert simulator.hbm(1)["resident"] == SIZE
        cuda.prefetch(address, 4 * MIB, "host")
        assert simulator.resident_bytes(address, SIZE, "host") == 4 * MIB
        assert cuda.range_attribute(address, 4 * MIB, "last-prefetch-location") == [-1]
        assert cuda.range_attribute(address, SIZE, "last-prefetch-location") == [-2]
    assert simulator.hbm(1)["resident"] == 0


def test_advice_is_remembered() -> None:
    with cuda.managed(SIZE) as address:
        assert cuda.range_attribute(address, SIZE, "preferred-location") == [-2]
        cuda.advise(address, SIZE, "set-preferred-location", "device:0")
        cuda.advise(address, SIZE, "set-accessed-by", "host")
        cuda.advise(address, SIZE, "set-accessed-by", "device:1")
        assert cuda.range_attribute(address, SIZE, "preferred-location") == [0]
        assert cuda.range_attribute(address, SIZE, "preferred-location-type") == [1]
        assert cuda.range_attribute(address, SIZE, "accessed-by", 3) == [-1, 1, -2]


def test_advice_on_other_memory_is_refused() -> None:
    address = cuda.malloc(SIZE)
    with pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue"):
        cuda.advise(address, SIZE, "set-accessed-by", "host")
    cuda.free(address)


def test_advice_for_an_unknown_device_is_refused() -> None:
    with cuda.managed(SIZE) as address, pytest.raises(cuda.CudaError, match="InvalidDevice"):
        cuda.advise(address, SIZE, "set-preferred-location", "device:7")


def test_first_touch_goes_to_the_preferred_location(simulator: Simulator) -> None:
    with cuda.managed(SIZE) as address:
        cuda.advise(address, SIZE // 2, "set-preferred-location", "host")
        simulator.touch(address, SIZE, 0)
        assert simulator.resident_bytes(address, SIZE, "host") == SIZE // 2
        assert simulator.resident_bytes(address, SIZE, 0) == SIZE // 2


def test_cpu_touch_brings_a_chunk_home(simulator: Simulator) -> None:
    with cuda.managed(SIZE) as address:
        cuda.prefetch(address, SIZE, "device:0")
        ctypes.memset(address + 10 * MIB, 1, 1)
        assert simulator.resident_bytes(address, SIZE, "host") == 2 * MIB
        assert simulator.resident_bytes(address, SIZE, 0) == SIZE - 2 * MIB


def test_bytes_survive_every_move() -> None:
    with cuda.managed(SIZE) as address:
        ctypes.memset(address, 7, SIZE)
        cuda.prefetch(address, SIZE, "device:0")
        cuda.prefetch(address, SIZE, "host")
        assert ctypes.string_at(address + SIZE - 3, 3) == b"\7\7\7"


def test_device_memory_pushes_managed_pages_out(simulator: Simulator) -> None:
    capacity = 1024 * MIB
    simulator.set_hbm_gib(1)
    taken = simulator.hbm()["taken"]
    with cuda.managed(capacity) as address:
        cuda.prefetch(address, capacity, "device:0")
        assert simulator.hbm()["resident"] == capacity - taken
        plain = cuda.malloc(capacity // 2)
        assert simulator.hbm()["resident"] <= capacity // 2
        assert simulator.hbm()["evicted"] >= capacity // 4
        cuda.free(plain)


def test_prefetch_of_more_than_hbm_keeps_the_last_part(simulator: Simulator) -> None:
    simulator.set_hbm_gib(1)
    size = 3 << 30
    with cuda.managed(size) as address:
        cuda.prefetch(address, size, "device:0")
        assert simulator.resident_bytes(address + size - SIZE, SIZE, 0) == SIZE
        assert simulator.resident_bytes(address, SIZE, "host") == SIZE


def test_hundred_gib_of_managed_memory_are_lazy() -> None:
    with cuda.managed(100 << 30) as address:
        cuda.advise(address, 100 << 30, "set-preferred-location", "device:0")
        ctypes.memset(address + (99 << 30), 1, 10)


def test_more_than_the_machine_has_is_refused(simulator: Simulator) -> None:
    with pytest.raises(cuda.CudaError, match="cudaErrorMemoryAllocation"):
        cuda.malloc_managed(simulator.host_bytes * 2)


def test_device_without_concurrent_access_refuses_advice_and_prefetch(
    own_process: Callable[..., Completed],
) -> None:
    done = own_process(
        """
        from tests.simulator import cuda
        address = cuda.malloc_managed(1 << 20)
        for act in (
            lambda: cuda.advise(address, 1 << 20, "set-preferred-location", "device:0"),
            lambda: cuda.prefetch(address, 1 << 20, "device:0"),
        ):
            try:
                act()
            except cuda.CudaError as error:
                print(error)
        """,
        machine="no-managed",
    )
    assert done.stdout.split() == ["cudaErrorInvalidDevice"] * 2
