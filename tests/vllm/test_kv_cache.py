"""The boundary of the KV cache, and where the tensors on both of its sides are."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import egm_alloc
from egm_alloc.vllm import host, kv_cache, kv_checks, report, steps
from egm_alloc.vllm.kv_cache import Boundary, Placement, find_boundary
from egm_alloc.vllm.settings import Settings
from tests.allocator.conftest import wait_for
from tests.simulator import sim
from tests.simulator.host import write_host
from tests.vllm.fakes import (
    GIB,
    MIB,
    Config,
    Runner,
    Tensor,
    Worker,
    bytes_for_kv_cache,
    config_of,
)


@given(
    num_blocks=st.integers(1, 100_000),
    page_bytes=st.integers(1, 1 << 20).map(lambda n: n * 64),
    layers=st.integers(1, 100),
    extended_bytes=st.integers(0, 1 << 42),
)
def test_hbm_takes_no_more_than_vllm_found(
    num_blocks: int, page_bytes: int, layers: int, extended_bytes: int
) -> None:
    config = config_of(num_blocks, page_bytes, layers)
    boundary = find_boundary(config, extended_bytes)
    all_bytes = sum(tensor.size for tensor in config.kv_cache_tensors)
    assert boundary.hbm_blocks + boundary.extended_blocks == num_blocks
    assert boundary.block_bytes == layers * page_bytes
    if extended_bytes == 0:
        assert boundary.extended_blocks == 0
        return
    in_hbm = sum(boundary.device_fraction(t.size) * t.size for t in config.kv_cache_tensors)
    assert in_hbm <= max(0, all_bytes - extended_bytes) + 1
    # At most what rounding takes, and the block that straddles.
    wanted = extended_bytes + layers * (page_bytes * num_blocks / 1024 + 2 * MIB + 1)
    assert boundary.extended_blocks <= wanted / boundary.block_bytes + 1


def test_packed_layers_share_their_bytes() -> None:
    config = Config(10, [Tensor(100 * MIB, block_stride=10 * MIB) for _ in range(3)])
    assert find_boundary(config, 30 * MIB).block_bytes == 10 * MIB
    assert find_boundary(config, 30 * MIB).extended_blocks == 4  # 30 MiB, and rounding


@pytest.mark.simulated
@pytest.mark.parametrize("make", [kv_cache.make_split, kv_cache.make_managed])
def test_first_blocks_are_in_hbm_and_the_others_are_not(make: object) -> None:
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    config = config_of(num_blocks=64, page_bytes=MIB, layers=2)
    boundary = find_boundary(config, 50 * MIB)
    runner = Runner(torch.device("cuda:0"))
    taken = sim.hbm()["taken"]
    with Placement(config, boundary, make) as placement:  # type: ignore[arg-type]
        runner.initialize_kv_cache(config)
    assert [tensor.numel() for tensor in placement.tensors] == [64 * MIB, 64 * MIB]
    assert egm_alloc.info(runner.block_table).tier == "device"
    for tensor in placement.tensors:
        assert egm_alloc.info(tensor).tag == "kv_cache"
        head = boundary.head_bytes(tensor.numel())
        assert egm_alloc.residency(tensor[head:]).host_bytes >= 0
    kv_checks.check_heads(placement.tensors, boundary)
    kv_checks.check_layout(runner.kv_caches, placement.tensors, boundary)
    if make is kv_cache.make_split:
        in_hbm = sim.hbm()["taken"] - taken - 20 * MIB  # the block table's segment
        assert in_hbm <= 2 * 64 * MIB - 50 * MIB
        last = placement.tensors[0][-1:]
        assert egm_alloc.residency(last).memory_type == "host"


@pytest.mark.simulated
def test_kv_tensors_are_filled_once_all_are_mapped() -> None:
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    config = config_of(num_blocks=64, page_bytes=MIB, layers=3)
    boundary = find_boundary(config, 50 * MIB)
    with sim.call_log(everything=True) as log:
        with Placement(config, boundary, kv_cache.make_split):
            for wanted in config.kv_cache_tensors:
                torch.zeros(wanted.size, dtype=torch.int8, device="cuda")
    mapped = len(log.names) - log.names[::-1].index("cuMemMap")
    fills = ("cudaLaunchKernel", "cudaMemsetAsync")  # which, depends on torch
    assert not set(fills) & set(log.names[:mapped])
    assert sum(log.names[mapped:].count(name) for name in fills) == 3


@pytest.mark.simulated
def test_link_that_cannot_be_measured_does_not_end_a_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")

    def fail(tensor: torch.Tensor) -> float:
        raise RuntimeError("as a measurement fails")

    monkeypatch.setattr(report, "read_bytes_per_second", fail)
    worker = Worker()
    worker.in_hbm = 128 * MIB
    available = bytes_for_kv_cache(worker)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(
            worker, worker.initialize_from_config, config_of(available // (2 * MIB), MIB)
        )
    assert "the speed of the link could not be found out" in caplog.text
    assert "KV cache: 0." in caplog.text
    assert all(int(cache.count_nonzero()) == 0 for cache in worker.model_runner.kv_caches)


@pytest.mark.simulated
def test_head_that_is_not_in_hbm_is_refused() -> None:
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    config = config_of(num_blocks=64, page_bytes=MIB, layers=1)
    boundary = find_boundary(config, 50 * MIB)
    with Placement(config, boundary, kv_cache.make_split) as placement:
        Runner(torch.device("cuda:0")).initialize_kv_cache(config)
    kv_checks.check_heads(placement.tensors, boundary)
    with pytest.raises(RuntimeError, match="bytes of KV blocks below block 60 are not in HBM"):
        kv_checks.check_heads(placement.tensors, Boundary(64, 60, MIB))


@pytest.mark.simulated
def test_kv_tensors_made_in_an_unknown_way_are_refused() -> None:
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    config = config_of(num_blocks=64, page_bytes=MIB, layers=2)
    with pytest.raises(RuntimeError, match="KV tensors were allocated in a way that"):
        with Placement(config, find_boundary(config, MIB), kv_cache.make_split):
            torch.empty(64 * MIB, dtype=torch.int8, device="cuda")


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 64, MIB // 2), (0, 1, 2)),  # keys before values
        ((64, 8, MIB // 8), (1, 0, 2)),  # heads before blocks
    ],
)
def test_layout_without_whole_blocks_first_is_refused(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    raw = torch.empty(64 * MIB, dtype=torch.int8, device="cuda")
    view = raw.view([shape[d] for d in order]).permute([order.index(d) for d in range(3)])
    boundary = Boundary(64, 32, MIB)
    kv_checks.check_layout([raw.view(64, 16, -1)], [raw], boundary)
    kv_checks.check_layout([[raw.view(128, -1)]], [raw], boundary)  # two of the kernel's a block
    with pytest.raises(RuntimeError, match="does not begin with whole blocks"):
        kv_checks.check_layout([view], [raw], boundary)


@pytest.mark.simulated
def test_tensor_that_no_layer_uses_is_refused() -> None:
    first, second = (torch.empty(64 * MIB, dtype=torch.int8, device="cuda") for _ in range(2))
    layers = [first.view(64, 16, -1)]
    for views in (layers, []):
        with pytest.raises(RuntimeError, match=f"the layers use {len(views)} of the 2 KV tensors"):
            kv_checks.check_layout(views, [first, second], Boundary(64, 32, MIB))


@pytest.mark.simulated
def test_auto_extends_no_kv_cache_over_pcie() -> None:
    assert not host.extends_kv(Settings(kv_bytes="auto"), 0)
    assert not host.extends_kv(Settings(kv_bytes=0), 0)
    assert host.extends_kv(Settings(kv_bytes=1), 0)


@pytest.mark.simulated
def test_layers_one_behind_the_other_in_one_allocation_are_refused() -> None:
    raw = torch.empty(64 * MIB, dtype=torch.int8, device="cuda")
    boundary = Boundary(64, 32, MIB)
    layers_outermost = raw.view(2, 64, -1)
    blocks_outermost = raw.view(64, 2, -1)
    kv_checks.check_layout([blocks_outermost[:, 0], blocks_outermost[:, 1]], [raw], boundary)
    with pytest.raises(RuntimeError, match="VLLM_KV_CACHE_LAYOUT=BLHNC"):
        kv_checks.check_layout([layers_outermost[0], layers_outermost[1]], [raw], boundary)


@pytest.mark.simulated
def test_kv_cache_goes_as_far_beyond_hbm_as_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    worker = Worker()
    worker.in_hbm = 128 * MIB
    available = bytes_for_kv_cache(worker)
    assert available == 256 * MIB
    config = config_of(available // (2 * MIB), page_bytes=MIB)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert steps.extended_kv_bytes(worker) == 128 * MIB
    boundary = find_boundary(config, 128 * MIB)
    assert 0 < boundary.hbm_blocks < 64
    assert f"({boundary.hbm_blocks} blocks, {boundary.hbm_blocks * 16} tokens)" in caplog.text
    assert "egm_alloc on cuda:0 (Simulated " in caplog.text
    assert "link: the GPU reads host memory at" in caplog.text
    assert {egm_alloc.info(cache).backing for cache in worker.model_runner.kv_caches} == {"split"}


@pytest.mark.simulated
@pytest.mark.parametrize("size", ["0.125", "auto"])
def test_host_memory_comes_up_while_the_model_is_loaded_and_profiled(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", size)
    monkeypatch.setattr(host, "kv_bytes", lambda worker, settings: 128 * MIB)
    worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=2 * MIB))
    worker.in_hbm = 128 * MIB
    ahead = (128 - 16 * 2) * MIB  # but for a piece of each layer
    steps.load_model(worker, worker.load_model)
    stock = worker.egm_alloc_stock
    assert (stock is None) == (size == "auto")  # which is found out after loading
    if stock is not None:
        wait_for(lambda: stock.held_bytes == ahead)
    available = bytes_for_kv_cache(worker)
    config = config_of(available // (2 * MIB), page_bytes=MIB)
    wait_for(lambda: worker.egm_alloc_stock.held_bytes == ahead)
    with sim.call_log() as log:
        steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert log.names.count("cuMemMap") == 256 * MIB // (2 * MIB)
    assert log.names.count("cuMemCreate") == (256 * MIB - ahead) // (2 * MIB)  # the rest was there
    assert worker.egm_alloc_stock is None


@pytest.mark.simulated
@pytest.mark.parametrize("failing", ["load_model", "profile", "no room", "allocate"])
def test_start_that_fails_gives_host_memory_back_though_the_worker_lives(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    before = sim.host_numa()["taken"]
    worker = Worker()
    worker.in_hbm = 0 if failing == "no room" else 128 * MIB

    def fail(*_: object) -> int:
        wait_for(lambda: sim.host_numa()["taken"] > before)
        raise RuntimeError("as a start fails")

    def start() -> None:
        steps.load_model(worker, fail if failing == "load_model" else worker.load_model)
        profile = fail if failing == "profile" else worker.determine_available_memory
        steps.determine_available_memory(worker, profile)
        if failing == "allocate":
            steps.initialize_from_config(worker, fail, config_of(128, page_bytes=MIB))

    if failing == "no room":
        start()
    else:
        with pytest.raises(RuntimeError, match="as a start fails"):
            start()
    assert sim.host_numa()["taken"] == before
    # Another try begins anew.
    worker.in_hbm = 128 * MIB
    steps.load_model(worker, worker.load_model)
    bytes_for_kv_cache(worker)
    config = config_of(128, page_bytes=MIB)
    steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert len(worker.model_runner.kv_caches) == 2


@pytest.mark.simulated
def test_what_the_host_cannot_give_now_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sim.set_host_root(write_host(tmp_path, 64, 10))
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "20")
    monkeypatch.setenv("EGM_ALLOC_HOST_RESERVE_GIB", "2")
    egm_alloc.enable(host_reserve_gib=2)
    worker = Worker()
    with pytest.raises(RuntimeError, match=r"KV_GIB is 20.00, and the host has room for 8.00 GiB"):
        steps.load_model(worker, worker.load_model)
    assert list(worker.model_runner.model.parameters()) == []


@pytest.mark.simulated
def test_sizes_place_nothing_in_vllms_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    egm_alloc.enable(threshold_gib=0.001, mode="managed")
    worker = Worker()
    made: list[torch.Tensor] = []

    def profile() -> int:
        made.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))
        return 128 * MIB

    steps.load_model(worker, worker.load_model)
    made.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))
    steps.determine_available_memory(worker, profile)
    assert [egm_alloc.info(tensor).tier for tensor in made] == ["device", "device"]


@pytest.mark.simulated
def test_second_engine_of_a_process_reports_its_own_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    engines = []
    for _ in range(2):
        worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=32 * MIB))
        steps.load_model(worker, worker.load_model)
        with caplog.at_level("INFO", logger="vllm.egm_alloc"):
            steps.initialize_from_config(worker, worker.initialize_from_config, config_of(64, MIB))
        engines.append(worker)
    assert caplog.text.count("weights: 0.00 GiB in HBM, 0.06 GiB on the host") == 2


@pytest.mark.simulated
def test_engines_one_after_the_other_leave_nothing_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    before = sim.host_numa()["taken"]
    for _ in range(3):
        worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=32 * MIB))
        worker.in_hbm = 128 * MIB
        steps.load_model(worker, worker.load_model)
        available = bytes_for_kv_cache(worker)
        config = config_of(available // (2 * MIB), page_bytes=MIB)
        steps.initialize_from_config(worker, worker.initialize_from_config, config)
        assert sim.host_numa()["taken"] > before
        del worker
        gc.collect()
        torch.cuda.empty_cache()
        assert sim.host_numa()["taken"] == before
        assert egm_alloc.stats().extended_tier.reserved_bytes == 0


@pytest.mark.parametrize(
    ("extended_mib", "layers", "ahead_mib", "piece_mib"),
    [
        (1, 16, 0, 2),
        (1024, 16, 1024 - 16 * 4, 4),
        (8192, 80, 8192 - 80 * 6, 6),
        (32768, 16, 32768 - 16 * 16, 16),
        (4 << 20, 1, (4 << 20) - 16, 16),
    ],
)
def test_stock_is_in_pieces_that_are_small_beside_a_tensor(
    extended_mib: int, layers: int, ahead_mib: int, piece_mib: int
) -> None:
    ahead, piece = kv_cache.stock_sizes(extended_mib * MIB, layers)
    assert (ahead, piece) == (ahead_mib * MIB, piece_mib * MIB)
    assert ahead // piece <= layers * (extended_mib * MIB // layers // piece)  # none is left over


@pytest.mark.simulated
def test_without_the_setting_the_kv_cache_is_vllms() -> None:
    worker = Worker()
    assert bytes_for_kv_cache(worker) == GIB
    config = config_of(64, page_bytes=MIB)
    steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert {egm_alloc.info(cache).tier for cache in worker.model_runner.kv_caches} == {"device"}


@pytest.mark.simulated
def test_activations_that_do_not_fit_stay_vllms_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "1")
    worker = Worker()
    for worker.in_hbm in (-MIB, 0):
        available = bytes_for_kv_cache(worker)
        assert available == worker.in_hbm


@pytest.mark.simulated
def test_a_report_that_fails_does_not_end_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    worker = Worker()
    del worker.model_runner.model_memory_usage
    bytes_for_kv_cache(worker)
    config = config_of(128, page_bytes=MIB)
    steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert len(worker.model_runner.kv_caches) == 2
    assert "what this start costs could not be found out" in caplog.text


@pytest.mark.simulated
@pytest.mark.parametrize("of", ["layers of several kinds", "context parallel ranks"])
def test_tokens_are_not_said_where_blocks_are_shared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    worker = Worker()
    config = config_of(128, page_bytes=MIB)
    if of == "context parallel ranks":
        worker.parallel_config.decode_context_parallel_size = 2
    else:
        config.kv_cache_groups *= 2
    bytes_for_kv_cache(worker)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(worker, worker.initialize_from_config, config)
    assert "blocks)" in caplog.text
    assert "tokens" not in caplog.text


@pytest.mark.simulated
def test_last_byte_of_the_head_is_asked_for_too() -> None:
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    with egm_alloc.place("split", device_fraction=0.5, layout="head"):
        tensor = torch.empty(64 * MIB, dtype=torch.int8, device="cuda")[MIB:]
    boundary = Boundary(63, 32, MIB)  # ends 1 MiB within the first chunk on the host
    with pytest.raises(RuntimeError, match="are not in HBM"):
        kv_checks.check_heads([tensor], boundary)
    kv_checks.check_heads([tensor], Boundary(63, 31, MIB))


@pytest.mark.simulated
def test_auto_adds_nothing_over_pcie_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    torch.cuda.init()
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        assert host.kv_bytes(Worker(), Settings(kv_bytes="auto")) == 0
    assert "adds nothing to the KV cache: host memory is behind PCIe" in caplog.text


def test_workers_that_differ_have_no_common_boundary() -> None:
    config = config_of(64, page_bytes=MIB)
    answers = [MIB, MIB]
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=lambda name: answers))
    assert steps.initialize_kv_caches(core, lambda: config) is config
    assert config.egm_alloc_boundary == find_boundary(config, MIB)
    answers[1] = 0
    with pytest.raises(RuntimeError, match="no common boundary: set EGM_ALLOC_VLLM_KV_GIB alike"):
        steps.initialize_kv_caches(core, lambda: config)
