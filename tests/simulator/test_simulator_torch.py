"""PyTorch on the simulated device: tensors, allocator, training."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from tests.simulator import Completed, Simulator

GIB = 1 << 30
MIB = 1 << 20

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _empty_cache(simulator: Simulator) -> None:
    gc.collect()
    torch.cuda.empty_cache()


def test_copies_move_the_bytes() -> None:
    source = torch.arange(1000, dtype=torch.float32)
    there = source.cuda()
    assert torch.equal(there.cpu(), source)
    assert torch.equal(there.to("cuda:1").cpu(), source)
    assert there[7].item() == 7


def test_kernels_do_nothing() -> None:
    ones = torch.ones(8).cuda()
    assert (ones + ones).shape == (8,)
    ones.mul_(3)
    assert ones.sum().shape == ()
    assert torch.equal(ones.cpu(), torch.ones(8))


def test_two_devices_have_memory_of_their_own(simulator: Simulator) -> None:
    before = simulator.hbm(1)["taken"]
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:1")
    assert simulator.hbm(1)["taken"] == before + 64 * MIB
    assert tensor.device.index == 1
    assert torch.cuda.device_count() == simulator.devices == 2


def test_out_of_memory_at_the_size_of_hbm(simulator: Simulator) -> None:
    simulator.set_hbm_gib(1)
    most = torch.empty(900 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match=r"total capacity of 1\.00 GiB|1024\.00 MiB"):
        torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
    del most
    torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")


def test_hundred_gib_fit_into_a_large_hbm_at_no_cost(simulator: Simulator) -> None:
    simulator.set_hbm_gib(141)
    tensor = torch.empty(100 * GIB, dtype=torch.uint8, device="cuda")
    assert tensor.numel() == 100 * GIB


def test_mem_get_info_agrees_with_the_books(simulator: Simulator) -> None:
    tensor = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    books = simulator.hbm()
    assert (free, total) == (books["capacity"] - books["taken"], books["capacity"])
    assert tensor.is_cuda


def test_empty_cache_leaves_nothing(simulator: Simulator) -> None:
    before = simulator.live_allocations()
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert simulator.live_allocations()["device"].bytes >= 64 * MIB
    del tensor
    torch.cuda.empty_cache()
    assert simulator.live_allocations() == before


def test_memory_stats_and_snapshot_work() -> None:
    tensor = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] >= tensor.nbytes
    assert any(segment["total_size"] >= 32 * MIB for segment in torch.cuda.memory_snapshot())


def test_mem_pool_keeps_its_segments_apart() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    assert [segment["total_size"] for segment in pool.snapshot()] == [32 * MIB]
    del tensor


def test_pinned_memory_is_host_memory() -> None:
    pinned = torch.empty(1000, pin_memory=True)
    assert pinned.is_pinned()
    assert not torch.empty(1000).is_pinned()


def test_transformer_training_step_runs() -> None:
    layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).cuda()
    head = torch.nn.Linear(64, 100).cuda().bfloat16()
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()])
    for _ in range(2):
        hidden = layer(torch.randn(2, 16, 64, device="cuda"))
        logits = head(hidden.bfloat16())
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), torch.zeros(32, dtype=torch.long, device="cuda")
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_backward_run(dtype: torch.dtype) -> None:
    query = torch.randn(2, 4, 128, 64, device="cuda", dtype=dtype, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert query.grad is not None


def test_plain_device_memory_has_an_ipc_handle(own_process: Callable[..., Completed]) -> None:
    # In a process of its own, because what is lent and never fetched stays.
    done = own_process(
        """
        import torch
        from torch.multiprocessing import reductions
        print(len(reductions.reduce_tensor(torch.ones(10, device="cuda"))))
        """
    )
    assert done.stdout == "2\n"
