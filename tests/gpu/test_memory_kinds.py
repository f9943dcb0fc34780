"""Kinds of memory on a real GPU: products, moves, spilling, the reserve.

What every backing promises is in ``test_backings.py``.
"""

from __future__ import annotations

import warnings
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
def test_matrix_product_is_bit_equal_to_hbm(kind: str, budget: Budget) -> None:
    budget(GIB)
    torch.manual_seed(0)
    plain = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = plain[0] @ plain[1]  # and cuBLAS has its workspace, which is no part of the block
    with egm_alloc.place(kind):
        a, b = (matrix.clone() for matrix in plain)
        product = a @ b
    assert egm_alloc.info(product).backing == kind
    assert torch.equal(product, expected)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once in a process, perhaps before
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
