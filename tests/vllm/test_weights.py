"""Weights: HBM up to the bound, host memory beyond it, and vLLM's books in order."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import egm_alloc
from egm_alloc.vllm import steps, weights
from egm_alloc.vllm.weights import Placement, default_hbm_bytes, kv_bytes_of_sequence
from tests.simulator import sim
from tests.vllm.fakes import (
    GIB,
    MIB,
    Runner,
    Worker,
    bytes_for_kv_cache,
    config_of,
    vllm_config,
)

pytestmark = pytest.mark.simulated

FACTORIES: list[Callable[..., torch.Tensor]] = [
    lambda **options: torch.empty(8 * MIB, dtype=torch.uint8, **options),
    lambda **options: torch.zeros((8, MIB), dtype=torch.uint8, **options),
    lambda **options: torch.ones(8, MIB, dtype=torch.uint8, **options),
    lambda **options: torch.full((MIB,), 1.0, dtype=torch.float64, **options),
    lambda **options: torch.randn(2 * MIB, **options),
    lambda **options: torch.empty_strided((2, MIB), (MIB, 1), dtype=torch.float32, **options),
    lambda **options: torch.arange(MIB, dtype=torch.int64, **options),
    lambda **options: torch.zeros_like(torch.empty(8 * MIB, dtype=torch.int8), **options),
    lambda **options: torch.ones(2 * MIB, dtype=torch.int32).to(**(options or {"device": "cpu"})),
]


@pytest.fixture(autouse=True)
def on() -> None:
    """Switch on as in a worker."""
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)


@pytest.mark.parametrize("make", FACTORIES)
def test_what_exceeds_the_bound_goes_to_the_host(make: Callable[..., torch.Tensor]) -> None:
    with Placement(8 * MIB, "pinned", 0):
        inside, outside = make(device="cuda"), make(device="cuda")
        on_cpu = make()
        small = torch.empty(MIB // 2, dtype=torch.uint8, device="cuda")
    assert [egm_alloc.info(tensor).tier for tensor in (inside, outside)] == ["device", "extended"]
    assert egm_alloc.info(outside).tag == "weights"
    assert on_cpu.device.type == "cpu"
    assert egm_alloc.info(small).tier == "device"  # under place()'s min_bytes


def test_room_that_is_given_back_is_used_again() -> None:
    with Placement(8 * MIB, "pinned", 0):
        first = FACTORIES[0](device="cuda")
        del first
        second = FACTORIES[0](device="cuda")
    assert egm_alloc.info(second).tier == "device"


def test_small_tensor_changes_nothing_for_what_is_computed_from_others() -> None:
    with Placement(12 * MIB, "pinned", 0):
        weights = [torch.empty(8 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        torch.ones(256, device="cuda")
        turned = [each.view(8, MIB).t().contiguous() for each in weights]
    assert [egm_alloc.info(each).tier for each in weights] == ["device"] + 3 * ["extended"]
    assert [egm_alloc.info(each).tier for each in turned] == 4 * ["extended"]


def test_what_is_computed_from_others_goes_to_the_host_once_the_bound_is_reached() -> None:
    with Placement(16 * MIB, "pinned", 0):
        weight = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        turned = [weight.view(8, MIB).t().contiguous() for _ in range(3)]
    assert [egm_alloc.info(each).tier for each in turned] == ["device", "extended", "extended"]


def test_tensor_computed_from_others_goes_where_the_last_one_went() -> None:
    with Placement(9 * MIB, "pinned", 0):
        first = FACTORIES[0](device="cuda")
        within = first.clone()  # the one that may exceed the bound
        second = FACTORIES[0](device="cuda")
        beyond = torch.cat([second, second])
    tiers = [egm_alloc.info(tensor).tier for tensor in (first, within, second, beyond)]
    assert tiers == ["device", "device", "extended", "extended"]


def test_device_may_be_given_by_its_number() -> None:
    with Placement(8 * MIB, "pinned", 0):
        tensors = [FACTORIES[0](device=0) for _ in range(2)]
    assert [egm_alloc.info(tensor).tier for tensor in tensors] == ["device", "extended"]


def test_only_moves_from_the_cpu_to_the_gpu_count() -> None:
    on_cpu = torch.ones(16 * MIB, dtype=torch.uint8)
    with Placement(24 * MIB, "pinned", 0):
        first = on_cpu.to("cuda")
        on_cpu.to(torch.int16)
        on_cpu.to("cpu", torch.int16)
        within = first[: 8 * MIB].clone()
        second = on_cpu.cuda()
        third = on_cpu[: 8 * MIB].to(second)
    tiers = [egm_alloc.info(tensor).tier for tensor in (first, within, second, third)]
    assert tiers == ["device", "device", "extended", "extended"]


def test_result_that_is_given_stays_where_it_is() -> None:
    given = torch.empty(0, dtype=torch.uint8, device="cuda")
    with Placement(8 * MIB, "pinned", 0):
        torch.zeros(4 * MIB, out=given)
        with pytest.raises(TypeError):
            torch.empty("nonsense", device="cuda")  # type: ignore[arg-type]
    assert given.numel() == 4 * MIB
    assert egm_alloc.info(given).tier == "device"


def test_loader_that_does_all_by_itself_is_said_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=8 * MIB, layers=1))
    steps.load_model(worker, worker.load_model)
    assert caplog.text == ""
    worker.takes_steps_itself = False  # and no BaseModelLoader takes part
    steps.load_model(worker, worker.load_model)
    assert "EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB does nothing" in caplog.text


@pytest.mark.parametrize("kv_gib", [2, None])
def test_default_bound_heeds_a_given_size_of_the_kv_cache(
    monkeypatch: pytest.MonkeyPatch, kv_gib: int | None
) -> None:
    rooms: list[int] = []

    def bound(config: object, room: int, extends_kv: bool) -> int:
        assert not extends_kv
        rooms.append(room)
        return GIB

    monkeypatch.setattr(weights, "default_hbm_bytes", bound)
    worker = Worker(vllm_config(cache__kv_cache_memory_bytes=kv_gib and kv_gib * GIB))
    free, _ = torch.cuda.mem_get_info()
    steps.load_model(worker, worker.load_model)
    assert rooms == [free if kv_gib else worker.requested_memory]


def test_model_beyond_the_bound_is_loaded_and_one_within_it_is_untouched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", str(64 / 1024))
    worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=32 * MIB, layers=4))
    steps.load_model(worker, worker.load_model)
    tiers = [egm_alloc.info(weight).tier for weight in worker.model_runner.model.parameters()]
    assert tiers == ["device", "device", "extended", "extended"]
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(worker, worker.initialize_from_config, config_of(64, MIB))
    assert "weights: 0.06 GiB in HBM, 0.06 GiB on the host" in caplog.text
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "auto")
    fits = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=32 * MIB, layers=4))
    steps.load_model(fits, fits.load_model)
    tiers = [egm_alloc.info(weight).tier for weight in fits.model_runner.model.parameters()]
    assert tiers == ["device"] * 4


def test_weights_backing_is_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    for given, backing in (("auto", "pinned"), ("numa", "numa"), ("managed", "managed")):
        monkeypatch.setenv("EGM_ALLOC_VLLM_BACKING", given)
        worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes=4 * MIB, layers=1))
        steps.load_model(worker, worker.load_model)
        (weight,) = worker.model_runner.model.parameters()
        assert egm_alloc.info(weight).backing == backing
        if backing == "managed":  # read where it is, never moved to and fro
            assert egm_alloc.info(weight).preferred_location == "host"
            assert "device" in egm_alloc.info(weight).accessed_by


def test_books_of_vllm_give_the_same_kv_budget_with_weights_on_the_host() -> None:
    """vLLM: budget = requested - (used - reserved) - allocated by the weights - peak (0 here)."""

    def budget(bound: int, weight_bytes: int) -> int:
        torch.cuda.empty_cache()
        before = sim.hbm()["taken"] - torch.cuda.memory_reserved()
        worker = Worker(runner=Runner(torch.device("cuda:0"), weight_bytes, layers=4))
        with Placement(bound, "pinned", 0):
            worker.load_model()
        torch.cuda.empty_cache()
        other = sim.hbm()["taken"] - torch.cuda.memory_reserved() - before
        worker.in_hbm = GIB - other - worker.model_runner.model_memory_usage
        return bytes_for_kv_cache(worker)

    for weight_bytes in (32 * MIB, 8 * MIB + 512, 13 * MIB):
        assert budget(GIB, weight_bytes) >= GIB - 4 * weight_bytes - 32 * MIB
        assert budget(weight_bytes, weight_bytes) <= GIB - weight_bytes
        assert budget(0, weight_bytes) == GIB


@pytest.mark.parametrize("by", ["offloading", "sleep mode", "a saved plan"])
def test_weights_that_vllm_places_itself_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    config = vllm_config(model__enable_sleep_mode=by == "sleep mode")
    config.offload_config.uva.cpu_offload_gb = int(by == "offloading")
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "01"[by == "a saved plan"])
    monkeypatch.setattr(weights, "default_hbm_bytes", lambda *_: 0)
    worker = Worker(config, Runner(torch.device("cuda:0"), weight_bytes=8 * MIB, layers=1))
    steps.load_model(worker, worker.load_model)
    (weight,) = worker.model_runner.model.parameters()
    assert egm_alloc.info(weight).tier == "device"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_link_is_measured_on_weights_of_any_type_and_layout(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    worker = Worker()

    def load() -> None:
        weight = torch.empty(2 * MIB, 8, dtype=dtype, device="cuda").t()
        worker.model_runner.model.weight = torch.nn.Parameter(weight, requires_grad=False)

    steps.load_model(worker, load)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(worker, worker.initialize_from_config, config_of(64, MIB))
    assert "link: the GPU reads host memory at" in caplog.text
    assert "cost: each step reads the weights on the host" in caplog.text


def test_host_memory_that_is_no_parameter_is_reported_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    worker = Worker()
    held: list[torch.Tensor] = []
    steps.load_model(worker, lambda: held.append(torch.empty(8 * MIB, device="cuda")))
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        steps.initialize_from_config(worker, worker.initialize_from_config, config_of(64, MIB))
    assert "0.03 GiB on the host" in caplog.text
    assert "could not be found out" not in caplog.text


def test_default_bound_leaves_room_for_activations_and_a_sequence() -> None:
    config = vllm_config()
    per_token = 16 * 2 * 4 * 128 * 2
    assert kv_bytes_of_sequence(config, 10) == 10 * per_token
    bound = default_hbm_bytes(config, 80 * GIB, extended_kv=False)
    whole = bound + 4096 * per_token
    assert 78 * GIB < whole < 79 * GIB  # activations, sampling, kernels and graphs
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=True) == bound
    assert default_hbm_bytes(config, MIB, extended_kv=False) == 0
    config.model_config.max_model_len = 1 << 30  # more than HBM anyway
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=False) == whole - 10 * GIB
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=True) == whole - 80 * GIB // 32
    config.model_config.original_max_model_len = -1  # vLLM makes it fit: what is left then
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=False) == whole - 10 * GIB
    config.cache_config.kv_cache_memory_bytes = 20 * GIB
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=False) == whole - 20 * GIB
    config.model_config.enforce_eager = True  # no graphs
    assert default_hbm_bytes(config, 80 * GIB, extended_kv=False) == whole - 20 * GIB + GIB // 2
    config.cache_config.cache_dtype = "fp8_e5m2"
    assert kv_bytes_of_sequence(config, 10) == 5 * per_token


def test_layers_with_a_window_keep_no_more_of_a_sequence_than_that() -> None:
    config = vllm_config()
    all_layers = kv_bytes_of_sequence(config, 100_000)
    types = ["sliding_attention", "linear_attention", "full_attention", "sliding_attention"]
    config.model_config.hf_text_config = SimpleNamespace(layer_types=types, sliding_window=1024)
    within = 1024 + 2048  # and what one step adds
    expected = (100_000 + 2 * within) * all_layers // 100_000 // 4
    assert kv_bytes_of_sequence(config, 100_000) == expected
    assert kv_bytes_of_sequence(config, 100) * 1000 * 4 == 3 * all_layers
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    assert kv_bytes_of_sequence(config, 100_000) * 4 == 3 * all_layers
    config.model_config.hf_text_config.layer_types = None
    assert kv_bytes_of_sequence(config, 100_000) == all_layers


def test_no_room_beside_the_weights_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker()
    worker.in_hbm = -MIB
    assert bytes_for_kv_cache(worker) == -MIB
    assert "EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB" not in caplog.text  # no bound is at fault
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "1.5")
    worker = Worker()
    worker.in_hbm = -MIB
    steps.load_model(worker, worker.load_model)
    worker.model_runner.model_memory_usage = GIB
    assert bytes_for_kv_cache(worker) == -MIB
    assert "a EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB below the 1.00 GiB" in caplog.text
    assert "a lower max_num_batched_tokens" in caplog.text


def test_no_room_though_all_weights_are_on_the_host_names_what_helps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "0")
    worker = Worker()
    worker.in_hbm = 0
    steps.load_model(worker, lambda: None)
    worker.model_runner.model_memory_usage = 0
    bytes_for_kv_cache(worker)
    assert "WEIGHTS_HBM_GIB" not in caplog.text
    assert "What helps: a lower max_num_batched_tokens or max_num_seqs, a higher" in caplog.text


def test_cache_too_small_for_one_sequence_names_what_helps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB", "1.5")
    config = vllm_config(model__max_model_len=1 << 20)  # 32 KiB a token
    worker = Worker(config)
    worker.in_hbm = 31 * GIB
    steps.load_model(worker, worker.load_model)
    bytes_for_kv_cache(worker)
    assert "HBM has 31.00 GiB left for the KV cache and the host 0.00 GiB" in caplog.text
    assert "a sequence of 1048576 tokens needs about 32.00 GiB" in caplog.text
    assert "a lower max_model_len, more EGM_ALLOC_VLLM_KV_GIB" in caplog.text
    caplog.clear()
    worker.in_hbm = 33 * GIB
    bytes_for_kv_cache(worker)
    config.model_config.original_max_model_len = -1
    worker.in_hbm = GIB
    bytes_for_kv_cache(worker)
    assert "What helps" not in caplog.text
