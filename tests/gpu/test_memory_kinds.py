"""Every kind of memory under real kernels: contents, streams, captures, moves, spilling."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import egm_alloc
from tests.gpu.conftest import GIB, MIB

pytestmark = pytest.mark.gpu

Budget = Callable[[int], None]
KINDS = ("managed", "device", "pinned", "numa", "split")


def filled(kind: str, nbytes: int) -> torch.Tensor:
    """Return int32 0, 1, 2 ... in one kind of memory, written by a kernel."""
    count = nbytes // 4
    with egm_alloc.place(kind):
        tensor = torch.empty(count, dtype=torch.int32, device="cuda")
    assert egm_alloc.info(tensor).backing == kind
    torch.arange(count, dtype=torch.int32, device="cuda", out=tensor)
    return tensor


def is_whole(tensor: torch.Tensor) -> bool:
    expected = torch.arange(tensor.numel(), dtype=torch.int32, device="cuda")
    return bool(torch.equal(tensor, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_contents_survive_kernels_copies_and_reuse(kind: str, budget: Budget) -> None:
    budget(2 * GIB)
    for nbytes in (MIB, 33 * MIB, 256 * MIB, 33 * MIB):
        tensor = filled(kind, nbytes)
        assert tensor.data_ptr() % 512 == 0
        assert is_whole(tensor)
        assert torch.equal(tensor.cpu(), torch.arange(nbytes // 4, dtype=torch.int32))
        del tensor


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_product_is_bit_equal_to_hbm(kind: str, budget: Budget) -> None:
    budget(GIB)
    torch.manual_seed(0)
    plain = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with egm_alloc.place(kind):
        a, b = (matrix.clone() for matrix in plain)
        product = a @ b
    assert egm_alloc.info(product).backing == kind
    assert torch.equal(product, plain[0] @ plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_release_waits_for_the_last_kernels(kind: str, budget: Budget) -> None:
    budget(GIB)
    result = torch.zeros(64 * MIB // 4, dtype=torch.int32, device="cuda")
    tensor = filled(kind, 64 * MIB)
    torch.cuda._sleep(400_000_000)
    result.copy_(tensor)
    del tensor
    torch.cuda.empty_cache()  # while the copy is still to come
    assert egm_alloc.stats().extended[kind].segments == 0
    assert is_whole(result)


@pytest.mark.parametrize("kind", KINDS)
def test_release_beside_a_capture_leaves_the_graph_whole(kind: str, budget: Budget) -> None:
    budget(GIB)
    static = torch.zeros(1024, device="cuda")
    tensor = filled(kind, 64 * MIB)
    torch.cuda.synchronize()
    held = [tensor]
    del tensor

    def release() -> None:
        held.clear()
        torch.cuda.empty_cache()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.add_(1)
        thread = threading.Thread(target=release)
        thread.start()
        thread.join()
        static.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((static == 2).all())
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended[kind].segments == 0


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_stream_keeps_the_block(kind: str, budget: Budget) -> None:
    budget(GIB)
    side = torch.cuda.Stream()
    source = filled(kind, 64 * MIB)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        copied = source.clone()
    source.record_stream(side)
    del source
    other = filled(kind, 64 * MIB)
    other.zero_()
    torch.cuda.synchronize()
    assert is_whole(copied)


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_make_and_free(kind: str, budget: Budget) -> None:
    budget(2 * GIB)
    wrong: list[object] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), egm_alloc.place(kind):
            for step in range(8):
                tensor = torch.full((2 * MIB,), seed * 100 + step, dtype=torch.int32, device="cuda")
                if not bool((tensor == seed * 100 + step).all()):
                    wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["split", "numa"])
def test_boundary_moves_and_contents_stay(kind: str) -> None:
    tensor = filled(kind, 256 * MIB)
    address = tensor.data_ptr()
    for fraction in (1.0, 0.0, 0.3):
        egm_alloc.migrate(tensor, device_fraction=fraction)
        on_device = egm_alloc.info(tensor).on_device_bytes
        assert on_device is not None
        assert abs(on_device - fraction * 256 * MIB) < 4 * MIB
        assert tensor.data_ptr() == address
        assert is_whole(tensor)


def test_prefetch_and_advice_move_managed_pages(budget: Budget) -> None:
    budget(GIB)
    tensor = filled("managed", 256 * MIB)
    torch.cuda.synchronize()
    assert egm_alloc.residency(tensor).host_bytes == 0
    egm_alloc.prefetch(tensor, "host")
    torch.cuda.synchronize()
    assert egm_alloc.residency(tensor).host_bytes == 256 * MIB
    egm_alloc.prefetch(tensor, "device")
    torch.cuda.synchronize()
    assert egm_alloc.residency(tensor).host_bytes == 0
    egm_alloc.advise(tensor, preferred_location="host", accessed_by=("device", "host"))
    egm_alloc.prefetch(tensor, "host")
    assert is_whole(tensor)
    torch.cuda.synchronize()
    assert egm_alloc.residency(tensor).host_bytes == 256 * MIB  # read over the link, not moved


def test_what_hbm_cannot_hold_is_spilled_and_comes_back() -> None:
    egm_alloc.enable(threshold_gib=512)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - GIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_stats()["num_ooms"]
    pieces = [
        torch.full((64 * MIB,), index, dtype=torch.int32, device="cuda") for index in range(6)
    ]
    backings = [egm_alloc.info(piece).backing for piece in pieces]
    assert "pinned" in backings
    assert all(bool((piece == index).all()) for index, piece in enumerate(pieces))
    assert torch.cuda.memory_stats()["num_ooms"] == before
    del pieces, ballast
    torch.cuda.empty_cache()
    assert egm_alloc.info(torch.empty(GIB, dtype=torch.uint8, device="cuda")).tier == "device"


def test_request_over_the_reserve_is_refused_with_the_host_untouched() -> None:
    egm_alloc.enable(host_reserve_gib=1 << 20)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="reserve"), egm_alloc.place("pinned"):
        torch.empty(GIB, dtype=torch.uint8, device="cuda")
    assert egm_alloc.stats().extended["pinned"].segments == 0
