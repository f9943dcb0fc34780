"""Which parts of a split tensor are in HBM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import egm_alloc
from tests.allocator.conftest import MIB, block
from tests.simulator import sim

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("initialised")]

CHUNK = 2 * MIB


def split(chunks: int, on_device: int, layout: str | None = None) -> torch.Tensor:
    with egm_alloc.place("split", device_fraction=on_device / chunks, layout=layout):
        return block(chunks * CHUNK)


def on_host(tensor: torch.Tensor) -> list[int]:
    """Return the numbers of the chunks that are on the host."""
    kinds = [
        egm_alloc.residency(tensor[at : at + 1]).memory_type
        for at in range(0, tensor.numel(), CHUNK)
    ]
    assert set(kinds) <= {"device", "host"}
    return [index for index, kind in enumerate(kinds) if kind == "host"]


def test_parts_are_spread_unless_the_head_is_asked_for() -> None:
    assert on_host(split(16, 14)) == [7, 15]
    assert on_host(split(16, 14, "spread")) == [7, 15]
    assert on_host(split(16, 14, "head")) == [14, 15]


@given(chunks=st.integers(8, 48), host=st.integers(1, 8))
def test_no_stretch_has_much_more_of_the_host_than_its_share(chunks: int, host: int) -> None:
    tensor = split(chunks, chunks - host)
    found = on_host(tensor)
    assert len(found) == chunks - (egm_alloc.info(tensor).on_device_bytes or 0) // CHUNK
    for start in range(chunks):
        for end in range(start + 1, chunks + 1):
            share = len(found) * (end - start) / chunks
            assert abs(sum(start <= each < end for each in found) - share) <= 3.5


@pytest.mark.parametrize("host", [1, 2, 4, 8])
def test_powers_of_two_are_spread_evenly(host: int) -> None:
    each = 16 // host
    assert on_host(split(16, 16 - host)) == list(range(each - 1, 16, each))


def test_moving_changes_no_more_chunks_than_it_must() -> None:
    tensor = split(16, 16)
    before: list[int] = []
    for on_device in (14, 9, 3, 0, 3, 9, 14, 16):
        moved = egm_alloc.migrate(tensor, device_fraction=on_device / 16)
        now = on_host(tensor)
        assert len(now) == 16 - on_device
        assert set(now) <= set(before) or set(before) <= set(now)
        assert moved == abs(len(now) - len(before)) * CHUNK
        before = now


def test_head_moves_at_its_end() -> None:
    tensor = split(8, 4, "head")
    egm_alloc.migrate(tensor, device_fraction=6 / 8)
    assert on_host(tensor) == [6, 7]
    egm_alloc.migrate(tensor, device_fraction=3 / 8)
    assert on_host(tensor) == [3, 4, 5, 6, 7]


def test_layouts_do_not_share_memory() -> None:
    spread = split(8, 4)
    address = spread.data_ptr()
    del spread
    head = split(8, 4, "head")
    assert head.data_ptr() != address
    assert on_host(head) == [4, 5, 6, 7]
    assert split(8, 4).data_ptr() == address


def test_range_that_fails_halfway_leaves_nothing() -> None:
    before = sim.hbm()["taken"], sim.host_numa()["taken"], sim.reserved_bytes()
    for name, nth in (("cuMemCreate", 3), ("cuMemCreate", 7), ("cuMemMap", 5)):
        with sim.fail_call(name, nth=nth, times=-1) as fault:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                split(16, 8)
        assert fault.fired > 0
        assert (sim.hbm()["taken"], sim.host_numa()["taken"], sim.reserved_bytes()) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("split", "tail"), ValueError, "layout is 'tail'; allowed: 'spread' or 'head'"),
        (("split", 1), TypeError, "layout is 1; allowed: 'spread' or 'head'"),
        (("numa", "head"), ValueError, "allowed: only with the backing 'split'"),
    ],
)
def test_bad_layouts_are_named(
    arguments: tuple[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        egm_alloc.place(arguments[0], layout=arguments[1])
