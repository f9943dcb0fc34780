"""Which requests leave the device tier, and that torch's own figures keep counting them."""

from __future__ import annotations

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import GIB, MIB, block, managed_segments, tier
from tests.simulator import sim

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(2 * GIB - 512, "device"), (2 * GIB, "extended"), (3 * GIB, "extended")],
)
def test_default_threshold_separates_the_tiers(nbytes: int, expected: str) -> None:
    egm_alloc.enable()
    tensor = block(nbytes)
    assert tier(tensor) == expected


def test_segment_below_threshold_makes_no_managed_call() -> None:
    egm_alloc.enable(threshold_gib=1)
    with sim.call_log() as log:
        tensor = block(512 * MIB)
    assert tier(tensor) == "device"
    assert not [call for call in log if call.name == "cudaMallocManaged"]


def test_cached_segment_is_reused_without_a_driver_call() -> None:
    egm_alloc.enable(threshold_gib=1)
    first = block(2 * GIB)
    address = first.data_ptr()
    del first
    with sim.call_log() as log:
        second = block(2 * GIB)
    assert second.data_ptr() == address
    assert not [call for call in log if "Malloc" in call.name or "Free" in call.name]


def test_small_request_is_not_cut_from_a_much_larger_cached_block() -> None:
    egm_alloc.enable(threshold_gib=1)
    del_me = block(64 * GIB)
    del del_me
    small = block(1 * GIB)
    assert managed_segments() == 2
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended["managed"].reserved_bytes == GIB
    assert tier(small) == "extended"


def test_disable_stops_diverting_and_keeps_live_tensors() -> None:
    egm_alloc.enable(threshold_gib=1)
    extended = block(2 * GIB)
    extended[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    egm_alloc.disable()
    assert not egm_alloc.is_enabled()
    assert tier(block(2 * GIB)) == "device"
    assert tier(extended) == "extended"
    assert extended[:4].tolist() == [1, 2, 3, 4]
    del extended
    torch.cuda.empty_cache()
    assert managed_segments() == 0


def test_enable_again_resumes_with_its_configuration() -> None:
    egm_alloc.enable(threshold_gib=1, preferred_location="host")
    egm_alloc.disable()
    egm_alloc.enable()
    assert egm_alloc.is_enabled()
    assert egm_alloc.get_config().threshold_gib == 1
    assert egm_alloc.info(block(GIB)).preferred_location == "host"


def test_reconfiguring_places_new_tensors_and_leaves_live_ones() -> None:
    egm_alloc.enable(threshold_gib=1, preferred_location="device")
    old = block(GIB)
    cached = block(GIB)
    del cached
    egm_alloc.enable(preferred_location="host")
    new = block(GIB)
    assert egm_alloc.info(old).preferred_location == "device"
    assert egm_alloc.info(new).preferred_location == "host"


def test_managed_mode_puts_everything_in_managed_memory() -> None:
    egm_alloc.enable(mode="managed")
    for nbytes in (1, 512, MIB, 5 * MIB, 3 * GIB):
        assert tier(block(nbytes)) == "extended", nbytes
    assert torch.empty(0, device="cuda").numel() == 0


def test_device_backing_takes_plain_device_memory() -> None:
    egm_alloc.enable(threshold_gib=1, backing="device")
    # Once any test has recorded a stream, a diversion asks torch for a few bytes of HBM: they take
    # no segment beside this block.
    small = block(1)
    with sim.call_log() as log:
        tensor = block(GIB)
    assert egm_alloc.info(tensor).backing == "device"
    assert small.numel() == 1
    assert [call.name for call in log if "Malloc" in call.name] == ["cudaMalloc"]


def test_only_the_chosen_device_is_acted_on() -> None:
    egm_alloc.enable(threshold_gib=1, device=1)
    with torch.cuda.device(0):
        assert tier(block(GIB, 0)) == "device"
        assert tier(block(GIB, 1)) == "extended"
        assert torch.cuda.current_device() == 0
    assert (
        egm_alloc.stats(0).extended["managed"].allocations
        == egm_alloc.stats(0).extended["managed"].frees
    )


def test_raw_allocations_are_diverted_too() -> None:
    egm_alloc.enable(threshold_gib=1)
    stream = torch.cuda.current_stream()
    address = torch.cuda.caching_allocator_alloc(2 * GIB, 0, stream)
    try:
        assert managed_segments() == 1
    finally:
        torch.cuda.caching_allocator_delete(address)


def test_torch_memory_stats_count_both_tiers() -> None:
    egm_alloc.enable(threshold_gib=1)
    before = torch.cuda.memory_stats()
    tensors = [block(GIB), block(MIB)]
    after = torch.cuda.memory_stats()
    allocated = "allocated_bytes.all.current"
    assert after[allocated] - before.get(allocated, 0) == GIB + MIB
    assert torch.cuda.max_memory_allocated() >= GIB
    stats = egm_alloc.stats()
    assert stats.extended["managed"].allocated_bytes == GIB
    assert stats.device_tier.allocated_bytes >= MIB
    assert len(tensors) == 2


def test_stats_count_requests_segments_and_peaks() -> None:
    egm_alloc.enable(threshold_gib=1)
    egm_alloc.reset_peak_stats()
    start = egm_alloc.stats().extended["managed"]
    tensor = block(2 * GIB)
    del tensor
    tensor = block(2 * GIB)
    now = egm_alloc.stats().extended["managed"]
    assert now.allocations - start.allocations == 2
    assert now.frees - start.frees == 1
    assert now.segment_allocs - start.segment_allocs == 1
    assert (now.allocated_bytes, now.reserved_bytes) == (2 * GIB, 2 * GIB)
    del tensor
    torch.cuda.empty_cache()
    after = egm_alloc.stats().extended["managed"]
    assert after.segment_frees - start.segment_frees == 1
    assert after.reserved_peak_bytes == 2 * GIB
    egm_alloc.reset_peak_stats()
    assert egm_alloc.stats().extended["managed"].reserved_peak_bytes == 0


def test_snapshot_and_history_show_extended_segments() -> None:
    egm_alloc.enable(threshold_gib=1)
    torch.cuda.memory._record_memory_history()
    try:
        tensor = block(2 * GIB)
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    (segment,) = [s for s in snapshot["segments"] if s["address"] == tensor.data_ptr()]
    assert segment["total_size"] == 2 * GIB
    actions = [t["action"] for t in snapshot["device_traces"][0] if t["size"] == 2 * GIB]
    assert "segment_alloc" in actions
    assert "alloc" in actions


def test_accelerator_interface_sees_the_same_allocator() -> None:
    egm_alloc.enable(threshold_gib=1)
    before = torch.accelerator.memory_allocated()
    tensor = block(GIB)
    assert torch.accelerator.memory_allocated() - before == GIB
    del tensor
    torch.accelerator.empty_cache()
    assert managed_segments() == 0


def test_resize_of_an_extended_storage_stays_with_its_allocator() -> None:
    egm_alloc.enable(threshold_gib=1)
    tensor = block(GIB)
    tensor.untyped_storage().resize_(2 * GIB)
    assert tier(tensor) == "extended"


def test_module_moved_to_the_device_lands_by_size() -> None:
    egm_alloc.enable(threshold_gib=0.01)
    module = torch.nn.Embedding(1 << 16, 64).to("cuda")
    linear = torch.nn.Linear(16, 16).to("cuda")
    assert tier(module.weight) == "extended"
    assert tier(linear.weight) == "device"
