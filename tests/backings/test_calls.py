"""What every backing asks of CUDA, and leaves when a call fails, on the simulated device."""

from __future__ import annotations

import contextlib
import ctypes
import re

import pytest
import torch

from tests.allocator.conftest import MIB, Background, block
from tests.backings.conftest import counters, held_by_device, make, pattern
from tests.simulator import cuda, run_script, sim, vmm

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("initialised")]

# Calls that take memory away and, unlike cudaFree, do not wait for kernels.
UNMAPPING = ("cudaHostUnregister", "cuMemUnmap")


def test_memset_reaches_the_first_and_last_byte(backing: str) -> None:
    tensor = make(5 * MIB + 3, backing)
    tensor.copy_(torch.full((5 * MIB + 3,), 9, dtype=torch.uint8))
    cuda.memset(tensor.data_ptr(), 0, tensor.numel())
    assert not tensor.cpu().any()


def test_freed_size_is_served_again_without_a_call(backing: str) -> None:
    make(33 * MIB, backing)
    with sim.call_log() as log:
        make(33 * MIB, backing)
    assert log.names == []


def test_release_waits_for_its_stream_before_it_takes_memory_away(backing: str) -> None:
    stream = torch.cuda.Stream()
    with sim.holding(stream), torch.cuda.stream(stream):
        make(33 * MIB, backing).fill_(1)
        with sim.call_log() as log:
            torch.cuda.empty_cache()
    assert sim.unmapped_while_busy() == 0
    if log.of(*UNMAPPING):
        (waited, *_) = log.of("cudaStreamSynchronize")
        assert waited.args["stream"] == stream.cuda_stream
        assert log.names.index("cudaStreamSynchronize") < min(
            log.names.index(call.name) for call in log.of(*UNMAPPING)
        )
    else:
        assert log.of("cudaFree")


@pytest.mark.parametrize("backing", ["pinned", "numa", "split"])  # cudaFree is the others'
def test_release_after_its_stream_was_destroyed_waits_for_the_device(backing: str) -> None:
    runtime, handle = ctypes.CDLL(None), ctypes.c_void_p()
    assert runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), 1) == 0
    with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
        tensor = make(33 * MIB, backing)
    assert runtime.cudaStreamDestroy(handle) == 0
    busy = torch.cuda.Stream()  # in the place of its last work
    with sim.holding(busy):
        with torch.cuda.stream(busy):
            tensor.fill_(1)
        del tensor
        torch.cuda.empty_cache()
    assert sim.unmapped_while_busy() == 0
    assert counters(backing).segments == 0


@pytest.mark.parametrize("backing", ["pinned", "numa", "split"])
def test_release_while_its_stream_captures_is_put_off(backing: str) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outside = [make(33 * MIB, backing)]
    static = torch.zeros(16, device="cuda")

    def release() -> None:
        outside.clear()
        torch.cuda.empty_cache()

    with sim.call_log() as log:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            static.zero_()
            Background(release).finish()
    assert not log.of(*UNMAPPING)  # waiting for the stream would have broken the capture
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert counters(backing).segments == 0
    assert not {"registered", "managed", "vmm", "vmm-host"} & set(sim.live_allocations(0))


@pytest.mark.filterwarnings("ignore:egm_alloc")  # advice may fail
@pytest.mark.parametrize("error", ["cudaErrorMemoryAllocation", "cudaErrorUnknown"])
def test_any_call_of_bringing_up_may_fail_and_leaves_nothing(backing: str, error: str) -> None:
    held: list[torch.Tensor] = []

    def bring_up() -> None:
        held.append(make(12 * MIB, backing))

    def give_back() -> None:
        held.clear()
        torch.cuda.empty_cache()

    bring_up()
    give_back()
    before = held_by_device()
    count = sim.count_calls(bring_up)
    give_back()
    assert count >= 2
    for nth in range(1, count + 1):
        with sim.call_log() as log, sim.fail_call("*", error=error, nth=nth) as fault:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                bring_up()
        assert fault.fired == 1, nth
        give_back()
        (failed,) = [call for call in log if call.result != "cudaSuccess"]
        if failed.name == "cuMemRelease":
            vmm.release(failed.args["handle"])  # the driver did not take it back, and keeps it
        assert held_by_device() == before, (nth, failed)
        assert counters(backing).segments == counters(backing).reserved_bytes == 0, nth
        bring_up()
        give_back()


def test_no_memory_at_all_is_torchs_error_and_leaves_nothing(backing: str) -> None:
    with sim.call_log() as log:
        make(12 * MIB, backing)
    torch.cuda.empty_cache()
    before = held_by_device()
    takers = set(log.names) & {"cudaMalloc", "cudaMallocManaged", "cudaHostRegister", "cuMemCreate"}
    assert len(takers) == 1
    (name,) = takers
    with sim.fail_call(name, times=-1) as fault:
        with pytest.raises(torch.cuda.OutOfMemoryError, match=name):
            make(12 * MIB, backing)
    assert fault.fired >= 2  # tried once more after what was cached was given back
    assert held_by_device() == before
    assert counters(backing).reserved_bytes == 0
    assert make(12 * MIB, backing).numel() == 12 * MIB


def fail_each_call_of_a_release(backing: str) -> None:
    """Let each call of giving a segment back fail in turn: nothing is raised, and all goes on."""
    kept = block(1)  # see the fixture `initialised`

    def cache_one() -> None:
        make(12 * MIB, backing)

    cache_one()
    count = sim.count_calls(torch.cuda.empty_cache)
    assert count >= 1
    names = set()
    for nth in range(1, count + 1):
        cache_one()
        with sim.call_log() as log, sim.fail_call("*", error="cudaErrorUnknown", nth=nth) as fault:
            torch.cuda.empty_cache()
        assert fault.fired == 1
        names |= {call.name for call in log if call.result != "cudaSuccess"}
        assert counters(backing).segments == counters(backing).reserved_bytes == 0, nth
        tensor = make(12 * MIB, backing)
        tensor.copy_(pattern(12 * MIB, nth))
        assert torch.equal(tensor.cpu(), pattern(12 * MIB, nth))
        del tensor
        torch.cuda.empty_cache()
    assert names & {"cudaFree", *UNMAPPING}
    assert "cuMemUnmap" not in names or "cuMemAddressFree" in names
    assert kept.numel() == 1


def test_any_call_of_a_release_may_fail_unseen(backing: str) -> None:
    # What the driver does not take back stays with the process, hence one of its own.
    script = f"""
import egm_alloc
from tests.backings.test_calls import fail_each_call_of_a_release
egm_alloc.enable(threshold_gib=1 << 20, spill=False)
fail_each_call_of_a_release({backing!r})
print("done")
"""
    assert "done" in run_script(script).stdout


def test_any_call_of_a_release_that_a_capture_forbids_is_made_up_for_later(backing: str) -> None:
    def cache_one() -> None:
        make(33 * MIB, backing)

    before = held_by_device()
    cache_one()
    count = sim.count_calls(torch.cuda.empty_cache)
    forbidden = set()
    for nth in range(1, count + 1):
        cache_one()
        error = "cudaErrorStreamCaptureUnsupported"
        with sim.call_log() as log, sim.fail_call("*", error=error, nth=nth):
            torch.cuda.empty_cache()
        (failed,) = [call for call in log if call.result == error]
        if failed.name in ("cudaFree", *UNMAPPING, "cuMemAddressFree"):
            assert counters(backing).segments == 1, failed
            assert counters(backing).reserved_bytes == 34 * MIB
            forbidden.add(failed.name)
        torch.cuda.empty_cache()
        assert counters(backing).segments == counters(backing).reserved_bytes == 0, failed
        assert held_by_device() == before, failed
    assert forbidden & {"cudaFree", *UNMAPPING}


# Torch asks once per pair of devices whether they reach each other, hence a process of its own.
COPIES_BETWEEN_DEVICES = """
import torch, egm_alloc
from egm_alloc.config import BACKINGS
from tests.simulator import vmm
from tests.backings.conftest import make, pattern
egm_alloc.enable()
n = 12 * (1 << 20)
for backing in BACKINGS:
    early = [make(n, backing, device) for device in (0, 1)]
    for device, tensor in enumerate(early):
        tensor.copy_(pattern(n, device))
        plain = torch.empty(n, dtype=torch.uint8, device=f"cuda:{1 - device}")
        plain.copy_(tensor)
        torch.cuda.synchronize()
        assert torch.equal(plain.cpu(), pattern(n, device)), (backing, "out")
        tensor.copy_(plain.copy_(pattern(n, 5)))
        torch.cuda.synchronize()
        assert torch.equal(tensor.cpu(), pattern(n, 5)), (backing, "in")
    if backing == "pinned":  # copied by a kernel: see tests/gpu
        continue
    early[0].copy_(pattern(n, 7))
    early[1].copy_(early[0])
    torch.cuda.synchronize()
    assert torch.equal(early[1].cpu(), pattern(n, 7)), (backing, "both")
    assert torch.equal(make(n, backing).copy_(early[1]).cpu(), pattern(n, 7)), (backing, "later")
    if backing in ("numa", "split"):
        late = make(n + (1 << 21), backing, 0)
        for tensor in (early[0], late):
            print(backing, vmm.access(tensor.data_ptr(), "device:1"))
"""


@pytest.mark.parametrize(("peers", "access"), [("0", "none"), ("1", "read-write")])
def test_copies_between_devices_keep_contents(peers: str, access: str) -> None:
    ran = run_script(COPIES_BETWEEN_DEVICES, devices=2, env={"EGM_SIM_PEER_ACCESS": peers})
    assert set(re.findall(r"^(?:numa|split) (.*)$", ran.stdout, re.MULTILINE)) == {access}
