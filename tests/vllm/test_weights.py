"""Weights: HBM up to the bound, host memory beyond it, and vLLM's books in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import egm_alloc
from egm_alloc.vllm import steps, weights
from egm_alloc.vllm.weights import Placement, default_hbm_bytes, kv_bytes_per_token
from tests.simulator import sim
from tests.vllm.fakes import GIB, MIB, Runner, Worker, config_of, vllm_config

pytestmark = pytest.mark.simulated

FACTORIES: list[Callable[..., torch.Tensor]] = [
    lambda **options: torch.empty(8 * MIB, dtype=torch.uint8, **options),
    lambda **options: torch.zeros((8, MIB), dtype=torch.uint8, **options),
    lambda **options: torch.ones(8, MIB, dtype=torch.uint8, **options),
    lambda **options: torch.full((MIB,), 1.0, dtype=torch.float64, **options),
    lambda **options: torch.randn(2 * MIB, **options),
    lambda **options: torch.empty_strided((2, MIB), (MIB, 1), dtype=torch.float32, **options),
    lambda **options: torch.arange(MIB, dtype=torch.int64, **options),
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


def test_tensors_made_from_others_count_too() -> None:
    with Placement(8 * MIB, "pinned", 0):
        first = FACTORIES[0](device="cuda")
        small = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")  # over: on the host
        packed = torch.cat([small, small])
    assert egm_alloc.info(first).tier == "device"
    assert egm_alloc.info(small).tier == "extended"
    assert egm_alloc.info(packed).tier == "device"  # HBM itself is not over the bound
    with Placement(0, "pinned", 0):
        grown = FACTORIES[0](device="cuda").to(torch.int16)
        held = torch.empty(MIB // 2, dtype=torch.uint8, device="cuda")
        copied = grown.clone()
    assert held is not None
    assert egm_alloc.info(copied).tier == "extended"


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

    def budget(bound: int) -> int:
        torch.cuda.empty_cache()
        before = sim.hbm()["taken"] - torch.cuda.memory_reserved()
        runner = Runner(torch.device("cuda:0"), weight_bytes=32 * MIB, layers=4)
        with Placement(bound, "pinned", 0):
            runner.load_model()
        other = sim.hbm()["taken"] - torch.cuda.memory_reserved() - before
        return 1 * GIB - other - runner.model_memory_usage

    assert budget(GIB) == GIB - 128 * MIB
    assert budget(32 * MIB) == GIB - 32 * MIB
    assert budget(0) == GIB


def test_default_bound_leaves_room_for_activations_and_a_sequence() -> None:
    config = vllm_config()
    per_token = 16 * 2 * 4 * 128 * 2
    assert kv_bytes_per_token(config) == per_token
    whole = default_hbm_bytes(config, 80 * GIB, extended_kv=True)
    less = default_hbm_bytes(config, 80 * GIB, extended_kv=False)
    assert whole - less == 4096 * per_token
    assert 70 * GIB < whole < 72 * GIB
    assert default_hbm_bytes(config, MIB, extended_kv=False) == 0
    config.cache_config.cache_dtype = "fp8_e5m2"
    assert weights.kv_bytes_per_token(config) == per_token // 2
