"""One process that drives several GPUs: each device is served as if it were the only one.

Each test runs in a process of its own, on machines of 2 and of 8 devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

import egm_alloc
from egm_alloc import _C
from egm_alloc.config import BACKINGS
from tests.allocator.conftest import GIB, MIB, Background, block
from tests.simulator import cuda, run_script, sim, vmm

pytestmark = pytest.mark.simulated

SIZE = 12 * MIB  # a segment of its own, of this size


def run(function: Callable[..., None], devices: int, *arguments: object, **options: object) -> None:
    """Run a function of this file on a machine with so many devices."""
    call = f"{function.__name__}(*{arguments!r})"
    script = f"from {__name__} import *\nfrom {__name__} import {function.__name__}\n{call}"
    assert run_script(f"{script}\nprint('done')", devices=devices, **options).stdout == "done\n"  # type: ignore[arg-type]


several = pytest.mark.parametrize("devices", [2, 8])


def all_devices() -> range:
    return range(torch.cuda.device_count())


def make(backing: str, device: int, nbytes: int = SIZE) -> torch.Tensor:
    with egm_alloc.place(backing):
        return block(nbytes, device)


def pattern(seed: int) -> torch.Tensor:
    bytes_ = torch.full((SIZE,), seed, dtype=torch.uint8)
    bytes_[:: 1 << 12] = torch.arange(SIZE >> 12, dtype=torch.uint8)
    return bytes_


def current() -> int:
    """Return the device that CUDA itself has as the current one."""
    number = ctypes.c_int()
    cuda.call("cudaGetDevice", ctypes.byref(number))
    return number.value


def segments(backing: str) -> list[int]:
    return [egm_alloc.stats(device).extended[backing].segments for device in all_devices()]


def only(device: int) -> list[int]:
    """Return 1 for a device and 0 for all others."""
    return [int(each == device) for each in all_devices()]


def serve_each_device() -> None:
    egm_alloc.enable(threshold_gib=1)
    for device in all_devices():
        with sim.call_log() as log:
            tensor = block(GIB, device)
        (made,) = log.of("cudaMallocManaged")
        assert made.device == device
        advised = [call.args["location"] for call in log.of("cudaMemAdvise")]
        assert advised == [f"device:{device}", "host"]
        assert (egm_alloc.info(tensor).device, egm_alloc.info(tensor).tier) == (device, "extended")
        assert segments("managed") == only(device)
        sim.touch(tensor.data_ptr(), GIB, by=device)
        assert sim.resident_bytes(tensor.data_ptr(), GIB, device) == GIB
        small = block(MIB, device)
        assert egm_alloc.info(small).tier == "device"
        assert egm_alloc.stats(device).device_tier.allocated_bytes == MIB
        del tensor, small
        torch.cuda.empty_cache()
    for backing in BACKINGS:
        for device in all_devices():
            tensor = make(backing, device)
            assert (egm_alloc.info(tensor).device, egm_alloc.info(tensor).backing) == (
                device,
                backing,
            )
            assert segments(backing) == only(device)
            assert egm_alloc.stats(device).extended[backing].allocated_bytes == SIZE
            del tensor
            torch.cuda.empty_cache()
            assert segments(backing) == [0 for _ in all_devices()]


@several
def test_requests_are_served_by_their_device_and_counted_there(devices: int) -> None:
    run(serve_each_device, devices)


def keep_pools_apart() -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    for backing in BACKINGS:
        addresses = []
        for device in all_devices():  # all but the first could be served from another's cache
            addresses.append(make(backing, device).data_ptr())
        assert len(set(addresses)) == len(addresses), backing
        assert segments(backing) == [1 for _ in all_devices()]
        for device in reversed(all_devices()):
            assert make(backing, device).data_ptr() == addresses[device], backing
        assert segments(backing) == [1 for _ in all_devices()]
        egm_alloc.reset_peak_stats(0)
        torch.cuda.empty_cache()
        assert segments(backing) == [0 for _ in all_devices()]
        peaks = [egm_alloc.stats(d).extended[backing].reserved_peak_bytes for d in all_devices()]
        assert all(peaks), "of each device its own"


@several
def test_what_one_device_has_cached_serves_no_other(devices: int) -> None:
    run(keep_pools_apart, devices)


def limit_each_device() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=3)
    held = [block(2 * GIB, device) for device in all_devices()]
    for device in all_devices():
        with pytest.raises(torch.cuda.OutOfMemoryError, match=rf"on device {device} leaves no"):
            block(2 * GIB, device)
        refusals = [egm_alloc.stats(d).extended["managed"].limit_refusals for d in all_devices()]
        assert [bool(count) for count in refusals] == [d <= device for d in all_devices()]
        held.append(block(GIB, device))
    last = len(all_devices()) - 1
    egm_alloc.enable(device=[0, last], limit_gib=None)
    tiers = [egm_alloc.info(block(GIB, device)).tier for device in all_devices()]
    assert [tier == "extended" for tier in tiers] == [d in (0, last) for d in all_devices()]


@several
def test_limit_holds_for_each_device_by_itself(devices: int) -> None:
    run(limit_each_device, devices)


def take_memory_of_the_nearest_node(nodes: int) -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    assert sim.host_nodes == nodes
    per_node = torch.cuda.device_count() // nodes
    for backing, on_host in (("numa", 1.0), ("split", 0.5)):
        for device in all_devices():
            before = [sim.host_numa(node)["taken"] for node in range(nodes)]
            tensor = make(backing, device)
            near = device // per_node
            assert _C.device_traits(device)["host_numa_node"] == near
            taken = [sim.host_numa(node)["taken"] - before[node] for node in range(nodes)]
            assert taken == [SIZE * on_host * (node == near) for node in range(nodes)]
            egm_alloc.migrate(tensor, device_fraction=1)
            egm_alloc.migrate(tensor, device_fraction=0)
            moved = [sim.host_numa(node)["taken"] - before[node] for node in range(nodes)]
            assert moved == [SIZE * (node == near) for node in range(nodes)]
            del tensor
            torch.cuda.empty_cache()


@pytest.mark.parametrize(("devices", "nodes"), [(4, 2), (4, 4), (8, 2)])
def test_host_memory_is_of_the_node_next_to_the_device(devices: int, nodes: int) -> None:
    env = {"EGM_SIM_HOST_NODES": str(nodes)}
    run(take_memory_of_the_nearest_node, devices, nodes, machine="gb200", env=env)


def copy_between_all(peers: bool) -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    for backing in BACKINGS:
        tensors = [make(backing, device) for device in all_devices()]
        if backing != "pinned":  # copied by a kernel: see tests/gpu
            tensors[0].copy_(pattern(1))
            for here, there in itertools.pairwise(tensors):
                there.copy_(here)
            assert torch.equal(tensors[-1].cpu(), pattern(1)), backing
        for device, tensor in enumerate(tensors):
            tensor.copy_(pattern(device))
        for device, tensor in enumerate(tensors):
            other = (device + 1) % len(tensors)
            plain = block(SIZE, other)
            plain.copy_(tensor)
            assert torch.equal(plain.cpu(), pattern(device)), (backing, "out")
            tensor.copy_(plain.copy_(pattern(device + 9)))
            assert torch.equal(tensor.cpu(), pattern(device + 9)), (backing, "in")
            assert torch.equal(tensor.to(f"cuda:{other}").cpu(), pattern(device + 9))
        if backing in ("numa", "split"):
            # torch has asked for each pair of neighbours, in both directions.
            count = len(tensors)
            for device, other in itertools.product(all_devices(), repeat=2):
                near = (device - other) % count in (1, count - 1)
                access = vmm.access(tensors[device].data_ptr(), f"device:{other}")
                reached = device == other or (near and peers)
                assert access == ("read-write" if reached else "none"), (backing, device, other)


@several
@pytest.mark.parametrize("peers", [False, True])
def test_copies_between_devices_keep_contents(devices: int, peers: bool) -> None:
    run(copy_between_all, devices, peers, env={"EGM_SIM_PEER_ACCESS": str(int(peers))})


def order_prefetches_by_the_tensors_device() -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    for device in all_devices():
        tensor = make("managed", device)
        for here in (0, len(all_devices()) - 1):
            torch.cuda.set_device(here)
            with sim.call_log() as log:
                egm_alloc.prefetch(tensor, "device")
            (prefetched,) = log.of("cudaMemPrefetchAsync")
            assert prefetched.args["location"] == f"device:{device}"
            # The stream is the null one, which each device has its own of.
            assert prefetched.device == device
        torch.cuda.set_device(0)


@several
def test_prefetch_follows_the_work_of_the_tensors_device(devices: int) -> None:
    run(order_prefetches_by_the_tensors_device, devices)


def operations(backing: str, device: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what can be done with memory of a device, each once what it needs is there."""
    held: list[torch.Tensor] = []
    yield "allocate", lambda: held.append(make(backing, device))
    yield "info", lambda: egm_alloc.info(held[0])
    if backing == "managed":
        for location in ("host", "device"):
            yield f"prefetch {location}", lambda to=location: egm_alloc.prefetch(held[0], to)  # type: ignore[misc]
        yield "advise", lambda: egm_alloc.advise(held[0], preferred_location="host")
    if backing in ("numa", "split"):
        for part in (0.75, 0.25):
            yield f"migrate {part}", lambda to=part: egm_alloc.migrate(held[0], device_fraction=to)  # type: ignore[misc]
    for other in {device, len(all_devices()) - 1 - device}:
        yield f"copy to {other}", lambda to=other: make(backing, to).copy_(held[0])  # type: ignore[misc]
        yield f"copy from {other}", lambda of=other: held[0].copy_(make(backing, of))  # type: ignore[misc]
    yield "residency", lambda: egm_alloc.residency(held[0])
    yield "stats", lambda: egm_alloc.stats(device)
    yield "free", held.clear
    yield "empty_cache", torch.cuda.empty_cache
    yield "traits", lambda: _C.device_traits(device)


def keep_the_current_device() -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    for here, backing in itertools.product(all_devices(), BACKINGS):
        torch.cuda.set_device(here)
        for there in {0, len(all_devices()) - 1}:
            for name, operation in operations(backing, there):
                operation()
                assert (current(), torch.cuda.current_device()) == (here, here), (name, backing)


@several
def test_current_device_stays(devices: int) -> None:
    run(keep_the_current_device, devices)


def keep_the_current_device_after_errors(backing: str) -> None:
    egm_alloc.enable(threshold_gib=1 << 10)
    torch.cuda.set_device(1)
    for name in [name for name, _ in operations(backing, 0)]:
        for nth in itertools.count(1):
            fired = 0
            for each, operation in operations(backing, 0):
                if each != name:
                    operation()
                    continue
                with sim.call_log() as log, contextlib.ExitStack() as stack:
                    fault = stack.enter_context(
                        sim.fail_call("*", error="cudaErrorUnknown", nth=nth)
                    )
                    with contextlib.suppress(RuntimeError):
                        operation()
                    fired = fault.fired
                    failed = [call.name for call in log if call.result != "cudaSuccess"]
                if name.startswith(("allocate", "copy")) and failed == ["cudaSetDevice"]:
                    torch.cuda.set_device(1)  # it may have been torch's own guard that failed
                assert current() == 1, (name, nth, log.names)
                if name == "allocate" and fired:
                    break  # nothing to go on with
            torch.cuda.empty_cache()
            assert current() == 1
            if not fired:
                break


@pytest.mark.parametrize("backing", BACKINGS)
def test_current_device_stays_whatever_call_fails(backing: str) -> None:
    run(keep_the_current_device_after_errors, 2, backing)


def keep_the_current_device_in_the_pair() -> None:
    torch.cuda.init()
    library = ctypes.CDLL(_C.__file__)
    library.managed_malloc.restype = ctypes.c_void_p
    library.managed_free.restype = None

    def malloc_and_free() -> None:
        pointer = library.managed_malloc(ctypes.c_size_t(SIZE), 1, None)
        assert current() == 0
        library.managed_free(ctypes.c_void_p(pointer), ctypes.c_size_t(SIZE), 1, None)
        assert current() == 0

    malloc_and_free()
    for nth in range(1, sim.count_calls(malloc_and_free) + 1):
        with sim.fail_call("*", error="cudaErrorUnknown", nth=nth):
            malloc_and_free()


def test_current_device_stays_whatever_call_of_the_pair_fails() -> None:
    run(keep_the_current_device_in_the_pair, 2)


def move_beside_a_capture(devices: int) -> None:
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)
    moved, cached = make("split", 0), make("split", 0, 2 * SIZE)
    egm_alloc.migrate(cached, device_fraction=1)
    address = cached.data_ptr()
    del cached
    other = devices - 1
    static = torch.zeros(16, device=f"cuda:{other}")
    graph = torch.cuda.CUDAGraph()
    reused: list[torch.Tensor] = []

    def move() -> None:
        egm_alloc.migrate(moved, device_fraction=1)
        reused.append(make("split", 0, 2 * SIZE))

    # Not torch.cuda.graph(), which empties the cache first.
    with torch.cuda.device(other), torch.cuda.stream(torch.cuda.Stream(other)):
        graph.capture_begin()
        static += 1
        Background(move).finish()
        static += 1
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize(other)
    assert egm_alloc.info(moved).on_device_bytes == SIZE
    assert reused[0].data_ptr() == address
    assert egm_alloc.info(reused[0]).on_device_bytes == SIZE  # half of it, as was asked for


@several
def test_moving_memory_breaks_no_capture_of_another_device(devices: int) -> None:
    run(move_beside_a_capture, devices, devices)
