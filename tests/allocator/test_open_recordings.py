"""Mode "managed": requests that find an open recording land where every other of theirs does."""

from __future__ import annotations

import warnings

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import GIB, MIB, Background, block, diversion_underway, tier
from tests.simulator import sim

pytestmark = pytest.mark.simulated


def prefetched(tensor: torch.Tensor) -> bool:
    return egm_alloc.info(tensor).prefetched


def test_sizes_on_both_sides_of_the_threshold_keep_their_pools() -> None:
    egm_alloc.enable(mode="managed", threshold_gib=16 / 1024)
    for _ in range(2):
        small, large, small_again = block(5 * MIB), block(64 * MIB), block(5 * MIB)
        found = [prefetched(tensor) for tensor in (small, large, small_again)]
        assert found == [True, False, True]


def test_every_request_counts() -> None:
    egm_alloc.enable(mode="managed")
    before = egm_alloc.stats().extended["managed"]
    kept = [block(MIB) for _ in range(5)]
    after = egm_alloc.stats().extended["managed"]
    assert after.allocations - before.allocations == 5
    del kept
    assert egm_alloc.stats().extended["managed"].frees - before.frees == 5


def test_another_device_has_its_own() -> None:
    egm_alloc.enable(mode="managed")
    for _ in range(2):
        first, second = block(MIB, 0), block(MIB, 1)
        assert (tier(first), tier(second)) == ("extended", "extended")
        assert egm_alloc.info(second).device == 1


def test_small_request_beside_a_large_diversion_does_not_share_its_pool() -> None:
    egm_alloc.enable(mode="managed", threshold_gib=1)
    block(MIB)
    with diversion_underway(sim, 2 * GIB) as diverting:
        small = Background(lambda: block(MIB))
        small.join(0.5)
    large = diverting.finish()
    beside = small.finish()
    assert isinstance(large, torch.Tensor)
    assert isinstance(beside, torch.Tensor)
    assert prefetched(beside)
    assert not prefetched(large)


@pytest.mark.parametrize("end", ["disable", "tiered", "record_stream", "user pool", "empty_cache"])
def test_what_ends_the_recording_ends_its_effect(end: str) -> None:
    egm_alloc.enable(mode="managed")
    first = block(MIB)
    pool = torch.cuda.MemPool()
    if end == "disable":
        egm_alloc.disable()
        assert tier(block(MIB)) == "device"
    elif end == "tiered":
        egm_alloc.enable(mode="tiered")
        assert tier(block(MIB)) == "device"
    elif end == "record_stream":
        # On another device than most tests use: from now on it looks for events in each diversion.
        block(MIB, 1).record_stream(torch.cuda.Stream(1))
        assert [tier(block(MIB, 1)), tier(block(MIB))] == ["extended", "extended"]
    elif end == "user pool":
        with torch.cuda.use_mem_pool(pool):
            inside = block(MIB)
        assert tier(inside) == "device"
        assert len(pool.snapshot()) == 1
        del inside
        assert tier(block(MIB)) == "extended"
    else:
        del first
        torch.cuda.empty_cache()
        assert tier(block(MIB)) == "extended"
    del pool


def test_miss_that_fails_is_tried_again_unannounced() -> None:
    egm_alloc.enable(mode="managed")
    block(MIB)
    before = torch.cuda.memory_stats()["num_ooms"]
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=1) as fault:
        tensor = block(256 * MIB)
    assert fault.fired == 1
    assert tier(tensor) == "extended"
    assert torch.cuda.memory_stats()["num_ooms"] == before


def test_failed_hint_of_a_miss_is_counted_and_warned_of() -> None:
    egm_alloc.enable(mode="managed")
    block(MIB)
    before = egm_alloc.stats().extended["managed"].prefetch_failures
    with sim.fail_call("cudaMemPrefetchAsync", error="cudaErrorInvalidDevice", times=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once per process: an earlier test may have had it
            tensor = block(256 * MIB)
    assert tier(tensor) == "extended"
    assert egm_alloc.stats().extended["managed"].prefetch_failures == before + 1


# Not "nothing at all": up to torch 2.12 a diversion after a recorded stream takes 512 bytes there.
def device_reserved() -> int:
    return egm_alloc.stats().device_tier.reserved_bytes


@pytest.mark.parametrize("end", ["empty_cache", "large request"])
def test_request_after_the_recording_has_ended_leaves_the_device_tier_alone(end: str) -> None:
    egm_alloc.enable(mode="managed")
    block(MIB)
    if end == "empty_cache":
        torch.cuda.empty_cache()
    else:
        block(2 * GIB)
    before = device_reserved()
    assert tier(block(64 * MIB)) == "extended"
    assert device_reserved() - before < 64 * MIB
