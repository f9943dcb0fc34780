"""Host memory that is brought up ahead of the tensors that will take it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import egm_alloc
from egm_alloc import _C
from tests.allocator.conftest import GIB, MIB, Background, block, wait_for
from tests.backings.conftest import counters, make, pattern
from tests.simulator import run_script, sim
from tests.simulator.host import write_host

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("initialised")]

CHUNK = 2 * MIB


def taken() -> int:
    return sim.host_numa()["taken"]


def stock_of(total: int, piece: int = CHUNK) -> _C.HostStock:
    """Return a stock that is all there."""
    stock = _C.HostStock(0, total, piece)
    wait_for(lambda: stock.held_bytes == total)
    return stock


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = taken()
    yield
    torch.cuda.empty_cache()
    assert taken() == before


@pytest.mark.parametrize("backing", ["numa", "split"])
def test_tensors_take_what_is_there(backing: str) -> None:
    before = taken()
    with stock_of(16 * CHUNK):
        assert taken() == before + 16 * CHUNK
        with sim.call_log() as log:
            tensor = make(16 * CHUNK, backing)
        in_hbm = 8 if backing == "split" else 0
        assert log.names.count("cuMemCreate") == in_hbm
        assert taken() == before + 16 * CHUNK
    # What was not taken is given back.
    assert taken() == before + (16 - in_hbm) * CHUNK
    assert egm_alloc.info(tensor).backing == backing


def test_more_than_there_is_comes_from_the_driver() -> None:
    with stock_of(4 * CHUNK), sim.call_log() as log:
        tensor = make(12 * CHUNK, "numa")
    assert log.names.count("cuMemCreate") == 8
    assert tensor.numel() == 12 * CHUNK


def test_tensor_waits_for_what_it_needs_and_no_longer() -> None:
    """What comes up is held 1 GiB at a time."""
    with sim.stall_call("cuMemCreate", seconds=0.02), sim.call_log() as log:
        stock = _C.HostStock(0, 2 * GIB, 16 * MIB)
        with stock:
            one = make(GIB, "numa")
            made = log.names.count("cuMemCreate")
            assert GIB // (16 * MIB) <= made < 2 * GIB // (16 * MIB)
            other = make(GIB, "numa")
            assert stock.held_bytes == 0
    assert one.numel() == other.numel() == GIB


def test_pieces_become_the_chunks_of_ranges() -> None:
    with _C.HostStock(0, 4 * CHUNK, CHUNK + 1):
        tensor = make(16 * CHUNK, "split", fraction=11 / 16)
    assert egm_alloc.info(tensor).on_device_bytes == 10 * CHUNK


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_head_is_in_small_chunks_and_tail_in_pieces(pieces: int) -> None:
    piece, size = 8 * MIB, 41 * MIB
    with stock_of(pieces * piece, piece), sim.call_log() as log:
        with egm_alloc.place("split", device_fraction=11 / 41, layout="head"):
            tensor = block(size)
    sizes = [call.args["size"] // MIB for call in log.of("cuMemMap")]
    assert sizes == [2] * 5 + [8, 8, 8, 8]  # 10 MiB of 11 in HBM, 31 MiB and a rounded end
    made = sorted(call.args["size"] // MIB for call in log.of("cuMemCreate"))
    assert made == [2] * 5 + [8] * (4 - pieces)
    assert egm_alloc.info(tensor).on_device_bytes == 10 * MIB
    tensor.copy_(pattern(size, 1))
    for fraction, in_hbm, moved in ((1, 42, 32), (30 / 41, 26, 16), (0, 0, 26), (11 / 41, 10, 10)):
        assert egm_alloc.migrate(tensor, device_fraction=fraction) == moved * MIB
        assert egm_alloc.info(tensor).on_device_bytes == in_hbm * MIB
        assert torch.equal(tensor.cpu(), pattern(size, 1))


def test_other_threads_and_devices_take_nothing_of_it() -> None:
    stock = stock_of(16 * CHUNK)
    made: list[torch.Tensor] = []
    with stock:
        other = threading.Thread(target=lambda: made.append(make(10 * CHUNK, "numa")))
        other.start()
        other.join()
        made.append(make(11 * CHUNK, "numa", device=1))
        assert stock.held_bytes == 16 * CHUNK
    assert stock.held_bytes == 0


def test_failing_driver_ends_it_in_silence_and_the_tensor_says_why() -> None:
    with sim.fail_call("cuMemCreate", nth=5, times=-1):
        stock = _C.HostStock(0, 16 * CHUNK, CHUNK)
        with stock:
            with pytest.raises(torch.cuda.OutOfMemoryError, match="cuMemCreate"):
                make(16 * CHUNK, "numa")
            assert stock.held_bytes == 0  # a batch comes whole or not at all


@pytest.mark.parametrize("filled", [True, False])
def test_closing_it_gives_everything_back(filled: bool) -> None:
    before = taken()
    stock = _C.HostStock(0, 64 * CHUNK, CHUNK)
    if filled:
        wait_for(lambda: stock.held_bytes == 64 * CHUNK)
    stock.close()
    assert taken() == before
    with pytest.raises(RuntimeError, match="once"), stock:
        pass


@pytest.mark.parametrize("filled", [True, False])
def test_program_may_forget_it(filled: bool) -> None:
    before = taken()
    stocks = [_C.HostStock(0, 16 * CHUNK, CHUNK)]
    if filled:
        wait_for(lambda: stocks[0].held_bytes == 16 * CHUNK)
    stocks.clear()
    wait_for(lambda: taken() == before)


def test_forgetting_it_does_not_wait_for_what_is_brought_up() -> None:
    before = taken()
    with sim.stall_call("cuMemCreate") as stall:
        stock = _C.HostStock(0, 16 * CHUNK, CHUNK)
        stall.wait_until_reached()
        del stock  # while the thread is in the midst of the call
    wait_for(lambda: taken() == before)


def test_only_the_thread_that_uses_it_may_close_it() -> None:
    stock = _C.HostStock(0, 16 * CHUNK, CHUNK)
    with stock:
        with pytest.raises(RuntimeError, match="another thread"):
            Background(stock.close).finish()
        assert make(10 * CHUNK, "numa").numel() == 10 * CHUNK
    assert stock.held_bytes == 0


def test_child_of_a_fork_has_none_of_it() -> None:
    stock = _C.HostStock(0, 16 * CHUNK, CHUNK)
    wait_for(lambda: stock.held_bytes == 16 * CHUNK)
    child = os.fork()
    if child == 0:
        del stock
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with stock:
        assert stock.held_bytes == 16 * CHUNK


def test_child_of_a_fork_waits_for_none_of_it() -> None:
    with contextlib.ExitStack() as stack:
        with sim.stall_call("cuMemCreate") as stall:
            stock = stack.enter_context(_C.HostStock(0, 16 * CHUNK, CHUNK))
            stall.wait_until_reached()
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                stock.__exit__(None, None, None)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("backing", ["numa", "split"])
def test_stock_that_suffices_is_all_that_is_asked_for(tmp_path: Path, backing: str) -> None:
    """48 MiB, and nothing beside them."""
    root = write_host(tmp_path, 1, 48 / 1024, 48 / 1024)
    script = f"""
import torch, egm_alloc
from tests.backings.test_host_stock import stock_of
egm_alloc.enable(threshold_gib=1 << 20, host_reserve_gib=0, spill=False)
with stock_of({48 * MIB}, {16 * MIB}) as stock:
    if {backing!r} == "numa":
        with egm_alloc.place("numa"):
            tensor = torch.empty({46 * MIB}, dtype=torch.uint8, device="cuda")
    else:
        with egm_alloc.place("split", device_fraction=10.01 / 58, layout="head"):
            tensor = torch.empty({58 * MIB}, dtype=torch.uint8, device="cuda")
    assert stock.held_bytes == 0
print("done")
"""
    env = {"EGM_SIM_HOST_ROOT": str(root)}
    assert "done" in run_script(script, env=env).stdout


def test_refused_stock_is_no_refused_request(tmp_path: Path) -> None:
    sim.set_host_root(write_host(tmp_path, 1, 10 / 1024))
    egm_alloc.enable(host_reserve_gib=0)
    before = counters("numa").reserve_refusals
    with _C.HostStock(0, GIB, CHUNK) as stock:
        assert make(10 * MIB, "numa").numel() == 10 * MIB  # once the stock is refused
        assert stock.held_bytes == 0
    assert counters("numa").reserve_refusals == before


@pytest.mark.parametrize(("egm_gib", "wanted"), [(0, 120 * MIB), (0.1, 90 * MIB)])
def test_reserve_counts_what_is_taken_from_it_once(
    tmp_path: Path, egm_gib: float, wanted: int
) -> None:
    # 100 MiB may be taken, and the host's files do not change by it.
    root = write_host(tmp_path, 1, 100 / 1024, egm_gib)
    script = f"""
import pytest, torch, egm_alloc
from egm_alloc import _C
from tests.backings.conftest import make
egm_alloc.enable(threshold_gib=1 << 20, host_reserve_gib=0)
with _C.HostStock(0, {80 * MIB}, {CHUNK}):
    tensor = make({wanted}, "numa")
if {egm_gib}:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="carve-out"):
        make({20 * MIB}, "numa")
    del tensor
    torch.cuda.empty_cache()
    make({wanted}, "numa")  # all of it is free again
"""
    run_script(script, env={"EGM_SIM_HOST_ROOT": str(root)})  # no other process books there


def test_reserve_ends_it_and_refuses_the_tensor(tmp_path: Path) -> None:
    sim.set_host_root(write_host(tmp_path, 1, 100 / 1024))
    egm_alloc.enable(host_reserve_gib=0)
    stock = _C.HostStock(0, 2 * GIB, CHUNK)
    with stock:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="reserve"):
            make(200 * MIB, "numa")
        assert stock.held_bytes == 0


def test_device_is_checked() -> None:
    with pytest.raises(ValueError, match="device is -1"):
        _C.HostStock(-1, CHUNK, CHUNK)
    with pytest.raises(RuntimeError, match="device"):
        _C.HostStock(100, CHUNK, CHUNK)
    assert block(1).numel() == 1
