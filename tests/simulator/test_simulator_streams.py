"""Streams, events, captures and graphs of the simulated device."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch

from tests.simulator import CallLog, Simulator, cuda

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _machine(simulator: Simulator) -> None:
    torch.cuda.synchronize()


def test_work_is_done_at_once() -> None:
    event = torch.cuda.Event()
    event.record()
    assert event.query()
    assert torch.cuda.current_stream().query()


def test_held_stream_is_pending_until_released(simulator: Simulator) -> None:
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    simulator.hold(stream)
    event, free = torch.cuda.Event(), torch.cuda.Event()
    event.record(stream)
    free.record(other)
    assert not event.query()
    assert not stream.query()
    assert free.query()
    simulator.release(stream)
    assert event.query()
    assert stream.query()


def test_waiting_completes_held_work(simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    with simulator.holding():
        first, second = torch.cuda.Event(), torch.cuda.Event()
        first.record(stream)
        second.record(stream)
        first.synchronize()
        assert first.query()
        assert not second.query()
        torch.cuda.synchronize()
        assert second.query()


def test_stream_that_waits_for_a_held_one_is_pending_too(simulator: Simulator) -> None:
    held, waiting = torch.cuda.Stream(), torch.cuda.Stream()
    simulator.hold(held)
    held.record_event()
    waiting.wait_stream(held)
    event = waiting.record_event()
    assert not event.query()
    event.synchronize()
    assert held.query()


def test_event_may_die_while_pending(simulator: Simulator) -> None:
    with simulator.holding():
        event = torch.cuda.Event()
        event.record()
        del event


def test_record_stream_defers_reuse(simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    tensor = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    address = tensor.data_ptr()
    with simulator.holding(stream):
        tensor.record_stream(stream)
        del tensor
        second = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
        assert second.data_ptr() != address
    del second
    third = torch.empty(1, device="cuda")  # processes events
    assert third.is_cuda


def test_elapsed_time_is_measured() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) >= 0


def test_graph_replays_copies() -> None:
    source, target = torch.ones(100, device="cuda"), torch.empty(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    source.copy_(torch.ones(100))
    target.copy_(torch.zeros(100))
    with torch.cuda.graph(graph):
        target.copy_(source)
    assert torch.equal(target.cpu(), torch.zeros(100))
    graph.replay()
    assert torch.equal(target.cpu(), torch.ones(100))


def test_capture_over_two_streams() -> None:
    source = torch.ones(100).cuda()
    target = torch.zeros(100).cuda()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            target.copy_(source)
        torch.cuda.current_stream().wait_stream(side)
    graph.replay()
    assert torch.equal(target.cpu(), source.cpu())


def _fork(stream: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
    side.wait_event(stream.record_event())


def test_unjoined_stream_fails_the_capture() -> None:
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()
    with (
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureUnjoined"),
        cuda.capture(stream.cuda_stream),
    ):
        _fork(stream, side)


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda: cuda.malloc(1),
        lambda: cuda.malloc_managed(1),
        lambda: cuda.call("cudaDeviceSynchronize"),
        lambda: cuda.call("cudaFree", None),
    ],
    ids=["cudaMalloc", "cudaMallocManaged", "cudaDeviceSynchronize", "cudaFree"],
)
def test_unsafe_call_is_refused_and_invalidates_the_capture(unsafe: Callable[[], object]) -> None:
    with (
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureInvalidated"),
        cuda.capture(torch.cuda.Stream().cuda_stream),
        suppress(cuda.CudaError),
    ):
        unsafe()
    assert cuda.last_error() != 0


def test_relaxed_capture_allows_allocation() -> None:
    with cuda.capture(torch.cuda.Stream().cuda_stream, "relaxed"):
        cuda.free(cuda.malloc(1))


def test_thread_in_relaxed_mode_may_allocate_during_a_capture() -> None:
    with cuda.capture(torch.cuda.Stream().cuda_stream), cuda.capture_mode("relaxed"):
        cuda.free(cuda.malloc(1))


def _query_captured(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
    event.record(stream)
    with pytest.raises(cuda.CudaError, match="cudaErrorCapturedEvent"):
        cuda.call("cudaEventQuery", ctypes.c_void_p(event.cuda_event))


def test_query_of_a_captured_event_is_refused() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    event.record(stream)  # makes it
    with (
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureInvalidated"),
        cuda.capture(stream.cuda_stream, "relaxed"),
    ):
        _query_captured(stream, event)
    cuda.last_error()


def test_legacy_stream_is_closed_while_a_blocking_stream_captures() -> None:
    blocking = ctypes.c_void_p()
    cuda.call("cudaStreamCreate", ctypes.byref(blocking))
    with (
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureInvalidated"),
        cuda.capture(blocking.value or 0, "relaxed"),
        pytest.raises(cuda.CudaError, match="cudaErrorStreamCaptureImplicit"),
    ):
        cuda.memset(0, 0, 0)
    cuda.last_error()
    cuda.call("cudaStreamDestroy", blocking)


@pytest.mark.parametrize(("mode", "allowed"), [("global", False), ("thread_local", True)])
def test_other_thread_during_a_capture(mode: str, allowed: bool) -> None:
    outcome: list[str] = []

    def allocate() -> None:
        try:
            cuda.free(cuda.malloc(1))
            outcome.append("allocated")
        except cuda.CudaError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=allocate)
    stream = torch.cuda.Stream()
    expected = "cudaErrorStreamCaptureInvalidated"
    with (
        nullcontext() if allowed else pytest.raises(cuda.CudaError, match=expected),
        cuda.capture(stream.cuda_stream, mode),
    ):
        thread.start()
        thread.join()
    assert outcome == ["allocated" if allowed else "cudaErrorStreamCaptureUnsupported"]
    cuda.last_error()


def test_hold_leaves_earlier_work_done(simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    event = stream.record_event()
    simulator.hold(stream)
    assert event.query()
    assert stream.query()


def test_log_says_which_stream_was_waited_for(call_log: CallLog) -> None:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    event = first.record_event()
    call_log.clear()
    event.synchronize()
    second.synchronize()
    assert [(call.name, call.args["stream"]) for call in call_log] == [
        ("cudaEventSynchronize", first.cuda_stream),
        ("cudaStreamSynchronize", second.cuda_stream),
    ]


def test_question_whether_a_stream_captures_is_in_the_full_log(simulator: Simulator) -> None:
    stream = torch.cuda.Stream()
    status = ctypes.c_int()
    with simulator.call_log(everything=True) as full:
        handle = ctypes.c_void_p(stream.cuda_stream)
        cuda.call("cudaStreamIsCapturing", handle, ctypes.byref(status))
    assert full.of("cudaStreamIsCapturing")[0].args == {"stream": stream.cuda_stream}
