"""Extended memory on a real GPU: contents, residency, streams, graphs, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import egm_alloc
from tests.gpu.conftest import GIB, MIB, run_process

pytestmark = pytest.mark.gpu

Budget = Callable[[int], None]


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def test_contents_survive_kernels_copies_and_reuse(budget: Budget) -> None:
    budget(2 * GIB)
    for _ in range(3):
        tensor = torch.arange(256 * MIB // 4, dtype=torch.int32, device="cuda")
        assert egm_alloc.info(tensor).tier == "extended"
        assert torch.equal(tensor.cpu(), torch.arange(256 * MIB // 4, dtype=torch.int32))
        doubled = tensor * 2
        assert int(doubled[-1]) == 2 * (256 * MIB // 4 - 1)
        del tensor, doubled


def test_matrix_product_is_bit_equal_to_hbm(budget: Budget) -> None:
    budget(2 * GIB)
    torch.manual_seed(0)
    a = torch.randn(8192, 8192, device="cuda")
    b = torch.randn(8192, 8192, device="cuda")
    assert egm_alloc.info(a).tier == egm_alloc.info(b).tier == "extended"
    extended = a @ b
    egm_alloc.disable()
    hbm_a, hbm_b = a.clone(), b.clone()
    assert egm_alloc.info(hbm_a).tier == "device"
    assert torch.equal(extended, hbm_a @ hbm_b)


def test_touched_memory_is_in_hbm_by_the_drivers_account(budget: Budget) -> None:
    budget(1 * GIB)
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    tensor = block(GIB)
    lazy, _ = torch.cuda.mem_get_info()
    assert before - lazy < 64 * MIB  # populated by the first touch
    tensor.fill_(1)
    torch.cuda.synchronize()
    touched, _ = torch.cuda.mem_get_info()
    assert before - touched >= GIB
    found = egm_alloc.residency(tensor)
    assert found.memory_type == "managed"
    assert found.host_bytes == 0


def test_host_preferred_memory_is_on_the_host_and_readable(budget: Budget) -> None:
    budget(1 * GIB)
    egm_alloc.enable(preferred_location="host", accessed_by=("device", "host"))
    tensor = block(512 * MIB)
    tensor.fill_(3)
    torch.cuda.synchronize()
    assert egm_alloc.residency(tensor).host_bytes == 512 * MIB
    assert int(tensor.sum(dtype=torch.int64)) == 3 * 512 * MIB


def test_prefetched_managed_memory_is_in_hbm_untouched(budget: Budget) -> None:
    budget(1 * GIB)
    egm_alloc.enable(mode="managed", threshold_gib=1)
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    tensor = block(512 * MIB)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert before - after >= 512 * MIB
    assert egm_alloc.info(tensor).prefetched


def test_recorded_stream_keeps_the_block(budget: Budget) -> None:
    budget(1 * GIB)
    side = torch.cuda.Stream()
    source = block(256 * MIB)
    source.fill_(5)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        copied = source.clone()
    source.record_stream(side)
    address = source.data_ptr()
    del source
    other = block(256 * MIB)
    assert other.data_ptr() != address
    other.fill_(9)
    torch.cuda.synchronize()
    assert bool((copied == 5).all())


def test_graph_keeps_its_large_tensors_in_hbm_beside_a_diverting_thread(budget: Budget) -> None:
    budget(2 * GIB)
    outside = block(512 * MIB)
    static = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    found: list[str | None] = []

    def divert() -> None:
        nonlocal outside
        del outside
        torch.cuda.empty_cache()
        found.append(egm_alloc.info(block(768 * MIB)).tier)

    with torch.cuda.graph(graph):
        static.add_(1)
        thread = threading.Thread(target=divert)
        thread.start()
        thread.join()
        inside = block(512 * MIB)
        static.add_(1)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert static.tolist() == [6.0] * 1024
    assert found == ["extended"]
    assert egm_alloc.info(inside).tier == "device"


@pytest.mark.filterwarnings("default")  # torch's compiler warns about its own deprecations
def test_compiled_model_with_cudagraphs_gives_the_same_result(budget: Budget) -> None:
    budget(2 * GIB)
    torch.manual_seed(0)
    table = torch.nn.Embedding(1 << 17, 1024).cuda()
    assert egm_alloc.info(table.weight).tier == "extended"
    head = torch.nn.Linear(1024, 64).cuda()
    tokens = torch.randint(0, 1 << 17, (8, 128), device="cuda")

    def forward(indices: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = head(table(indices)).relu().sum(-1)
        return scores

    compiled = torch.compile(forward, mode="reduce-overhead")
    with torch.no_grad():
        expected = forward(tokens)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(tokens).clone()
        torch.testing.assert_close(got, expected)
        kept = block(512 * MIB)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(tokens).clone(), expected)
    assert egm_alloc.info(kept).tier == "extended"


def test_limit_is_torchs_out_of_memory_error(budget: Budget) -> None:
    budget(1 * GIB)
    egm_alloc.enable(limit_gib=0.5)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
        block(GIB)
    assert egm_alloc.info(block(512 * MIB)).tier == "extended"


def test_extended_tensor_is_not_shared_between_processes(budget: Budget) -> None:
    budget(1 * GIB)
    from torch.multiprocessing import reductions

    with pytest.raises(RuntimeError, match="managed memory cannot be shared"):
        reductions.reduce_tensor(block(512 * MIB))


def test_pair_pool_on_the_device(budget: Budget) -> None:
    budget(1 * GIB)
    pool = egm_alloc.mem_pool()
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.ones(64 * MIB // 4, device="cuda")
    assert egm_alloc.info(tensor).owner == "pair"
    assert float(tensor.sum()) == 64 * MIB // 4
    del tensor, pool


def test_pair_as_torchs_whole_allocator() -> None:
    run_process(
        """
import torch, egm_alloc
torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
tensor = torch.ones(1 << 24, device="cuda")
assert egm_alloc.info(tensor).owner == "pair"
assert float(tensor.sum()) == 1 << 24
del tensor
""",
        EGM_ALLOC_AUTO_ENABLE="0",
    )


def test_fork_after_import_and_before_cuda() -> None:
    run_process(
        """
import os, warnings
warnings.simplefilter("ignore")
import torch, egm_alloc
assert egm_alloc.is_enabled() and not torch.cuda.is_initialized()
child = os.fork()
tensor = torch.ones(1 << 28, device="cuda", dtype=torch.uint8)
egm_alloc.enable(threshold_gib=0.25)
large = torch.ones(1 << 29, device="cuda", dtype=torch.uint8)
assert egm_alloc.info(large).tier == "extended"
assert int(large.sum()) == 1 << 29
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


def test_expandable_segments_beside_the_extended_tier() -> None:
    run_process(
        """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=0.25)
small = torch.ones(1 << 24, device="cuda")
large = torch.ones(1 << 27, device="cuda")
assert egm_alloc.info(small).tier == "device" and egm_alloc.info(large).tier == "extended"
assert float(small.sum()) == 1 << 24 and float(large.sum()) == 1 << 27
""",
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )
