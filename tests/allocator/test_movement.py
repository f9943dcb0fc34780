"""Moving memory that lives: what `prefetch`, `advise` and `migrate` ask the driver, and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import MIB, block
from tests.simulator import sim

pytestmark = pytest.mark.simulated

SIZE = 32 * MIB


@pytest.fixture(autouse=True)
def on() -> None:
    """Nothing is extended but what a test places."""
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)


def placed(kind: str, nbytes: int = SIZE) -> torch.Tensor:
    with egm_alloc.place(kind):
        return block(nbytes)


def advice(log: Any) -> list[tuple[str, str]]:
    return [(call.args["advice"], call.args["location"]) for call in log.of("cudaMemAdvise")]


def test_prefetch_moves_the_views_pages_and_no_others() -> None:
    tensor = placed("managed")
    egm_alloc.prefetch(tensor, "device")
    egm_alloc.prefetch(tensor[: 8 * MIB], "host")
    where = [
        sim.resident_bytes(tensor.data_ptr() + start, 8 * MIB, "host")
        for start in range(0, SIZE, 8 * MIB)
    ]
    assert where == [8 * MIB, 0, 0, 0]


def test_prefetch_is_ordered_on_the_stream_that_is_given() -> None:
    tensor = placed("managed")
    side = torch.cuda.Stream()
    with sim.call_log() as log:
        egm_alloc.prefetch(tensor, "host", stream=side)
        egm_alloc.prefetch(tensor, "device")
    streams = [call.args["stream"] for call in log.of("cudaMemPrefetchAsync")]
    assert streams == [side.cuda_stream, torch.cuda.current_stream().cuda_stream]


def test_prefetch_is_ordered_on_another_devices_default_stream() -> None:
    tensor = placed("managed")
    with sim.call_log() as log:
        egm_alloc.prefetch(tensor, "device", stream=torch.cuda.default_stream(1))
    # Every device has one of that name: the current device says which is meant.
    calls = [call for call in log if call.name in ("cudaSetDevice", "cudaMemPrefetchAsync")]
    assert [call.args.get("device") for call in calls] == [1, None, 0]
    assert sim.resident_bytes(tensor.data_ptr(), SIZE, 0) == SIZE


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_prefetch_in_a_capture_is_refused_and_the_capture_survives(mode: str) -> None:
    tensor, side, graph = placed("managed"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        used = torch.zeros(16, device="cuda")
        for location in ("host", "device"):
            with pytest.raises(RuntimeError, match="on a stream of device 0 during a CUDA graph"):
                egm_alloc.prefetch(tensor, location)
        egm_alloc.prefetch(tensor, "device", stream=side)
    graph.replay()
    del used
    assert sim.resident_bytes(tensor.data_ptr(), SIZE, 0) == SIZE


def test_advice_that_is_not_mentioned_stays() -> None:
    tensor = placed("managed")
    with sim.call_log() as log:
        egm_alloc.advise(tensor)
    assert log.of("cudaMemAdvise") == []
    with sim.call_log() as log:
        egm_alloc.advise(tensor, preferred_location="host")
    assert len(log.of("cudaMemAdvise")) == 1


def test_each_advice_has_its_call_and_can_be_taken_back() -> None:
    tensor = placed("managed")
    made = []
    for change in (
        {"preferred_location": "host"},
        {"preferred_location": None},
        {"accessed_by": ("device",)},
        {"accessed_by": ()},
        {"read_mostly": True},
        {"read_mostly": False},
    ):
        with sim.call_log() as log:
            egm_alloc.advise(tensor, **change)
        made.append({call.args["advice"] for call in log.of("cudaMemAdvise")})
    assert all(made)
    assert made[0] != made[1]
    assert made[4] != made[5]
    assert len(made[2]) == 2  # the device keeps its mapping, the host no longer does
    assert len(made[3]) == 1


def test_views_of_one_segment_move_together() -> None:
    first, second = placed("numa", 8 * MIB), placed("numa", 8 * MIB)
    segment = egm_alloc.info(first).segment_address
    assert segment == egm_alloc.info(second).segment_address
    egm_alloc.migrate(second[MIB:], device_fraction=1)
    assert egm_alloc.info(first).on_device_bytes == egm_alloc.info(first).segment_bytes


def test_migrating_waits_for_work_on_every_stream() -> None:
    tensor = placed("split")
    side = torch.cuda.Stream()
    before = sim.unmapped_while_busy()
    with sim.holding(side):
        with torch.cuda.stream(side):
            tensor.zero_()
        assert egm_alloc.migrate(tensor, device_fraction=1) == SIZE // 2
    assert sim.unmapped_while_busy() == before


@pytest.mark.parametrize("capturing", [True, False])
def test_migrating_in_a_capture_or_pool_is_refused(capturing: bool) -> None:
    tensor = placed("split")
    before = egm_alloc.info(tensor)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    within = torch.cuda.graph(graph) if capturing else torch.cuda.use_mem_pool(pool)
    with within:
        used = torch.zeros(16, device="cuda")
        with pytest.raises(RuntimeError, match="memory cannot be moved on device 0"):
            egm_alloc.migrate(tensor, device_fraction=1)
    del used
    assert egm_alloc.info(tensor) == before


BAD: list[tuple[str, Callable[[torch.Tensor], object], type[Exception], str]] = [
    ("managed", lambda t: egm_alloc.prefetch(t, "hbm"), ValueError, "location is 'hbm'"),
    ("managed", lambda t: egm_alloc.prefetch(t, None), TypeError, "location is None"),  # type: ignore[arg-type]
    ("managed", lambda t: egm_alloc.prefetch(t, "host", 0), TypeError, "stream is 0"),  # type: ignore[arg-type]
    ("pinned", lambda t: egm_alloc.prefetch(t, "host"), ValueError, "tensor is in 'pinned'"),
    ("device", lambda t: egm_alloc.prefetch(t.cpu(), "host"), ValueError, "tensor is on cpu"),
    ("managed", lambda t: egm_alloc.prefetch("t", "host"), TypeError, "tensor is a"),  # type: ignore[arg-type]
    ("split", lambda t: egm_alloc.advise(t, read_mostly=True), ValueError, "in 'split' memory"),
    (
        "managed",
        lambda t: egm_alloc.advise(t, preferred_location="cpu"),
        ValueError,
        "preferred_location is 'cpu'",
    ),
    (
        "managed",
        lambda t: egm_alloc.advise(t, accessed_by="host"),
        TypeError,
        "accessed_by is 'host'",
    ),
    ("managed", lambda t: egm_alloc.advise(t, accessed_by=("cpu",)), ValueError, "accessed_by"),
    (
        "managed",
        lambda t: egm_alloc.advise(t, read_mostly=1),  # type: ignore[arg-type]
        TypeError,
        "read_mostly is 1",
    ),
    ("managed", lambda t: egm_alloc.migrate(t, device_fraction=1), ValueError, "in 'managed'"),
    (
        "split",
        lambda t: egm_alloc.migrate(t, device_fraction=2),
        ValueError,
        "device_fraction is 2",
    ),
    (
        "split",
        lambda t: egm_alloc.migrate(t, device_fraction=math.nan),
        ValueError,
        "device_fraction is nan",
    ),
    (
        "split",
        lambda t: egm_alloc.migrate(t, device_fraction="1"),  # type: ignore[arg-type]
        TypeError,
        "device_fraction is '1'",
    ),
    (
        "split",
        lambda t: egm_alloc.migrate(t, device_fraction=10**400),
        ValueError,
        "device_fraction is too large",
    ),
]


@pytest.mark.parametrize(("kind", "call", "error", "named"), BAD)
def test_bad_argument_is_named_and_nothing_moves(
    kind: str, call: Callable[[torch.Tensor], object], error: type[Exception], named: str
) -> None:
    tensor = placed(kind)
    before = egm_alloc.info(tensor)
    with sim.call_log() as log, pytest.raises(error) as caught:
        call(tensor)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    moving = {"cudaMemPrefetchAsync", "cudaMemAdvise", "cuMemMap", "cuMemUnmap"}
    assert not moving & set(log.names)
    assert egm_alloc.info(tensor) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda t: egm_alloc.prefetch(t, "host"),
        lambda t: egm_alloc.advise(t, read_mostly=True),
        lambda t: egm_alloc.migrate(t, device_fraction=1),
    ],
    ids=["prefetch", "advise", "migrate"],
)
def test_tensor_of_torchs_own_is_refused(call: Callable[[torch.Tensor], object]) -> None:
    tensor = block(SIZE)
    assert egm_alloc.info(tensor).tier == "device"
    with pytest.raises(ValueError, match="tensor is in HBM by torch"):
        call(tensor)
    with pytest.raises(ValueError, match="tensor is without bytes"):
        call(torch.empty(0, device="cuda"))


def test_advice_on_a_view_is_on_its_part() -> None:
    tensor = placed("managed")
    with sim.call_log() as log:
        egm_alloc.advise(tensor[8 * MIB : 16 * MIB], read_mostly=True)
    (call,) = log.of("cudaMemAdvise")
    assert call.args["ptr"] == tensor.data_ptr() + 8 * MIB
    assert call.args["size"] == 8 * MIB


def test_advice_and_prefetch_wait_for_no_stream() -> None:
    tensor = placed("managed")
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    with sim.holding(busy):
        with torch.cuda.stream(busy):
            tensor.zero_()
        egm_alloc.advise(tensor, preferred_location="host")
        egm_alloc.prefetch(tensor, "host", stream=side)
        assert not busy.query()  # both came back while it works


def test_empty_tensors_have_nothing_to_move() -> None:
    tensor = placed("managed")
    with sim.call_log() as log:
        egm_alloc.prefetch(tensor[:0], "host")
        egm_alloc.advise(tensor[:0], read_mostly=True)
    assert log.names == []
