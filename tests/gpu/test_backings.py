"""Every backing under real kernels, in small sizes.

What backings promise on any device is in ``tests/backings/test_conformance.py``.
"""

from __future__ import annotations

import random
import threading

import pytest
import torch

import egm_alloc
from egm_alloc.config import BACKINGS
from tests.backings.conftest import has_host_numa, make, pattern, skip_what_the_gpu_lacks
from tests.gpu.conftest import MIB, run_process

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_placed() -> None:
    """Nothing is extended but what a test places, and nothing is spilled."""
    egm_alloc.enable(threshold_gib=1 << 20, spill=False)


def test_kernels_read_and_write_all_of_it(backing: str) -> None:
    numbers = 64 * MIB // 4
    with egm_alloc.place(backing):
        tensor = torch.arange(numbers, dtype=torch.int32, device="cuda")
        doubled = tensor * 2
    assert egm_alloc.info(doubled).backing == backing
    assert torch.equal(doubled.cpu(), torch.arange(numbers, dtype=torch.int32) * 2)
    assert int(tensor.sum(dtype=torch.int64)) == numbers * (numbers - 1) // 2


def test_contents_survive_reuse_of_their_neighbours(backing: str) -> None:
    kept = make(33 * MIB, backing)
    kept.fill_(7)
    for value in range(3):
        tensor = make(33 * MIB, backing)
        tensor.fill_(value)
        assert bool((tensor == value).all())
        del tensor
    assert bool((kept == 7).all())


def test_release_waits_for_the_last_kernels_of_its_stream(backing: str) -> None:
    # Unmapped under a running kernel, the memory would end the context by a fault.
    stream = torch.cuda.Stream()
    result = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor = make(64 * MIB, backing)
        tensor.fill_(3)
        torch.cuda._sleep(200_000_000)
        result.add_(tensor.sum(dtype=torch.int64))
        del tensor
        torch.cuda.empty_cache()
    assert egm_alloc.stats().extended[backing].segments == 0
    torch.cuda.synchronize()
    assert int(result) == 3 * 64 * MIB


def test_recorded_stream_keeps_the_block(backing: str) -> None:
    side = torch.cuda.Stream()
    source = make(33 * MIB, backing)
    source.fill_(5)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        copied = source.clone()
    source.record_stream(side)
    del source
    make(33 * MIB, backing).fill_(9)
    torch.cuda.synchronize()
    assert bool((copied == 5).all())


def test_capture_survives_releases_and_bring_ups_in_another_thread(backing: str) -> None:
    outside = [make(33 * MIB, backing)]
    static = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    found: list[bool] = []

    def release_and_make() -> None:
        outside.clear()
        torch.cuda.empty_cache()
        found.append(make(40 * MIB, backing).numel() == 40 * MIB)

    with torch.cuda.graph(graph):
        static.add_(1)
        thread = threading.Thread(target=release_and_make)
        thread.start()
        thread.join()
        static.add_(1)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert static.tolist() == [6.0] * 1024
    assert found == [True]


def test_graph_reads_and_writes_memory_made_before_it(backing: str) -> None:
    with egm_alloc.place(backing):
        static = torch.zeros(8 * MIB, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.add_(1)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bool((static == 3).all())


def test_threads_share_no_memory(backing: str) -> None:
    problems: list[object] = []

    def churn(seed: int) -> None:
        try:
            choose = random.Random(seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(50):
                    value = (50 * seed + step) % 251
                    tensor = make(choose.choice([1, 4095, MIB, 3 * MIB + 1, 12 * MIB]), backing)
                    tensor.fill_(value)
                    if not bool((tensor == value).all()):
                        problems.append((seed, step))
        except Exception as error:  # told by the thread that waits
            problems.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize("backing", ["pinned", "numa"])
def test_host_memory_takes_no_hbm(backing: str) -> None:
    skip_what_the_gpu_lacks(backing)
    make(2 * MIB, backing).fill_(1)  # what comes up once, such as kernels
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    tensor = make(512 * MIB, backing)
    tensor.fill_(1)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 256 * MIB


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_split_takes_its_fraction_of_hbm(fraction: float) -> None:
    if fraction < 1 and not has_host_numa():
        pytest.skip("this driver cannot map memory of a host NUMA node")
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    tensor = make(512 * MIB, "split", fraction=fraction)
    after, _ = torch.cuda.mem_get_info()
    in_hbm = egm_alloc.info(tensor).on_device_bytes
    assert in_hbm is not None
    assert in_hbm == fraction * 512 * MIB
    assert abs(before - after - in_hbm) <= 64 * MIB  # the driver's own tables


def test_matrix_product_over_the_boundary_is_bit_equal_to_hbm() -> None:
    if not has_host_numa():
        pytest.skip("this driver cannot map memory of a host NUMA node")
    torch.manual_seed(0)
    plain = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]
    expected = plain[0] @ plain[1]  # and cuBLAS has its workspace, which is no part of the block
    with egm_alloc.place("split", device_fraction=0.5):
        split = [tensor.clone() for tensor in plain]
        product = split[0] @ split[1]
    for tensor in (*split, product):
        found = egm_alloc.info(tensor)
        assert found.backing == "split"
        assert found.on_device_bytes == 32 * MIB
    assert torch.equal(product, expected)


def test_training_step_with_placed_moments_is_bit_equal_to_hbm() -> None:
    def train(backing: str) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2048, 2048).cuda()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        batch = torch.randn(64, 2048, device="cuda")
        layer(batch)  # cuBLAS makes its workspace, which is no part of the block
        with egm_alloc.place(backing):
            for _ in range(3):
                optimizer.zero_grad()
                layer(batch).square().mean().backward()
                optimizer.step()
        assert egm_alloc.info(optimizer.state[layer.weight]["exp_avg"]).backing == backing
        return layer.weight.detach().cpu()

    assert torch.equal(train("pinned"), train("device"))


# In a process of its own: its share of HBM is made small, not HBM itself.
SPILL = """
import torch, egm_alloc
MIB = 1 << 20
egm_alloc.enable(threshold_gib=1 << 20)
warm = torch.ones(4 * MIB, device="cuda").sum().item()
torch.cuda.empty_cache()
free, total = torch.cuda.mem_get_info()
torch.cuda.set_per_process_memory_fraction(min(1.0, 256 * MIB / total))
kept = torch.full((128 * MIB,), 1, dtype=torch.uint8, device="cuda")
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    spilled = [torch.full((128 * MIB,), value, dtype=torch.uint8, device="cuda")
               for value in (2, 3)]
assert any("could not hold" in str(warning.message) for warning in caught)
kinds = [egm_alloc.info(tensor).backing for tensor in spilled]
assert kinds[-1] == "pinned", kinds
for value, tensor in zip((1, 2, 3), (kept, *spilled)):
    assert int(tensor.sum(dtype=torch.int64)) == value * 128 * MIB
assert torch.cuda.memory_stats()["num_ooms"] == 0
del spilled, tensor, kept
for _ in range(2100):
    torch.ones(MIB, dtype=torch.uint8, device="cuda")
assert egm_alloc.stats().extended["pinned"].segments == 0
"""


def test_request_beyond_the_process_share_of_hbm_is_spilled_and_given_back() -> None:
    run_process(SPILL, EGM_ALLOC_AUTO_ENABLE="0")


@pytest.mark.parametrize("other", BACKINGS)
def test_copies_between_kinds_keep_contents(backing: str, other: str) -> None:
    skip_what_the_gpu_lacks(other)
    source, target = make(33 * MIB, backing), make(33 * MIB, other)
    expected = pattern(33 * MIB, 0)
    in_hbm = expected.cuda()
    source.fill_(9)
    torch.cuda._sleep(20_000_000)
    source.copy_(in_hbm)  # has not happened yet when the next copy is asked for
    target.copy_(source)
    source.fill_(3)  # behind the copy, on the same stream
    assert torch.equal(target.cpu(), expected)
    target[3:1000].copy_(source[5:1002])
    expected[3:1000] = 3
    assert torch.equal(target.cpu(), expected)


def test_copies_between_kinds_are_captured(backing: str) -> None:
    source, target = make(33 * MIB, backing), make(33 * MIB, "pinned")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        target.copy_(source)
    for value in (1, 2):
        source.fill_(value)
        graph.replay()
        assert bool((target == value).all())
    torch.cuda.synchronize()
