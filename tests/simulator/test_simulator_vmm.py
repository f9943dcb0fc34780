"""Virtual memory of the simulated device: places, addresses, mappings."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulator import CallLog, Completed, Simulator, cuda, vmm

MIB = 1 << 20
SIZE = 4 * MIB
OWN = ("device:0=read-write",)

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("nothing_left")]


def _invalid() -> AbstractContextManager[object]:
    return pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue")


def test_memory_on_a_host_node_is_counted_there_until_its_last_use_ends(
    simulator: Simulator,
) -> None:
    taken = simulator.hbm()["taken"]
    handle = vmm.create(SIZE, "host-numa:0")
    address = vmm.reserve(SIZE)
    vmm.map_memory(address, SIZE, handle)
    assert simulator.host_numa() == {"total": simulator.host_bytes, "taken": SIZE}
    assert simulator.hbm()["taken"] == taken
    vmm.release(handle)
    assert simulator.host_numa()["taken"] == SIZE
    vmm.unmap(address, SIZE)
    assert simulator.host_numa()["taken"] == 0
    vmm.free_addresses(address, SIZE)


def test_full_host_node_refuses_more(simulator: Simulator) -> None:
    simulator.set_host_numa_gib(1)
    first = vmm.create(1022 * MIB, "host-numa:0")
    with pytest.raises(cuda.CudaError, match="cudaErrorMemoryAllocation"):
        vmm.create(SIZE, "host-numa:0")
    last = vmm.create(2 * MIB, "host-numa:0")
    vmm.release(first)
    vmm.release(last)


@pytest.mark.parametrize("location", ["host-numa:1", "host-numa:-1", "none"])
def test_memory_nowhere_is_refused(location: str) -> None:
    with _invalid():
        vmm.create(SIZE, location)


@pytest.mark.parametrize(
    ("machine", "env", "total_gib"),
    [
        ("gh200-egm", {}, 400),
        ("gh200-egm", {"EGM_SIM_EGM_GIB": "3"}, 3),
        ("gh200", {}, 480),
        ("h100", {"EGM_SIM_HOST_GIB": "16"}, 16),
    ],
)
def test_host_node_has_the_carve_out_or_the_hosts_memory(
    own_process: Callable[..., Completed], machine: str, env: dict[str, str], total_gib: int
) -> None:
    done = own_process(
        "from tests.simulator import sim; print(sim.host_numa()['total'] >> 30)",
        machine=machine,
        env=env,
    )
    assert done.stdout == f"{total_gib}\n"


def test_each_socket_has_a_node_of_its_own(own_process: Callable[..., Completed]) -> None:
    done = own_process(
        """
        from tests.simulator import cuda, sim, vmm
        print([cuda.device_attribute(134, device) for device in (0, 1)])
        print([cuda.device_attribute(131, device) for device in (0, 1)])
        vmm.create(2 << 20, "host-numa:1")
        print([sim.host_numa(node) for node in range(sim.host_nodes)])
        """,
        machine="gh200",
        devices=2,
        env={"EGM_SIM_HOST_NODES": "2", "EGM_SIM_HOST_GIB": "2"},
    )
    assert done.stdout.splitlines() == [
        "[0, 1]",
        "[2, 3]",
        str([{"total": 1 << 30, "taken": 0}, {"total": 1 << 30, "taken": 2 << 20}]),
    ]


@pytest.mark.parametrize(
    ("env", "outcome"),
    [({}, "1 made"), ({"EGM_SIM_HOST_NUMA_VMM": "0"}, "0 cudaErrorNotSupported")],
)
def test_machine_may_lack_virtual_memory_on_host_nodes(
    own_process: Callable[..., Completed], env: dict[str, str], outcome: str
) -> None:
    done = own_process(
        """
        from tests.simulator import cuda, vmm
        vmm.release(vmm.create(2 << 20, "device:0"))
        try:
            vmm.create(2 << 20, "host-numa:0")
            made = "made"
        except cuda.CudaError as error:
            made = error
        print(cuda.device_attribute(141), made)
        """,
        env=env,
    )
    assert done.stdout == outcome + "\n"


def test_log_has_places_and_access(call_log: CallLog) -> None:
    both = ("device:0=read-write", "host-numa:0=read")
    with vmm.mapped(SIZE, "host-numa:0", access=both) as address:
        create, mapping, access = call_log.of("cuMemCreate", "cuMemMap", "cuMemSetAccess")
        assert create.args["location"] == "host-numa:0"
        assert mapping.args["offset"] == 0
        assert access.args == {"ptr": address, "size": SIZE, "access": list(both)}
    with vmm.mapped(SIZE, "device:1", access=OWN):
        assert call_log.of("cuMemCreate")[-1].args["location"] == "device:1"


def test_memory_keeps_its_bytes_when_it_is_mapped_again() -> None:
    start = vmm.reserve(2 * SIZE)
    first, second = vmm.create(SIZE), vmm.create(SIZE, "host-numa:0")
    for handle, value in ((first, 1), (second, 2)):
        vmm.map_memory(start, SIZE, handle)
        vmm.set_access(start, SIZE, *OWN)
        cuda.memset(start, value, SIZE)
        vmm.unmap(start, SIZE)
    vmm.map_memory(start, SIZE, first)
    with _invalid():  # access went with the old mapping
        cuda.read(start, 3)
    vmm.map_memory(start + SIZE, 2 * MIB, first)  # a part of it, at another address too
    vmm.set_access(start, SIZE + 2 * MIB, *OWN)
    assert cuda.read(start, 3) == b"\1\1\1"
    cuda.memset(start + SIZE, 3, MIB)
    assert cuda.read(start + MIB - 1, 2) == b"\3\1"
    vmm.unmap(start, SIZE + 2 * MIB)
    vmm.release(first)
    vmm.release(second)
    vmm.free_addresses(start, 2 * SIZE)


def test_mapping_by_other_rules_is_refused() -> None:
    start = vmm.reserve(2 * SIZE)
    handle = vmm.create(SIZE)
    for refused in (
        lambda: vmm.map_memory(start, SIZE // 2, handle, offset=SIZE // 2),
        lambda: vmm.map_memory(start, 2 * SIZE, handle),
        lambda: vmm.map_memory(start + MIB, 2 * MIB, handle),
        lambda: vmm.map_memory(start + 2 * SIZE, SIZE, handle),
    ):
        with _invalid():
            refused()
    vmm.map_memory(start, SIZE, handle)
    vmm.release(handle)
    for refused in (
        lambda: vmm.release(handle),
        lambda: vmm.map_memory(start + SIZE, SIZE, handle),
        lambda: vmm.free_addresses(start, 2 * SIZE),
        lambda: vmm.unmap(start, SIZE // 2),
    ):
        with _invalid():
            refused()
    vmm.unmap(start, SIZE)
    vmm.free_addresses(start, 2 * SIZE)


def test_pointer_has_the_type_of_its_place(simulator: Simulator) -> None:
    with vmm.mapped(SIZE, "device:1", "host-numa:0", access=OWN) as address:
        head, tail = cuda.pointer_attributes(address + 5), cuda.pointer_attributes(address + SIZE)
        assert cuda.pointer_type(address + 5) == "device"
        assert (head.device, head.device_pointer, head.host_pointer) == (1, address + 5, None)
        assert cuda.pointer_type(address + SIZE) == "host"
        assert (tail.device_pointer, tail.host_pointer) == (address + SIZE, address + SIZE)
        assert vmm.address_range(address + 5) == (address, SIZE)
        assert vmm.address_range(address + SIZE + 5) == (address + SIZE, SIZE)
        assert simulator.live_allocations(1)["vmm"].bytes == SIZE
        assert simulator.live_allocations(0)["vmm-host"].bytes == SIZE


def test_error_of_the_driver_is_none_of_the_runtimes(simulator: Simulator) -> None:
    assert cuda.last_error() == 0
    with simulator.fail_call("cuMemCreate"), pytest.raises(cuda.CudaError):
        vmm.create(SIZE)
    assert cuda.last_error() == 0
    with simulator.fail_call("cudaMalloc"), pytest.raises(cuda.CudaError):
        cuda.malloc(SIZE)
    assert cuda.last_error() != 0
