"""Out of memory: retried, then torch's own error with both tiers in it, and nothing changed."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import GIB, MIB, Background, block, diversion_underway, tier
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated

# From 2.13 on, torch asks for a segment once more by itself.
RETRIES_ITSELF = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def num_ooms() -> int:
    return int(torch.cuda.memory_stats()["num_ooms"])


def test_failed_managed_allocation_raises_torchs_error_with_both_tiers() -> None:
    egm_alloc.enable(threshold_gib=1)
    small = block(8 * MIB)
    egm_alloc.reset_peak_stats()
    before = egm_alloc.stats()
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            block(3 * GIB)
    message = str(caught.value)
    assert "device tier" in message
    assert "extended tier" in message
    assert "cudaErrorMemoryAllocation" in message
    assert "3.00 GiB" in message
    after = egm_alloc.stats()
    assert after.extended == before.extended
    assert after.device_tier.allocated_bytes == before.device_tier.allocated_bytes
    assert tier(block(3 * GIB)) == "extended"
    assert small.numel() == 8 * MIB


def test_other_failures_keep_their_cuda_error_name() -> None:
    egm_alloc.enable(threshold_gib=1)
    with sim.fail_call("cudaMallocManaged", error="cudaErrorNotSupported", times=-1):
        with pytest.raises(torch.cuda.OutOfMemoryError, match="cudaErrorNotSupported"):
            block(3 * GIB)
    assert tier(block(3 * GIB)) == "extended"


def test_one_failure_is_retried_in_a_fresh_pool() -> None:
    egm_alloc.enable(threshold_gib=1)
    cached = block(2 * GIB)
    del cached
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    before = num_ooms()
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=1):
        tensor = block(4 * GIB)
    assert tier(tensor) == "extended"
    if not RETRIES_ITSELF:
        assert egm_alloc.stats().extended["managed"].segments == 1  # the cached one was given back
    assert (announced, num_ooms()) == ([], before)  # the user has seen no failure
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(5 * GIB)
    assert (len(announced), num_ooms()) == (1, before + 1)
    torch.cuda.reset_accumulated_memory_stats()
    assert num_ooms() == 0


def test_limit_refuses_before_torch_is_asked() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    before = num_ooms() if torch.cuda.is_initialized() else 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"limit of 4\.00 GiB") as caught:
        block(5 * GIB)
    message = str(caught.value)
    assert message.startswith("CUDA out of memory. ")
    for part in ("limit_gib", "device tier", "extended tier"):
        assert part in message
    assert num_ooms() == before
    assert egm_alloc.stats().extended["managed"].limit_refusals >= 1


def test_limit_counts_live_memory_and_frees_cached_memory_for_it() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    live, cached = block(2 * GIB), block(2 * GIB)
    del cached
    with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
        block(3 * GIB)
    replaced = block(1 * GIB)
    assert egm_alloc.stats().extended["managed"].reserved_bytes == 3 * GIB
    egm_alloc.enable(limit_gib=None)
    assert tier(block(3 * GIB)) == "extended"
    assert live.numel() + replaced.numel() == 3 * GIB


def test_hbm_request_gets_memory_cached_by_extended_device_segments() -> None:
    egm_alloc.enable(threshold_gib=4, backing="device")
    hbm = torch.cuda.get_device_properties(0).total_memory
    cached = block(hbm - 2 * GIB)
    assert egm_alloc.info(cached).backing == "device"
    del cached
    fits_only_without_it = block(3 * GIB)
    assert tier(fits_only_without_it) == "device"
    assert egm_alloc.info(fits_only_without_it).backing is None


def test_hbm_request_beside_a_diversion_may_use_the_cache() -> None:
    # Up to torch 2.12 a recording on any thread keeps torch from freeing its cache and trying
    # again: a spurious OutOfMemoryError in a thread that diverts nothing.
    hbm = torch.cuda.get_device_properties(0).total_memory
    pieces = [block(512 * MIB) for _ in range(hbm // (512 * MIB) - 2)]
    del pieces  # nearly all of HBM is cached, in pieces too small for the request below
    egm_alloc.enable(threshold_gib=3)
    with diversion_underway(sim) as diverting:
        small = Background(lambda: block(2 * GIB))
        small.join(0.5)
    diverting.finish()
    tensor = small.finish()
    assert isinstance(tensor, torch.Tensor)
    assert tier(tensor) == "device"


@pytest.mark.parametrize("diverted", [False, True])
def test_genuine_out_of_memory_in_hbm_is_torchs_own(diverted: bool) -> None:
    egm_alloc.enable(threshold_gib=1)
    if diverted:
        block(GIB)
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)
    hbm = torch.cuda.get_device_properties(0).total_memory
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    before = num_ooms()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block(2 * hbm)
    assert (len(announced), num_ooms()) == (1, before + 1)


@pytest.mark.parametrize("threshold_gib", [1, (1 << 33) - 1])
@pytest.mark.parametrize("spill", [False, True])
def test_more_than_torch_takes_for_a_size_counts_as_without_egm_alloc(
    threshold_gib: int, spill: bool
) -> None:
    egm_alloc.enable(threshold_gib=1, spill=False)
    block(GIB)
    egm_alloc.enable(threshold_gib=threshold_gib, spill=spill)
    before = num_ooms()
    for nbytes in (1 << 60, 1 << 62):
        with pytest.raises(torch.cuda.OutOfMemoryError, match="more than 1EB"):
            block(nbytes)
    assert num_ooms() == before  # torch counts none
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block(2 * torch.cuda.get_device_properties(0).total_memory)
    assert num_ooms() == before + 1


def test_observer_that_allocates_does_not_deadlock_and_stays_in_hbm() -> None:
    egm_alloc.enable(threshold_gib=1)
    seen: list[tuple[str | None, str | None]] = []
    active = True

    def observer(device: int, alloc: int, allocated: int, free: int) -> None:
        if active:
            seen.append((tier(block(1024)), tier(block(2 * GIB))))
            torch.cuda.empty_cache()

    torch._C._cuda_attach_out_of_memory_observer(observer)  # type: ignore[attr-defined]
    try:
        with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                Background(lambda: block(3 * GIB)).finish()
    finally:
        active = False  # an observer cannot be detached
    assert seen
    assert set(seen) == {("device", "device")}
    assert tier(block(3 * GIB)) == "extended"


@pytest.mark.parametrize("call", ["cudaMemAdvise", "cudaMemPrefetchAsync"])
def test_failed_hint_warns_once_counts_and_returns_the_memory(call: str) -> None:
    egm_alloc.enable(mode="managed")
    with sim.fail_call(call, error="cudaErrorInvalidDevice", times=1000):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tensors = [block(64 * MIB), block(96 * MIB)]
    stats = egm_alloc.stats().extended["managed"]
    assert all(tier(tensor) == "extended" for tensor in tensors)
    failures = stats.advice_failures if call == "cudaMemAdvise" else stats.prefetch_failures
    assert failures >= 2
    ours = [w for w in caught if call in str(w.message)]
    assert len(ours) <= 1  # once per process: an earlier test may have used it up
    for warning in ours:
        assert "cudaErrorInvalidDevice" in str(warning.message)


# Each kind of warning comes once per process, hence one of its own.
HINT_WARNING_AS_ERROR = """
import warnings
import torch, egm_alloc
from tests.allocator.conftest import MIB, block
from tests.simulator import sim
egm_alloc.enable(mode="managed")
if {first}:
    block(MIB)  # the next request finds the recording open
warnings.simplefilter("error")
before = egm_alloc.stats().extended["managed"]
with sim.fail_call("{call}", error="cudaErrorInvalidDevice", times=-1):
    try:
        block(64 * MIB)
    except UserWarning as warning:
        assert "{call} failed with cudaErrorInvalidDevice" in str(warning), warning
    else:
        raise AssertionError("no warning")
after = egm_alloc.stats().extended["managed"]
assert after.allocated_bytes == before.allocated_bytes == torch.cuda.memory_allocated()
assert (after.allocations, after.frees) == (before.allocations + 1, before.frees + 1)
again = block(64 * MIB)
assert egm_alloc.stats().extended["managed"].segment_allocs == after.segment_allocs
assert egm_alloc.info(again).tier == "extended"
print("done")
"""


@pytest.mark.parametrize("call", ["cudaMemAdvise", "cudaMemPrefetchAsync"])
@pytest.mark.parametrize("first", [False, True], ids=["first request", "later request"])
def test_memory_that_is_given_up_for_a_warning_is_not_lost(call: str, first: bool) -> None:
    script = HINT_WARNING_AS_ERROR.format(call=call, first=first)
    assert "done" in run_script(script).stdout


def test_every_cuda_call_of_a_diversion_may_fail_without_a_leak() -> None:
    egm_alloc.enable(mode="managed")

    def scenario() -> None:
        tensor = block(64 * MIB)
        del tensor
        torch.cuda.empty_cache()

    scenario()
    with sim.call_log() as log:
        scenario()
    names = {call.name for call in log} & {
        "cudaMallocManaged",
        "cudaMemAdvise",
        "cudaMemPrefetchAsync",
        "cudaStreamCreateWithFlags",
        "cudaThreadExchangeStreamCaptureMode",
    }
    assert {"cudaMallocManaged", "cudaMemAdvise", "cudaMemPrefetchAsync"} <= names
    for name in sorted(names):
        for nth in range(1, 4):
            with sim.fail_call(name, error="cudaErrorUnknown", nth=nth, times=1):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with contextlib.suppress(torch.cuda.OutOfMemoryError):
                        scenario()
            torch.cuda.empty_cache()
            assert egm_alloc.stats().extended["managed"].segments == 0, (name, nth)
            assert not sim.live_allocations(0).get("managed"), (name, nth)
        scenario()


def test_request_that_fits_once_cached_memory_is_given_back_is_no_out_of_memory() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    cached_elsewhere = block(MIB, device=1)
    del cached_elsewhere
    reserved_elsewhere = torch.cuda.memory_reserved(1)
    before = num_ooms()
    refusals = egm_alloc.stats().extended["managed"].limit_refusals
    for nbytes in (3 * GIB, 2 * GIB, 2 * GIB, 4 * GIB, 4 * GIB):
        tensor = block(nbytes)
        assert tier(tensor) == "extended"
        del tensor
    assert num_ooms() == before
    assert egm_alloc.stats().extended["managed"].limit_refusals == refusals
    assert torch.cuda.memory_reserved(1) == reserved_elsewhere


def test_cached_block_serves_at_the_limit() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    before = egm_alloc.stats().extended["managed"].segment_allocs
    for _ in range(3):
        block(3 * GIB)
    assert egm_alloc.stats().extended["managed"].segment_allocs - before == 1


def test_block_cached_for_another_stream_makes_room_at_the_limit() -> None:
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    before = egm_alloc.stats().extended["managed"].limit_refusals
    with torch.cuda.stream(torch.cuda.Stream()):
        block(3 * GIB)
    assert tier(block(3 * GIB)) == "extended"
    assert egm_alloc.stats().extended["managed"].limit_refusals == before


def test_cached_memory_makes_room_at_the_limit_beside_a_users_pool() -> None:
    # Up to torch 2.12 emptying a single pool asserts while any pool is recorded to.
    egm_alloc.enable(threshold_gib=1, limit_gib=4)
    block(3 * GIB)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        beside = Background(lambda: block(4 * GIB)).finish()
    assert isinstance(beside, torch.Tensor)
    assert tier(beside) == "extended"
    del pool


def test_extended_device_request_gets_memory_cached_by_the_device_tier() -> None:
    egm_alloc.enable(threshold_gib=3, backing="device")
    hbm = torch.cuda.get_device_properties(0).total_memory
    pieces = [block(512 * MIB) for _ in range(hbm // (512 * MIB) - 2)]
    del pieces
    assert egm_alloc.info(block(3 * GIB)).backing == "device"


# The last try calls observers under the gate. A thread that waited for its own would never end.
OBSERVER_THAT_NEEDS_THE_GATE = """
import torch, egm_alloc
from tests.simulator import sim
egm_alloc.enable(threshold_gib=1)
other, pool = torch.cuda.Stream(), torch.cuda.MemPool()
small = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
inside = []

def observer(*figures):
    small.record_stream(other)
    with torch.cuda.use_mem_pool(pool):
        inside.append(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))

torch._C._cuda_attach_out_of_memory_observer(observer)
with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
    try:
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        assert len(inside) == 1
assert len(pool.snapshot()) == 1
tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).tier == "extended"
"""


def test_observer_that_records_a_stream_and_uses_a_pool_does_not_deadlock() -> None:
    run_script(OBSERVER_THAT_NEEDS_THE_GATE, timeout=60)
