"""The host's memory on the simulated device: pinned by CUDA, or registered with it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from tests.simulator import CallLog, Completed, Kind, Simulator, cuda, vmm

MIB = 1 << 20
SIZE = 4 * MIB

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def mapping() -> Iterator[int]:
    """Address of memory of the host that CUDA does not know."""
    memory = mmap.mmap(-1, SIZE)
    yield ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory.close()


def test_registered_memory_is_the_hosts_at_its_own_address(
    simulator: Simulator, mapping: int
) -> None:
    assert cuda.pointer_type(mapping) == "unregistered"
    cuda.register(mapping, SIZE)
    inside = cuda.pointer_attributes(mapping + MIB)
    assert cuda.pointer_type(mapping + MIB) == "host"
    assert (inside.device_pointer, inside.host_pointer) == (mapping + MIB, mapping + MIB)
    assert cuda.device_pointer(mapping + MIB) == mapping + MIB
    assert simulator.live_allocations()["registered"] == Kind(1, SIZE)
    cuda.unregister(mapping)
    assert cuda.pointer_type(mapping) == "unregistered"


def test_registered_memory_is_copied_and_set(mapping: int) -> None:
    cuda.register(mapping, SIZE)
    device = cuda.malloc(SIZE)
    cuda.memset(mapping, 1, SIZE)
    cuda.copy(device, mapping, SIZE)
    cuda.memset(mapping, 0, SIZE)
    assert ctypes.string_at(mapping, 3) == b"\0\0\0"
    cuda.copy_async(mapping, device, SIZE)
    assert ctypes.string_at(mapping, SIZE) == b"\1" * SIZE
    cuda.free(device)
    cuda.unregister(mapping)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, SIZE), (MIB, MIB), (0, MIB), (3 * MIB, MIB), (-MIB, 2 * MIB)]
)
def test_registering_twice_is_refused(mapping: int, offset: int, size: int) -> None:
    cuda.register(mapping, SIZE)
    with pytest.raises(cuda.CudaError, match="cudaErrorHostMemoryAlreadyRegistered"):
        cuda.register(mapping + offset, size)
    cuda.unregister(mapping)


def test_neighbours_are_registered_apart(mapping: int) -> None:
    cuda.register(mapping, MIB)
    cuda.register(mapping + MIB, MIB)
    cuda.unregister(mapping)
    cuda.unregister(mapping + MIB)


def test_registering_what_is_not_mapped_is_refused() -> None:
    start = vmm.reserve(SIZE)
    vmm.free_addresses(start, SIZE)
    with pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue"):
        cuda.register(start, SIZE)


def test_registering_with_an_unknown_flag_is_refused(mapping: int) -> None:
    with pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue"):
        cuda.register(mapping, SIZE, 16)


def test_unregistering_what_is_not_registered_is_refused(mapping: int) -> None:
    pinned = cuda.host_alloc(MIB)
    cuda.register(mapping, SIZE)
    for address in (mapping + MIB, pinned, 12345):
        with pytest.raises(cuda.CudaError, match="cudaErrorHostMemoryNotRegistered"):
            cuda.unregister(address)
    cuda.unregister(mapping)
    with pytest.raises(cuda.CudaError, match="cudaErrorHostMemoryNotRegistered"):
        cuda.unregister(mapping)
    cuda.free_host(pinned)


def test_device_pointer_of_other_memory_or_with_flags_is_refused(mapping: int) -> None:
    device = cuda.malloc(MIB)
    cuda.register(mapping, SIZE)
    for address, flags in ((device, 0), (12345, 0), (mapping, 1)):
        with pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue"):
            cuda.device_pointer(address, flags)
    cuda.unregister(mapping)
    cuda.free(device)


@pytest.mark.parametrize(
    "machine",
    ["h100", "h200", "gh200", "gh200-driver-managed", "gh200-egm", "gb200", "gb10", "no-managed"],
)
def test_devices_use_registered_memory_at_the_cpus_address(
    own_process: Callable[..., Completed], machine: str
) -> None:
    done = own_process(
        "from tests.simulator import cuda; print(cuda.device_attribute(91))", machine=machine
    )
    assert done.stdout == "1\n"


def test_machine_may_have_another_address_for_registered_memory(
    own_process: Callable[..., Completed],
) -> None:
    done = own_process(
        """
        import ctypes, mmap
        from tests.simulator import cuda
        memory = mmap.mmap(-1, 1 << 20)
        host = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        cuda.register(host, 1 << 20)
        device = cuda.device_pointer(host)
        print(cuda.device_attribute(91), device != host)
        print(cuda.device_pointer(host + 5) == device + 5)
        attributes = cuda.pointer_attributes(host + 5)
        print(attributes.device_pointer == device + 5, attributes.host_pointer == host + 5)
        cuda.unregister(host)
        """,
        env={"EGM_SIM_REGISTERED_AT_HOST_ADDRESS": "0"},
    )
    assert done.stdout.split() == ["0", "True", "True", "True", "True"]


def test_log_has_pinning_and_registering(call_log: CallLog, mapping: int) -> None:
    pinned = cuda.host_alloc(SIZE, 1)
    cuda.free_host(pinned)
    cuda.register(mapping, SIZE)
    cuda.unregister(mapping)
    assert [(call.name, call.args) for call in call_log] == [
        ("cudaHostAlloc", {"size": SIZE, "flags": 1, "ptr": pinned}),
        ("cudaFreeHost", {"ptr": pinned}),
        ("cudaHostRegister", {"ptr": mapping, "size": SIZE, "flags": 3}),
        ("cudaHostUnregister", {"ptr": mapping}),
    ]
