"""Host memory that must stay free, and processes of one host that want the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.allocator.ranks import MIB, Rank
from tests.simulator import run_script
from tests.simulator.host import write_host

pytestmark = pytest.mark.simulated

Ranks = Callable[..., Rank]
TABLE = "dev/shm/egm_alloc.host_reserve.1"


def host(root: Path, available_mib: float, egm_mib: float = 0) -> Path:
    return write_host(root, 1, available_mib / 1024, egm_mib / 1024)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of 1 GiB, of which 100 MiB are free whatever is taken: its files do not change."""
    return host(tmp_path / "host", 100)


@pytest.fixture
def rank(root: Path) -> Iterator[Ranks]:
    ranks: list[Rank] = []

    def start(at: Path = root) -> Rank:
        ranks.append(Rank(at))
        return ranks[-1]

    yield start
    for each in ranks:
        each.kill()


def test_own_promises_count(rank: Ranks) -> None:
    alone = rank()
    assert alone.do("take", 60) == ""
    refusal = alone.do("take", 60)
    assert "would cut into the reserve of 0.00 GiB" in refusal
    assert "0.06 GiB of that is promised to managed memory that is not populated yet" in refusal
    assert "other processes" not in refusal
    alone.do("free")
    assert alone.do("take", 60) == ""
    alone.do("populate")  # now the kernel counts it, were it not simulated
    assert alone.do("take", 60) == ""
    assert alone.do("bookings")["promised_bytes"] == 60 * MIB
    alone.do("free")
    assert alone.do("bookings")["promised_bytes"] == 0


def test_promises_of_another_process_count_until_it_frees_them(rank: Ranks) -> None:
    first, second = rank(), rank()
    assert first.do("take", 60) == ""
    for kind in ("managed", "pinned"):
        refusal = second.do("take", 60, kind)
        assert "would cut into the reserve" in refusal
        assert "0.06 GiB to managed memory and 0.00 GiB to requests of other processes" in refusal
    assert second.do("take", 30) == ""
    second.do("free")
    first.do("free")
    assert second.do("take", 60) == ""


def test_promise_of_a_killed_process_is_free(rank: Ranks) -> None:
    first, second = rank(), rank()
    assert first.do("take", 60) == ""
    assert second.do("take", 60) != ""
    first.kill()
    assert second.do("take", 60) == ""


def test_promise_of_a_killed_process_is_free_though_its_child_lives(rank: Ranks) -> None:
    first, second = rank(), rank()
    assert first.do("take", 60) == ""
    child = first.do("fork")
    try:
        assert second.do("take", 60) != ""
        first.kill()
        os.kill(child, 0)
        assert second.do("take", 60) == ""
    finally:
        os.kill(child, signal.SIGKILL)


def test_processes_that_are_one_anothers_children_count_apart(rank: Ranks) -> None:
    # All are forked from one process, which has imported egm_alloc.
    ranks = [rank() for _ in range(3)]
    assert [each.do("take", 10) for each in ranks] == [""] * 3
    bookings = ranks[0].do("bookings")
    assert bookings["promised_bytes"] == 10 * MIB
    assert bookings["others_promised_bytes"] == 20 * MIB
    assert bookings["other_processes"] == 2


def test_of_two_processes_at_once_one_gets_the_last_memory(rank: Ranks) -> None:
    times = 100
    both = [rank(), rank()]
    for each in both:
        each.begin("take_together", 60, times)
    for _ in range(times):
        assert [each.answer() for each in both] == ["ready"] * 2
        moment = time.monotonic() + 0.005  # too late or not: all that changes is how close they are
        for each in both:
            each.tell(moment)
        assert [each.answer() for each in both] == ["done"] * 2
        for each in both:
            each.tell()
    for outcome in zip(*(each.answer() for each in both), strict=True):
        (refusal,) = filter(None, outcome)
        assert "would cut into the reserve" in refusal
        assert "of other processes" in refusal


def test_promise_shrinks_as_the_memory_is_populated(rank: Ranks) -> None:
    first, second = rank(), rank()
    assert first.do("take", 60) == ""
    assert second.do("bookings")["others_promised_bytes"] == 60 * MIB
    first.do("populate")
    # The first does nothing more.
    end = time.monotonic() + 60
    while second.do("bookings")["others_promised_bytes"] > 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert second.do("take", 60) == ""


IN_HBM: list[tuple[Any, ...]] = [
    ("plain", 6 << 10),
    ("take", 6 << 10, "split", 0, 1.0),
    ("take", 6 << 10, "device"),
]


@pytest.mark.parametrize("call", [*IN_HBM, ("library", 6 << 10)])
def test_hbm_that_is_taken_makes_managed_memory_a_promise(
    rank: Ranks, call: tuple[Any, ...]
) -> None:
    first, second = rank(), rank()  # of 8 GiB each
    first.do("configure", preferred_location="device")
    first.do(*call)
    assert first.do("take", (2 << 10) + 40) == ""
    assert second.do("bookings")["others_promised_bytes"] == 40 * MIB
    assert second.do("take", 80, "pinned") != ""


# What a library takes then, the driver does not tell from managed memory that was populated.
@pytest.mark.parametrize("claimed", ["pinned", "managed"])
@pytest.mark.parametrize("call", IN_HBM)
def test_hbm_that_torch_takes_afterwards_is_seen_by_the_next_claim(
    rank: Ranks, call: tuple[Any, ...], claimed: str
) -> None:
    first, second = rank(), rank()
    first.do("configure", preferred_location="device")
    assert first.do("take", (2 << 10) + 40) == ""
    first.do(*call)
    assert first.do("take", 2, claimed) == ""
    promised = 60 if claimed == "managed" else 40  # a small request has a segment of 20 MiB
    assert second.do("bookings")["others_promised_bytes"] == promised * MIB
    assert second.do("take", 80, "pinned") != ""


def test_hbm_that_a_library_gives_back_is_no_reason_to_refuse(rank: Ranks) -> None:
    alone = rank()
    alone.do("configure", preferred_location="device")
    alone.do("library", 6 << 10)
    assert alone.do("take", (2 << 10) + 60) == ""
    assert alone.do("take", 60, "pinned") != ""
    alone.do("library_gives_back")
    assert alone.do("bookings")["promised_bytes"] == 0
    alone.do("use")
    assert alone.do("bookings")["promised_bytes"] == 0
    assert alone.do("take", 60, "pinned") == ""


def test_managed_memory_of_another_device_makes_none_of_this_one_a_promise(rank: Ranks) -> None:
    alone = rank()
    alone.do("configure", preferred_location="device")
    assert alone.do("take", 2 << 10) == ""
    alone.do("use")
    alone.do("plain", 4 << 10)
    assert alone.do("take", 2, "managed", 1) == ""
    assert alone.do("take", (2 << 10) - 200) == ""
    assert alone.do("bookings")["promised_bytes"] == 0
    assert alone.do("take", 60, "pinned") == ""


def test_managed_memory_that_is_in_hbm_is_no_promise(rank: Ranks) -> None:
    alone = rank()
    alone.do("configure", preferred_location="device")
    alone.do("library", 3 << 10)
    assert alone.do("take", 4 << 10) == ""
    alone.do("use")
    assert alone.do("bookings")["promised_bytes"] == 0
    assert alone.do("take", 60, "pinned") == ""
    assert alone.do("take", 1 << 10) == ""
    assert "would cut into the reserve" in alone.do("take", 120)


def test_hbm_given_back_is_there_for_managed_memory_again(rank: Ranks) -> None:
    alone = rank()
    alone.do("configure", preferred_location="device")
    assert alone.do("take", 8 << 10, "split", 0, 0.995) == ""
    assert alone.do("take", 160) != ""
    alone.do("free")
    assert alone.do("take", 8 << 10) == ""


def test_request_waits_for_those_under_way_before_it_is_refused(root: Path, rank: Ranks) -> None:
    first, second = rank(), rank()
    first.begin("take_stalled", 60, "pinned", "cudaHostRegister")
    assert first.answer() == "stands still"
    assert second.do("bookings")["others_pending_bytes"] == 60 * MIB
    second.begin("take_waiting", 60, "pinned")
    assert second.answer() == "waits"
    first.tell()
    assert first.answer() == ""
    # As far as the simulated kernel tells, all is still free.
    assert second.answer() == ""
    third = rank()
    first.begin("take_stalled", 60, "pinned", "cudaHostRegister")
    assert first.answer() == "stands still"
    third.begin("take_waiting", 60, "pinned")
    assert third.answer() == "waits"
    host(root, 40)  # what the first has populated
    first.tell()
    assert first.answer() == ""
    assert "would cut into the reserve" in third.answer()


def test_managed_memory_counts_from_the_request_on(rank: Ranks) -> None:
    first, second = rank(), rank()
    first.begin("take_stalled", 60, "managed", "cudaMallocManaged")
    assert first.answer() == "stands still"
    second.begin("take_waiting", 60, "managed")
    assert second.answer() == "waits"
    first.tell()
    assert first.answer() == ""
    assert "0.06 GiB to managed memory and 0.00 GiB to requests of other" in second.answer()


def test_carveout_is_shared_too(tmp_path: Path, rank: Ranks) -> None:
    carved = host(tmp_path / "carved", 100, egm_mib=100)
    first, second = rank(carved), rank(carved)
    assert first.do("take", 60, "numa") == ""
    refusal = second.do("take", 60, "numa")
    assert "the EGM carve-out of" in refusal
    assert "(62914560 bytes) by other processes" in refusal
    assert second.do("take", 60) == ""  # other memory
    first.kill()
    assert second.do("take", 60, "numa") == ""
    second.do("free")
    assert rank(carved).do("take", 60, "numa") == ""


def test_carveout_counts_what_is_brought_up_ahead_once(tmp_path: Path, rank: Ranks) -> None:
    carved = host(tmp_path / "carved", 100, egm_mib=100)
    first, second = rank(carved), rank(carved)
    first.do("stock", 60)
    assert "(62914560 bytes) by other processes" in second.do("take", 60, "numa")
    assert first.do("take", 80, "numa") == ""
    assert "(83886080 bytes) by other processes" in second.do("take", 40, "numa")
    assert "the EGM carve-out of" in first.do("take", 40, "numa")
    first.do("free")
    first.do("end_stock")
    assert second.do("take", 90, "numa") == ""


CARVEOUT = """
import pytest, torch, egm_alloc
from egm_alloc import _C
from tests.backings.conftest import MIB, make
egm_alloc.enable(threshold_gib=1 << 20, host_reserve_gib=0, spill=False)
"""


def test_carveout_counts_what_ranges_hold_with_their_rounding(tmp_path: Path) -> None:
    """Of a stock in pieces of 16 MiB, tensors of 18 MiB take two each."""
    carved = host(tmp_path / "carved", 100, egm_mib=100)
    script = """
with _C.HostStock(0, 96 * MIB, 16 * MIB):
    tensors = [make(18 * MIB, "numa") for _ in range(3)]
with pytest.raises(torch.cuda.OutOfMemoryError, match="carve-out.*100663296 bytes. are held"):
    make(10 * MIB, "numa")
del tensors
torch.cuda.empty_cache()
make(100 * MIB, "numa")
"""
    run_script(CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(carved)})


@pytest.mark.parametrize("egm_mib", [0, 20])
def test_moving_a_tensor_to_the_host_is_asked_of_the_reserve(tmp_path: Path, egm_mib: int) -> None:
    at = host(tmp_path / "host", 20, egm_mib=egm_mib)
    script = f"""
tensor = make(64 * MIB, "split", fraction=1.0)
with pytest.raises(RuntimeError, match={"carve-out" if egm_mib else "reserve"!r}):
    egm_alloc.migrate(tensor, device_fraction=0)
assert egm_alloc.info(tensor).on_device_bytes == 64 * MIB
assert egm_alloc.migrate(tensor, device_fraction=0.75) == 16 * MIB
if {egm_mib}:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="16777216 bytes. are held"):
        make(10 * MIB, "numa")
    assert egm_alloc.migrate(tensor, device_fraction=1) == 16 * MIB
    held = make(20 * MIB, "numa")
"""
    run_script(CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(at)})


def test_carveout_that_is_only_cached_is_given_back_for_a_move(tmp_path: Path) -> None:
    at = host(tmp_path / "host", 20, egm_mib=100)
    script = """
tensor = make(64 * MIB, "split", fraction=1.0)
make(60 * MIB, "numa")
assert egm_alloc.migrate(tensor, device_fraction=0) == 64 * MIB
assert egm_alloc.stats().extended["split"].reserve_refusals == 0
"""
    run_script(CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(at)})


@pytest.mark.parametrize("advised", [True, False])
def test_sending_managed_memory_to_the_host_is_asked_of_the_reserve(
    root: Path, advised: bool
) -> None:
    script = f"""
from tests.simulator import sim
def send(tensor):
    if {advised}:
        egm_alloc.advise(tensor, preferred_location="host", accessed_by=())
    else:
        egm_alloc.prefetch(tensor, "host")

def promised():
    return _C.host_bookings()["promised_bytes"]

egm_alloc.enable(preferred_location="device")
tensor = make(160 * MIB, "managed")
sim.touch(tensor.data_ptr(), tensor.nbytes, by=0)
with sim.call_log() as log:
    with pytest.raises(RuntimeError, match="would cut into the reserve"):
        send(tensor)
assert log.of("cudaMemAdvise") == log.of("cudaMemPrefetchAsync") == []
assert egm_alloc.stats().extended["managed"].reserve_refusals == 1
assert promised() == 0
send(tensor[: 60 * MIB])
send(tensor[: 60 * MIB])  # of that is nothing more to come
assert promised() == 60 * MIB
with pytest.raises(torch.cuda.OutOfMemoryError, match="is promised to managed memory"):
    make(60 * MIB, "pinned")
with pytest.raises(RuntimeError, match="would cut into the reserve"):
    send(tensor[40 * MIB : 120 * MIB])
send(tensor[40 * MIB : 80 * MIB])
assert promised() == 80 * MIB
ctypes.memset(tensor.data_ptr(), 0, 80 * MIB)
assert sim.resident_bytes(tensor.data_ptr(), tensor.nbytes, "host") == 80 * MIB
assert promised() == 0
egm_alloc.prefetch(tensor, "device")
if {advised}:
    assert promised() == 80 * MIB
    egm_alloc.advise(tensor, preferred_location="device")
assert promised() == 0
send(tensor[: 60 * MIB])
del tensor
torch.cuda.empty_cache()
assert promised() == 0
"""
    run_script("import ctypes\n" + CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(root)})


def test_memory_sent_to_the_host_and_used_again_is_no_promise_for_long(root: Path) -> None:
    script = """
from tests.allocator.conftest import wait_for
from tests.simulator import sim
egm_alloc.enable(preferred_location="device")
tensor = make(60 * MIB, "managed")
egm_alloc.prefetch(tensor, "host")
assert _C.host_bookings()["promised_bytes"] == 60 * MIB
sim.touch(tensor.data_ptr(), tensor.nbytes, by=0)
wait_for(lambda: _C.host_bookings()["promised_bytes"] == 0)
"""
    run_script(CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(root)})


@pytest.mark.parametrize("call", ["cudaMemAdvise", "cudaMemPrefetchAsync"])
def test_memory_that_the_driver_does_not_send_to_the_host_is_no_promise(
    root: Path, call: str
) -> None:
    script = f"""
from tests.simulator import sim
egm_alloc.enable(preferred_location="device")
tensor = make(60 * MIB, "managed")
with sim.fail_call({call!r}, error="cudaErrorUnknown"), pytest.raises(RuntimeError):
    if {call!r} == "cudaMemAdvise":
        egm_alloc.advise(tensor, preferred_location="host")
    else:
        egm_alloc.prefetch(tensor, "host")
bookings = _C.host_bookings()
assert bookings["promised_bytes"] == 0, bookings
make(60 * MIB, "pinned")
"""
    run_script(CARVEOUT + script, env={"EGM_SIM_HOST_ROOT": str(root)})


EIGHT_DEVICES = """
import pathlib
from tests.allocator.ranks import Rank
if __name__ == "__main__":
    root = pathlib.Path({root!r})
    first, second, third = (Rank(root) for _ in range(3))
    assert first.do("take", 40, "managed", 7) == ""
    assert second.do("take", 40, "pinned", 3) == ""  # as far as the files tell, all is free still
    assert first.do("take", 20, "managed", 0) == ""
    assert third.do("bookings")["others_promised_bytes"] == 60 << 20
    refusal = third.do("take", 60, "numa", 5)
    assert "would cut into the reserve" in refusal and "of other processes" in refusal, refusal
    first.kill()
    assert third.do("take", 60, "numa", 5) == ""
    second.kill()
    third.kill()
    print("done")
"""


def test_devices_of_several_processes_share_the_host(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(EIGHT_DEVICES.format(root=str(root)))
    runs = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert "done" in run_script(runs, devices=8).stdout


def test_control_groups_count_who_is_in_them(tmp_path: Path, root: Path, rank: Ranks) -> None:
    group = tmp_path / "group"
    group.mkdir()
    for name, mib in (("max", 100), ("current", 0)):
        (group / f"memory.{name}").write_text(f"{mib * MIB}\n")
    within = host(tmp_path / "within", 1000)
    host(root, 1000)
    (within / "proc/self/mountinfo").write_text(f"1 2 0:3 / {group} rw - cgroup2 none rw\n")
    (within / "dev/shm").rmdir()
    (within / "dev/shm").symlink_to(root / "dev/shm")
    outside, first, second = rank(root), rank(within), rank(within)
    assert outside.do("take", 800) == ""
    assert first.do("take", 60) == ""
    refusal = second.do("take", 60)
    assert "limited by cgroup limit of / (memory.max)" in refusal
    assert "0.06 GiB to managed memory" in refusal
    assert "limited by MemAvailable" in outside.do("take", 150)  # beside 60
    assert outside.do("take", 140) == ""


def test_without_the_shared_file_each_process_is_for_itself(root: Path, rank: Ranks) -> None:
    (root / "dev/shm").rmdir()
    first, second = rank(), rank()
    assert first.do("take", 60) == ""
    assert first.do("take", 60) != ""
    assert second.do("take", 60) == ""
    assert "cannot be opened: No such file" in second.do("bookings")["problem"]


def test_managed_memory_that_hbm_holds_touches_no_shared_file(root: Path, rank: Ranks) -> None:
    alone = rank()
    alone.do("configure", preferred_location="device")
    assert alone.do("take", 60) == ""
    alone.do("free")
    assert not (root / TABLE).exists()
    alone.do("configure", preferred_location="host")
    assert alone.do("take", 60) == ""
    assert (root / TABLE).exists()
