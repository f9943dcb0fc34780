"""place(): where the tensors of a block of code go."""

from __future__ import annotations

import contextlib
import enum
import functools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import egm_alloc
from egm_alloc.config import BACKINGS
from tests.allocator.conftest import GIB, MIB, Background, block, tier
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated

SIZE = 24 * MIB


def backing(tensor: torch.Tensor) -> str | None:
    return egm_alloc.info(tensor).backing


@pytest.fixture(autouse=True)
def on() -> None:
    egm_alloc.enable(threshold_gib=1)


def test_block_places_what_it_makes_and_nothing_after_it() -> None:
    before = block(SIZE)
    with egm_alloc.place("pinned"):
        inside = block(SIZE)
    after = block(SIZE)
    assert [backing(tensor) for tensor in (before, inside, after)] == [None, "pinned", None]


def test_innermost_block_counts_and_the_outer_one_goes_on() -> None:
    found = []
    with egm_alloc.place("pinned"):
        with egm_alloc.place("managed"):
            with egm_alloc.place("device"):
                found.append(block(SIZE))
            found.append(block(SIZE))
        found.append(block(SIZE))
    assert [backing(tensor) for tensor in found] == ["device", "managed", "pinned"]


def test_one_place_may_be_entered_again_while_it_is_entered() -> None:
    place = egm_alloc.place("numa")
    with place, place:
        pass
    with place:
        assert backing(block(SIZE)) == "numa"
    assert backing(block(SIZE)) is None


def test_decorated_function_places_what_it_makes_each_time() -> None:
    @egm_alloc.place("pinned")
    def make(nbytes: int) -> torch.Tensor:
        return block(nbytes)

    assert [backing(make(SIZE)) for _ in range(2)] == ["pinned", "pinned"]
    assert backing(block(SIZE)) is None


def test_function_that_does_not_run_when_it_is_called_is_not_decorated() -> None:
    def generator() -> Iterator[torch.Tensor]:
        yield block(SIZE)

    async def coroutine() -> torch.Tensor:
        return block(SIZE)

    async def async_generator() -> AsyncIterator[torch.Tensor]:
        yield block(SIZE)

    refused: list[tuple[Callable[..., object], str]] = [
        (generator, "a generator function"),
        (functools.partial(generator), "a generator function"),
        (coroutine, "a coroutine function"),
        (async_generator, "an async generator function"),
    ]
    for function, kind in refused:
        with pytest.raises(TypeError, match=rf"^place\(\) decorates .*, {kind}; allowed: "):
            egm_alloc.place("pinned")(function)

    class CallableGenerator:
        def __call__(self) -> Iterator[torch.Tensor]:
            yield block(SIZE)

    others: list[tuple[Any, str]] = [
        (CallableGenerator(), "a generator function"),
        (contextlib.contextmanager(generator), "a generator function"),
        (staticmethod(generator), r"a staticmethod \(put the decorator below that one\)"),
        (classmethod(lambda _: block(SIZE)), r"a classmethod \(put the decorator below that one\)"),
        (CallableGenerator, "a class"),
        (5, "which is not callable"),
    ]
    for what, kind in others:
        with pytest.raises(TypeError, match=rf"^place\(\) decorates .*, {kind}; allowed: "):
            egm_alloc.place("pinned")(what)
    with pytest.raises(TypeError, match=r"\.generator, a generator function"):
        egm_alloc.place("pinned")(generator)


def test_exception_leaves_the_block() -> None:
    with pytest.raises(KeyError):
        with egm_alloc.place("pinned"), egm_alloc.place("managed"):
            raise KeyError
    assert backing(block(SIZE)) is None


def test_out_of_memory_leaves_the_block() -> None:
    with sim.fail_call("cudaHostRegister", times=-1):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            with egm_alloc.place("pinned"):
                block(SIZE)
    assert backing(block(SIZE)) is None


def test_another_thread_is_in_no_block_of_this_one() -> None:
    with egm_alloc.place("pinned"):
        elsewhere = Background(lambda: block(SIZE)).finish()
        here = block(SIZE)
    assert isinstance(elsewhere, torch.Tensor)
    assert [backing(elsewhere), backing(here)] == [None, "pinned"]


def test_threads_place_differently_at_the_same_time() -> None:
    def make(name: str) -> list[str | None]:
        with egm_alloc.place(name):
            return [backing(block(SIZE)) for _ in range(20)]

    threads = {name: Background(lambda name=name: make(name)) for name in BACKINGS}  # type: ignore[misc]
    for name, thread in threads.items():
        assert thread.finish() == [name] * 20


def test_smaller_requests_than_min_bytes_are_placed_as_outside() -> None:
    with egm_alloc.place("pinned"):
        assert backing(block(MIB - 1)) is None
        assert backing(block(MIB)) == "pinned"
    with egm_alloc.place("pinned", min_bytes=0):
        assert backing(block(1)) == "pinned"
        assert torch.empty(0, device="cuda").numel() == 0
    with egm_alloc.place("pinned", min_bytes=np.int64(GIB << 5)):
        large = block(GIB)
        assert (tier(large), backing(large)) == ("extended", "managed")


def test_smaller_requests_than_min_bytes_do_not_fall_to_the_outer_block() -> None:
    with egm_alloc.place("pinned"), egm_alloc.place("managed", min_bytes=SIZE):
        assert backing(block(SIZE - 1)) is None


def test_tag_adds_up_what_its_blocks_hold_over_backings() -> None:
    with egm_alloc.place("pinned", tag="moments"):
        first = block(SIZE)
    with egm_alloc.place("device", tag="moments"):
        second = block(SIZE)
    with egm_alloc.place("pinned", tag="cache"):
        third = block(2 * SIZE)
    with egm_alloc.place("pinned"):
        untagged = block(SIZE)
    tags = egm_alloc.stats().tags
    assert tags["moments"] == egm_alloc.TierStats(2 * SIZE, 2 * SIZE)
    assert tags["cache"] == egm_alloc.TierStats(2 * SIZE, 2 * SIZE)
    assert set(tags) == {"moments", "cache"}
    assert [egm_alloc.info(t).tag for t in (first, second, third, untagged)] == [
        "moments",
        "moments",
        "cache",
        None,
    ]
    del first
    assert egm_alloc.stats().tags["moments"] == egm_alloc.TierStats(SIZE, 2 * SIZE)
    del second, third
    torch.cuda.empty_cache()
    assert egm_alloc.stats().tags == {}


def test_tag_does_not_count_what_torch_keeps_in_hbm() -> None:
    with egm_alloc.place("split", tag="weights"):
        small, large = block(10 * MIB - 1), block(SIZE)
    assert [egm_alloc.info(tensor).tag for tensor in (small, large)] == [None, "weights"]
    assert egm_alloc.stats().tags == {"weights": egm_alloc.TierStats(SIZE, SIZE)}


def test_block_without_a_tag_has_not_that_of_the_one_around_it() -> None:
    with egm_alloc.place("pinned", tag="outer"), egm_alloc.place("pinned"):
        assert egm_alloc.info(block(SIZE)).tag is None


def test_tags_share_no_memory() -> None:
    with egm_alloc.place("pinned", tag="one"):
        address = block(SIZE).data_ptr()
    with egm_alloc.place("pinned", tag="other"):
        assert block(SIZE).data_ptr() != address
    with egm_alloc.place("pinned", tag="one"):
        assert block(SIZE).data_ptr() == address


def test_place_may_go_to_another_process() -> None:
    sent = run_script(
        """
import pickle, egm_alloc
print(pickle.dumps(egm_alloc.place("split", device_fraction=0.25, tag="optimizer")).hex())
"""
    ).stdout
    result = run_script(
        f"""
import pickle, torch, egm_alloc
own = egm_alloc.place("pinned", tag="another")
received = pickle.loads(bytes.fromhex({sent.strip()!r}))
own.__enter__()
received.__enter__()
own.__exit__(None, None, None)  # not the one that came last
tensor = torch.zeros(1 << 24, device="cuda")
received.__exit__(None, None, None)
info = egm_alloc.info(tensor)
print(info.backing, info.tag, info.on_device_bytes, list(egm_alloc.stats().tags))
"""
    )
    assert result.stdout == "split optimizer 16777216 ['optimizer']\n"


def test_signal_handler_may_place_what_it_makes() -> None:
    result = run_script(
        """
import egm_alloc
class Tag(str):
    # What runs in the midst of the look for the tag, as a signal handler may.
    def __hash__(self):
        egm_alloc.place("pinned", tag="handler")
        return super().__hash__()
    def __eq__(self, other):
        egm_alloc.place("pinned", tag="handler")
        return super().__eq__(other)
egm_alloc.place("pinned", tag="first")
egm_alloc.place("pinned", tag=Tag("second"))
print("placed")
""",
        timeout=30,
    )
    assert result.stdout == "placed\n"


def test_enumerations_of_texts_are_texts() -> None:
    class Kind(str, enum.Enum):
        PINNED = "pinned"

    with egm_alloc.place(Kind.PINNED):
        tensor = block(SIZE)
    assert backing(tensor) == "pinned"


def test_device_context_of_torch_makes_placed_tensors() -> None:
    with torch.device("cuda"), egm_alloc.place("pinned"):
        tensors = [
            torch.zeros(SIZE // 4),
            torch.ones(SIZE // 4),
            torch.nn.Linear(4096, 2048).weight,
        ]
    assert {backing(tensor) for tensor in tensors} == {"pinned"}


def test_module_moved_within_a_block_is_placed() -> None:
    large, small = torch.nn.Linear(2048, 2048), torch.nn.Linear(4, 4)
    module = torch.nn.Sequential(large, small)
    expected = large.weight.detach().clone()
    with egm_alloc.place("pinned"):
        module.to("cuda")
    assert backing(large.weight) == "pinned"
    assert backing(small.weight) is None  # below min_bytes
    assert torch.equal(large.weight.detach().cpu(), expected)


def test_device_other_than_those_acted_on_is_placed_all_the_same() -> None:
    egm_alloc.enable(device=1)
    try:
        with egm_alloc.place("pinned"):
            assert backing(block(SIZE, 0)) == "pinned"
    finally:
        egm_alloc.enable(device="all")


def test_users_pool_decides_within_a_block() -> None:
    pool = torch.cuda.MemPool()
    with egm_alloc.place("pinned"):
        with torch.cuda.use_mem_pool(pool):
            inside = block(SIZE)
        beside = block(SIZE)
    assert backing(inside) is None
    assert backing(beside) == "pinned"
    assert inside.data_ptr() in {segment["address"] for segment in pool.snapshot()}
    del inside, pool


# torch 2.15 looks into the block and warns of what it does not know there.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_compiled_function_with_a_block_places_as_uncompiled() -> None:
    pinned = egm_alloc.place("pinned")

    def work(elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        with pinned:
            inside = torch.ones(elements, device="cuda") + 1
        return inside, torch.ones(elements, device="cuda") + 1

    compiled = torch.compile(work, backend="aot_eager")
    for _ in range(2):  # compiles, and takes what it has compiled
        assert [backing(tensor) for tensor in compiled(SIZE // 4)] == ["pinned", None]


def test_block_places_what_a_compiled_function_makes() -> None:
    def work(elements: int) -> torch.Tensor:
        return torch.ones(elements, device="cuda") + 1

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    found = [backing(compiled(SIZE // 4))]
    with egm_alloc.place("pinned"):
        found.append(backing(compiled(SIZE // 4)))
    assert found == [None, "pinned"]


def test_graph_capture_decides_within_a_block() -> None:
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros(16, device="cuda")
    with egm_alloc.place("pinned"):
        with torch.cuda.graph(graph):
            static.add_(1)
            inside = block(SIZE)
        after = block(SIZE)
    graph.replay()
    assert backing(inside) is None
    assert backing(after) == "pinned"


def test_device_in_mode_managed_is_hbm() -> None:
    egm_alloc.enable(mode="managed")
    try:
        with sim.call_log() as log, egm_alloc.place("device"):
            tensor = block(SIZE)
        assert (tier(tensor), backing(tensor)) == ("device", "device")
        assert not log.of("cudaMallocManaged")
        assert backing(block(SIZE)) == "managed"
    finally:
        egm_alloc.enable(mode="tiered")


def test_device_keeps_what_is_above_the_threshold_in_hbm() -> None:
    with egm_alloc.place("device"):
        assert backing(block(2 * GIB)) == "device"
    assert backing(block(2 * GIB)) == "managed"


def test_limit_binds_pinned_memory() -> None:
    egm_alloc.enable(limit_gib=32 / 1024, spill=False)
    try:
        with egm_alloc.place("pinned"):
            live = block(SIZE)
            with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
                block(SIZE)
            with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
                block(2 * SIZE)
            del live
            assert backing(block(SIZE + MIB)) == "pinned"  # what was cached is given back for it
    finally:
        egm_alloc.enable(limit_gib=None, spill=True)


@pytest.mark.parametrize(
    ("kind", "slow_call"),
    [("pinned", "cudaHostRegister"), ("numa", "cuMemCreate"), ("split", "cuMemCreate")],
)
def test_bring_up_holds_up_no_other_thread(kind: str, slow_call: str) -> None:
    def make() -> torch.Tensor:
        with egm_alloc.place(kind):
            return block(SIZE)

    torch.cuda.empty_cache()
    with sim.stall_call(slow_call) as stall:
        bringing_up = Background(make)
        stall.wait_until_reached()
        cached = block(512)
        missing = Background(lambda: block(40 * MIB)).finish()  # a segment of its own
        diverted = Background(lambda: block(GIB)).finish()
        assert bringing_up.is_alive()
    placed = bringing_up.finish()
    assert isinstance(placed, torch.Tensor)
    assert isinstance(missing, torch.Tensor)
    assert isinstance(diverted, torch.Tensor)
    found = [backing(tensor) for tensor in (cached, missing, diverted, placed)]
    assert found == [None, None, "managed", kind]
    bringing_up.result = None


def test_block_while_off_is_refused() -> None:
    egm_alloc.disable()
    place = egm_alloc.place("pinned")
    with pytest.raises(RuntimeError, match="off"):
        with place:
            pass
    egm_alloc.enable()
    with place:
        assert backing(block(SIZE)) == "pinned"
    assert backing(block(SIZE)) is None


def test_switching_off_within_a_block_places_nothing_more() -> None:
    with egm_alloc.place("pinned"):
        egm_alloc.disable()
        assert backing(block(SIZE)) is None
        egm_alloc.enable()
        assert backing(block(SIZE)) == "pinned"


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"backing": "hbm"}, ValueError, "backing is 'hbm'"),
        ({"backing": ""}, ValueError, "backing is ''"),
        ({"backing": None}, TypeError, "backing is None"),
        ({"backing": 1}, TypeError, "backing is 1"),
        ({"backing": "split", "device_fraction": -0.1}, ValueError, "device_fraction is -0.1"),
        ({"backing": "split", "device_fraction": 1.1}, ValueError, "device_fraction is 1.1"),
        ({"backing": "split", "device_fraction": math.nan}, ValueError, "device_fraction is nan"),
        ({"backing": "split", "device_fraction": "1"}, TypeError, "device_fraction is '1'"),
        ({"backing": "split", "device_fraction": True}, TypeError, "device_fraction is True"),
        ({"backing": "pinned", "device_fraction": 0.5}, ValueError, "device_fraction is 0.5"),
        ({"backing": "pinned", "tag": ""}, ValueError, "tag is ''"),
        ({"backing": "pinned", "tag": 3}, TypeError, "tag is 3"),
        ({"backing": "pinned", "tag": b"x"}, TypeError, "tag is b'x'"),
        ({"backing": "pinned", "min_bytes": -1}, ValueError, "min_bytes is -1"),
        (
            {"backing": "pinned", "min_bytes": 1 << 63},
            ValueError,
            "min_bytes is 9223372036854775808",
        ),
        ({"backing": "pinned", "min_bytes": 1.0}, TypeError, "min_bytes is 1.0"),
        ({"backing": "pinned", "min_bytes": True}, TypeError, "min_bytes is True"),
        ({"backing": "pinned", "min_bytes": None}, TypeError, "min_bytes is None"),
    ],
)
def test_bad_argument_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error) as caught:
        egm_alloc.place(**arguments)
    message = str(caught.value)
    assert message.startswith(named)
    assert "allowed: " in message
    assert "\n" not in message


def test_leaving_a_block_in_a_thread_that_did_not_enter_it_is_an_error() -> None:
    place = egm_alloc.place("pinned")

    def leave_within_another() -> str | None:
        with egm_alloc.place("numa"):
            with pytest.raises(RuntimeError, match=r"not in this place\(\) block"):
                place.__exit__(None, None, None)
            return backing(block(SIZE))

    with place:
        assert Background(leave_within_another).finish() == "numa"
        assert backing(block(SIZE)) == "pinned"


def test_leaving_a_block_that_was_not_entered_is_an_error() -> None:
    place = egm_alloc.place("numa")
    with egm_alloc.place("pinned"):
        with pytest.raises(RuntimeError, match=r"not in this place\(\) block"):
            place.__exit__(None, None, None)
        with place:
            pass
        with pytest.raises(RuntimeError, match=r"not in this place\(\) block"):
            place.__exit__(None, None, None)
        assert backing(block(SIZE)) == "pinned"
    assert backing(block(SIZE)) is None


def test_blocks_may_be_left_in_any_order() -> None:
    def suspended(name: str) -> Iterator[None]:
        with egm_alloc.place(name):
            yield

    pinned, numa = suspended("pinned"), suspended("numa")
    next(pinned)
    next(numa)
    next(pinned, None)
    assert backing(block(SIZE)) == "numa"
    next(numa, None)
    assert backing(block(SIZE)) is None
