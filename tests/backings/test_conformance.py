"""What every backing promises, on the simulated device and on a real GPU alike."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from torch.multiprocessing import reductions

import egm_alloc
from egm_alloc.config import BACKINGS
from tests.allocator.conftest import MIB, Background, block
from tests.backings.conftest import SIZES, busy, counters, held_by_device, make, pattern
from tests.simulator import sim

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("initialised")]


def test_blocks_of_any_size_are_aligned_and_apart(backing: str) -> None:
    tensors = [make(nbytes, backing) for nbytes in SIZES for _ in range(2)]
    taken = sorted((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
    assert [address % 512 for address, _ in taken] == [0] * len(taken)
    for (address, nbytes), (following, _) in itertools.pairwise(taken):
        assert address + nbytes <= following


@pytest.mark.parametrize("nbytes", [1, MIB + 1, 33 * MIB + 7])
def test_contents_survive_copies_and_reuse(backing: str, nbytes: int) -> None:
    kept = make(nbytes, backing)
    kept.copy_(pattern(nbytes, 0))
    for seed in (1, 2):
        tensor = make(nbytes, backing)
        tensor.copy_(pattern(nbytes, seed))
        assert torch.equal(tensor.cpu(), pattern(nbytes, seed))
        beside = block(nbytes)
        beside.copy_(tensor)
        assert torch.equal(beside.cpu(), pattern(nbytes, seed))
        del tensor
    assert torch.equal(kept.cpu(), pattern(nbytes, 0))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_freed_in_any_order_leave_nothing(backing: str, seed: int) -> None:
    before = held_by_device()
    tensors = [make(nbytes, backing) for nbytes in SIZES]
    random.Random(seed).shuffle(tensors)
    while tensors:
        tensors.pop()
    assert counters(backing).allocated_bytes == 0
    torch.cuda.empty_cache()
    assert counters(backing).segments == 0
    assert held_by_device() == before


def test_no_bytes_are_no_request(backing: str) -> None:
    before = counters(backing)
    tensor = make(0, backing)
    assert tensor.numel() == 0
    assert egm_alloc.info(tensor).tier is None
    assert counters(backing) == before


def test_request_beyond_all_memory_is_torchs_error_and_leaves_nothing(backing: str) -> None:
    if backing == "managed" and not sim.active:
        pytest.skip("a GPU that is promised more managed memory than it has may hang")
    before = held_by_device()
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"(131072|65536)\.00 GiB"):
        make(1 << 47, backing)
    assert held_by_device() == before
    assert make(MIB, backing).numel() == MIB


def test_configured_backing_serves_what_reaches_the_threshold(backing: str) -> None:
    egm_alloc.enable(threshold_gib=16 / 1024, backing=backing)
    assert egm_alloc.info(block(33 * MIB)).backing == backing
    assert egm_alloc.info(block(16 * MIB)).backing == backing
    assert egm_alloc.info(block(16 * MIB - 1)).backing is None


def test_freed_size_is_served_again_without_a_new_segment(backing: str) -> None:
    sizes = (1, 5 * MIB + 3, 33 * MIB + 7)
    for nbytes in sizes if backing != "split" else sizes[-1:]:
        address = make(nbytes, backing).data_ptr()
        before = counters(backing)
        again = make(nbytes, backing)
        assert again.data_ptr() == address
        after = counters(backing)
        assert after.segment_allocs == before.segment_allocs
        assert after.allocations == before.allocations + 1


def test_empty_cache_gives_segments_back_and_keeps_live_blocks(backing: str) -> None:
    before = held_by_device()
    live = make(33 * MIB, backing)
    live.copy_(pattern(33 * MIB, 0))
    with_live = held_by_device()
    assert with_live != before
    cached = make(40 * MIB, backing)
    del cached
    assert held_by_device() != with_live
    torch.cuda.empty_cache()
    assert held_by_device() == with_live
    assert torch.equal(live.cpu(), pattern(33 * MIB, 0))
    del live
    torch.cuda.empty_cache()
    assert held_by_device() == before


def test_figures_add_up_over_allocations_frees_and_segments(backing: str) -> None:
    egm_alloc.reset_peak_stats()
    start, torchs = counters(backing), torch.cuda.memory_stats()
    first, second = make(20 * MIB, backing), make(34 * MIB, backing)
    del first
    now = counters(backing)
    assert now.allocations - start.allocations == 2
    assert now.frees - start.frees == 1
    assert now.segments == now.segment_allocs - now.segment_frees == 2
    assert now.allocated_bytes == 34 * MIB
    assert now.reserved_bytes == now.reserved_peak_bytes == (20 + 34) * MIB
    after = torch.cuda.memory_stats()
    for figure, expected in (("allocated", 34 * MIB), ("reserved", 54 * MIB)):
        name = f"{figure}_bytes.all.current"
        assert after[name] - torchs[name] == expected
    stats = egm_alloc.stats()
    assert torch.cuda.memory_reserved() == (
        stats.device_tier.reserved_bytes + stats.extended_tier.reserved_bytes
    )
    assert torch.cuda.memory_allocated() == (
        stats.device_tier.allocated_bytes + stats.extended_tier.allocated_bytes
    )
    del second
    torch.cuda.empty_cache()
    end = counters(backing)
    assert end.allocations - start.allocations == end.frees - start.frees == 2
    assert end.segment_frees - start.segment_frees == 2
    assert (end.segments, end.reserved_bytes, end.reserved_peak_bytes) == (0, 0, 54 * MIB)


def test_limit_counts_and_is_torchs_error(backing: str) -> None:
    egm_alloc.enable(limit_gib=48 / 1024)
    try:
        cached = make(20 * MIB, backing)
        del cached
        before = counters(backing).limit_refusals
        live = make(40 * MIB, backing)  # once the cached segment is given back
        assert counters(backing).limit_refusals == before
        with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
            make(20 * MIB, backing)
        assert counters(backing).limit_refusals > before
        assert counters(backing).reserved_bytes == live.numel()
    finally:
        egm_alloc.enable(limit_gib=None)


def test_block_belongs_to_its_stream(backing: str) -> None:
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        address = make(33 * MIB, backing).data_ptr()
    with torch.cuda.stream(other):
        elsewhere = make(33 * MIB, backing)
    with torch.cuda.stream(one):
        again = make(33 * MIB, backing)
    assert elsewhere.data_ptr() != address
    assert again.data_ptr() == address


def test_recorded_stream_keeps_the_block_until_its_work_is_done(backing: str) -> None:
    side = torch.cuda.Stream()
    tensor = make(33 * MIB, backing)
    address = tensor.data_ptr()
    with busy(side):
        with torch.cuda.stream(side):
            tensor.fill_(1)
        tensor.record_stream(side)
        del tensor
        elsewhere = make(33 * MIB, backing)
        assert elsewhere.data_ptr() != address
    torch.cuda.synchronize()
    assert make(33 * MIB, backing).data_ptr() == address


def test_release_waits_for_the_last_work_of_its_stream(backing: str) -> None:
    stream = torch.cuda.Stream()
    with busy(stream), torch.cuda.stream(stream):
        tensor = make(33 * MIB, backing)
        tensor.fill_(1)
        assert not stream.query()
        del tensor
        torch.cuda.empty_cache()
        assert stream.query()
    assert counters(backing).segments == 0


def churn(backing: str, seed: int) -> None:
    """Allocate, fill, check that nobody else wrote there, free."""
    choose = random.Random(seed)
    live: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for step in range(30):
            nbytes = choose.choice([1, 4095, MIB, 3 * MIB + 1, 12 * MIB])
            expected = pattern(nbytes, 1000 * seed + step)
            tensor = make(nbytes, backing)
            tensor.copy_(expected)
            live.append((tensor, expected))
            if len(live) > 4:
                found, wanted = live.pop(choose.randrange(len(live)))
                assert torch.equal(found.cpu(), wanted)
        for found, wanted in live:
            assert torch.equal(found.cpu(), wanted)


def test_threads_share_no_memory_while_the_cache_is_emptied(backing: str) -> None:
    before = held_by_device()
    threads = [Background(functools.partial(churn, backing, seed)) for seed in range(4)]
    for _ in range(10):
        torch.cuda.empty_cache()
    for thread in threads:
        thread.finish()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert counters(backing).segments == 0
    assert held_by_device() == before


@pytest.mark.parametrize("stream_captures", [False, True], ids=["other stream", "its stream"])
def test_release_beside_a_capture_leaves_the_capture_intact(
    backing: str, stream_captures: bool
) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream if stream_captures else torch.cuda.current_stream()):
        outside = [make(33 * MIB, backing)]
    static = torch.zeros(16, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def release() -> None:
        outside.clear()
        torch.cuda.empty_cache()

    with torch.cuda.graph(graph, stream=stream):
        static.add_(1)
        Background(release).finish()
        static.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert counters(backing).segments == 0
    if not sim.active:  # which runs no kernels
        assert static.tolist() == [2.0] * 16


def test_segment_brought_up_beside_a_capture_leaves_the_capture_intact(backing: str) -> None:
    static = torch.zeros(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.zero_()
        tensor = Background(lambda: make(33 * MIB, backing)).finish()
        static.zero_()
    graph.replay()
    assert isinstance(tensor, torch.Tensor)
    tensor.copy_(pattern(33 * MIB, 0))
    assert torch.equal(tensor.cpu(), pattern(33 * MIB, 0))


def test_memory_is_on_the_tensors_device_and_the_current_one_stays(backing: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    before = held_by_device(1)
    tensor = make(33 * MIB, backing, device=1)
    assert torch.cuda.current_device() == 0
    assert egm_alloc.info(tensor).device == 1
    assert counters(backing, 0).segments == 0
    assert counters(backing, 1).segments == 1
    del tensor
    torch.cuda.empty_cache()
    assert torch.cuda.current_device() == 0
    assert held_by_device(1) == before


@pytest.mark.parametrize("backing", [name for name in BACKINGS if name != "device"])
def test_tensor_is_not_shared_with_other_processes(backing: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{backing} memory cannot be shared"):
        reductions.reduce_tensor(make(33 * MIB, backing))
