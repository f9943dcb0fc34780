"""Virtual memory of the simulated device: who may use it, and how."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.simulator import Completed, Simulator, cuda, vmm

MIB = 1 << 20
SIZE = 4 * MIB
OWN = ("device:0=read-write",)

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("nothing_left")]


def _stream_of(device: int) -> int:
    cuda.call("cudaSetDevice", device)
    stream = ctypes.c_void_p()
    cuda.call("cudaStreamCreate", ctypes.byref(stream))
    cuda.call("cudaSetDevice", 0)
    return stream.value or 0


def _invalid() -> AbstractContextManager[object]:
    return pytest.raises(cuda.CudaError, match="cudaErrorInvalidValue")


def test_new_mapping_is_closed_to_everybody() -> None:
    with vmm.mapped(SIZE, "host-numa:0") as address:
        assert {vmm.access(address, who) for who in ("device:0", "device:1", "host-numa:0")} == {
            "none"
        }
        with _invalid():
            cuda.memset(address, 1, 1)


def test_access_is_given_and_taken_one_place_at_a_time() -> None:
    with vmm.mapped(SIZE, "device:0", access=OWN) as address:
        vmm.set_access(address, SIZE, "device:1=read")
        assert vmm.access(address, "device:0") == "read-write"
        assert vmm.access(address, "device:1") == "read"
        vmm.set_access(address, SIZE, "device:0=none")
        assert vmm.access(address, "device:0") == "none"
        assert vmm.access(address, "device:1") == "read"


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 3 * SIZE), (0, SIZE // 2), (2 * MIB, SIZE), (2 * SIZE, SIZE)]
)
def test_access_needs_a_range_of_whole_mappings(offset: int, size: int) -> None:
    start = vmm.reserve(3 * SIZE)
    handle = vmm.create(SIZE)
    vmm.map_memory(start, SIZE, handle)
    vmm.map_memory(start + SIZE, SIZE, handle)
    with _invalid():
        vmm.set_access(start + offset, size, *OWN)
    vmm.set_access(start, 2 * SIZE, *OWN)
    vmm.unmap(start, 2 * SIZE)
    vmm.release(handle)
    vmm.free_addresses(start, 3 * SIZE)


def test_cpu_gets_no_access_to_hbm_and_nobody_gets_any_by_that_call() -> None:
    with vmm.mapped(SIZE, "host-numa:0", "device:0") as address:
        with _invalid():
            vmm.set_access(address, 2 * SIZE, *OWN, "host-numa:0=read-write")
        assert vmm.access(address, "device:0") == "none"


def test_access_of_a_device_that_cannot_reach_the_memory_is_refused(simulator: Simulator) -> None:
    simulator.set_peer_access(False)
    with vmm.mapped(SIZE, "device:0") as address:
        with pytest.raises(cuda.CudaError, match="cudaErrorInvalidDevice"):
            vmm.set_access(address, SIZE, *OWN, "device:1=read-write")
        vmm.set_access(address, SIZE, *OWN)
    with vmm.mapped(SIZE, "host-numa:0") as address:
        vmm.set_access(address, SIZE, *OWN, "device:1=read-write")


def test_copy_and_memset_need_access_of_the_streams_device() -> None:
    first, second = _stream_of(0), _stream_of(1)
    with vmm.mapped(SIZE, "device:0", access=OWN) as address, cuda.managed(SIZE) as other:
        cuda.memset_async(address, 1, SIZE, first)
        cuda.copy_async(other, address, SIZE, first)
        for refused in (
            lambda: cuda.memset_async(address, 2, SIZE, second),
            lambda: cuda.copy_async(other, address, SIZE, second),
            lambda: cuda.copy_async(address, other, SIZE, second),
        ):
            with _invalid():
                refused()
        assert cuda.read(address, 3) == b"\1\1\1"
        vmm.set_access(address, SIZE, "device:1=read")
        cuda.copy_async(other, address, SIZE, second)
        with _invalid():
            cuda.copy_async(address, other, SIZE, second)
        vmm.set_access(address, SIZE, "device:1=read-write")
        cuda.memset_async(address, 3, SIZE, second)
        assert cuda.read(address, 3) == b"\3\3\3"


def test_refused_copy_leaves_the_device_usable(simulator: Simulator) -> None:
    with vmm.mapped(SIZE, "device:1", access=("device:1=read-write",)) as address:
        with _invalid():
            cuda.memset(address, 1, 1)
        cuda.last_error()
        cuda.call("cudaDeviceSynchronize")
        cuda.free(cuda.malloc(1))


def test_peer_copy_needs_access_of_each_sides_own_device_only(simulator: Simulator) -> None:
    simulator.set_peer_access(False)
    with (
        vmm.mapped(SIZE, "device:0", access=OWN) as here,
        vmm.mapped(SIZE, "device:1", access=("device:1=read-write",)) as there,
    ):
        cuda.memset(here, 5, SIZE)
        with _invalid():
            cuda.copy_async(there, here, SIZE)
        cuda.copy_peer_async(there, 1, here, 0, SIZE)
        with _invalid():
            cuda.copy_peer_async(there, 0, here, 0, SIZE)
        with _invalid():
            cuda.copy_peer_async(there, 1, here, 1, SIZE)
        cuda.memset(here, 0, SIZE)
        cuda.copy_peer_async(here, 0, there, 1, SIZE)
        assert cuda.read(here + SIZE - 3, 3) == b"\5\5\5"


def test_copy_of_plain_memory_between_devices_needs_nothing(simulator: Simulator) -> None:
    simulator.set_peer_access(False)
    here = cuda.malloc(MIB)
    cuda.call("cudaSetDevice", 1)
    there = cuda.malloc(MIB)
    cuda.copy(there, here, MIB)
    cuda.free(here)
    cuda.free(there)


def test_copy_out_of_a_range_with_a_hole_is_refused() -> None:
    start = vmm.reserve(2 * SIZE)
    handle = vmm.create(SIZE)
    vmm.map_memory(start, SIZE, handle)
    vmm.set_access(start, SIZE, *OWN)
    cuda.memset(start, 1, SIZE)
    with _invalid():
        cuda.memset(start, 1, SIZE + 1)
    vmm.unmap(start, SIZE)
    vmm.release(handle)
    vmm.free_addresses(start, 2 * SIZE)


def test_split_range_is_one_piece_of_memory() -> None:
    with (
        vmm.mapped(SIZE, "device:0", "host-numa:0", access=OWN) as address,
        cuda.managed(2 * SIZE) as other,
    ):
        ctypes.memset(other, 7, 2 * SIZE)
        cuda.copy(address + MIB, other, SIZE)
        cuda.copy(other + SIZE, address + MIB, SIZE)
        assert ctypes.string_at(other + SIZE, SIZE) == b"\7" * SIZE
        cuda.memset(address + 2 * MIB + 1, 0, 3 * MIB - 2)
        assert cuda.read(address + 2 * MIB, 2) == b"\7\0"
        assert cuda.read(address + SIZE - 1, 2) == b"\0\0"
        assert cuda.read(address + SIZE + MIB - 2, 2) == b"\0\7"


def test_cpu_reaches_host_memory_only_by_an_access_of_its_own(
    own_process: Callable[..., Completed],
) -> None:
    done = own_process(
        """
        import ctypes
        from tests.simulator import cuda, vmm
        with vmm.mapped(2 << 20, "host-numa:0", access=("device:0=read-write",)) as address:
            cuda.memset(address, 9, 10)
            vmm.set_access(address, 2 << 20, "host-numa:0=read-write")
            print(ctypes.string_at(address, 1), flush=True)
            vmm.set_access(address, 2 << 20, "host-numa:0=none")
            ctypes.string_at(address, 1)
        """,
        check=False,
    )
    assert done.stdout == "b'\\t'\n"
    assert done.returncode == -11
