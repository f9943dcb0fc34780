"""Real vLLM on a real GPU: tokens with weights or a KV cache beyond HBM are those of all in HBM."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.vllm_process import Engine, Load, Result

MIB, GIB = 1 << 20, 1 << 30
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
KV = {"kv_cache_memory_bytes": 128 * MIB}  # of 8 KiB a token: 16384 tokens
ROOMY = {"kv_cache_memory_bytes": 640 * MIB}
EXTENDED = {"EGM_ALLOC_VLLM_KV_GIB": "0.5"}
# 64 sequences of 480 tokens: twice what HBM's part holds.
LOAD: Load = {"sequences": 64, "prompt": 416, "output": 64}
# In a process of its own an engine begins with those that have come by then, and in other batches
# numbers are rounded differently. So there one sequence goes after the other, each longer than what
# HBM's part holds.
LONG = {"max_model_len": 4096}
ONE_BY_ONE: Load = {"sequences": 3, "prompt": 3000, "output": 64, "one_by_one": 1}
KV_OF_LESS_THAN_ONE = {"kv_cache_memory_bytes": 24 * MIB}


class Engines:
    """Starts engines and serves with them; each way of serving once."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        plugin = folder / "plugin" / "egm_alloc-0.dist-info"
        plugin.mkdir(parents=True)
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: egm-alloc\nVersion: 0\n")
        (plugin / "entry_points.txt").write_text(
            "[vllm.general_plugins]\negm_alloc = egm_alloc_vllm:register\n"
        )
        self.path = f"{ROOT}:{plugin.parent}"
        engine = {
            "model": str(model),
            "gpu_memory_utilization": 0.1,
            "enforce_eager": True,
            "max_model_len": 512,
        }
        self.options = argparse.Namespace(engine=json.dumps(engine), logs=folder / "logs")
        self.seen: dict[str, tuple[Result, str]] = {}

    def serve(
        self, options: dict[str, Any], settings: dict[str, str], load: Load = LOAD
    ) -> tuple[Result, str]:
        """Return what serving a load gave, with the engine's own figures, and all it said."""
        result, said = self.try_to_serve(options, settings, load)
        assert "failed" not in result, said[-4000:]
        return result, said

    def try_to_serve(
        self, options: dict[str, Any], settings: dict[str, str], load: Load = LOAD
    ) -> tuple[Result, str]:
        """Do the same where the start may fail; then there is "failed" in the result."""
        key = json.dumps([options, settings, load], sort_keys=True)
        if key not in self.seen:
            engine = Engine(f"engine {len(self.seen)}", options, settings, path=self.path)
            engine.start(self.options)
            try:
                up = engine.wait()
                result = {**up, **engine.serve(load)} if "failed" not in up else up
            finally:
                engine.stop()
            self.seen[key] = result, engine.log.read_text("utf-8", "replace")
        return self.seen[key]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("in_process", ["1", "0"])
@pytest.mark.parametrize("runner", ["0", "1"])
def test_tokens_of_an_extended_kv_cache(engines: Engines, runner: str, in_process: str) -> None:
    common = {
        "VLLM_USE_V2_MODEL_RUNNER": runner,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process == "1" else "1",
    }
    if in_process == "1":
        expected, _ = engines.serve(ROOMY, common)
        found, said = engines.serve(KV, {**common, **EXTENDED})
    else:
        expected, _ = engines.serve({**ROOMY, **LONG}, common, ONE_BY_ONE)
        less = {**KV_OF_LESS_THAN_ONE, **LONG}
        found, said = engines.serve(less, {**common, **EXTENDED}, ONE_BY_ONE)
    assert found["hashes"] == expected["hashes"]
    assert found["distinct_tokens"] > 10
    if in_process == "1":
        assert found["extended_blocks"] > 0
    assert "extended ones are in use now" in said


def test_load_that_hbm_holds_uses_no_extended_block(engines: Engines) -> None:
    load = {**LOAD, "sequences": 20}
    expected, _ = engines.serve(ROOMY, {}, load)
    found, _ = engines.serve(KV, EXTENDED, load)
    assert found["extended_blocks"] == 0
    assert found["hashes"] == expected["hashes"]
    assert found["blocks"] > 4 * engines.serve(KV, {}, load)[0]["blocks"]


@pytest.mark.parametrize("runner", ["0", "1"])
def test_tokens_of_weights_on_the_host(engines: Engines, runner: str) -> None:
    common = {"VLLM_USE_V2_MODEL_RUNNER": runner}
    expected, _ = engines.serve(ROOMY, {**common, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    found, _ = engines.serve(ROOMY, {**common, "EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "0.2"})
    assert found["offloaded_bytes"] > 64 * MIB
    assert found["hashes"] == expected["hashes"]


def test_hbm_that_weights_leave_goes_to_the_kv_cache(engines: Engines) -> None:
    everything, _ = engines.serve({}, {})
    found, _ = engines.serve({}, {"EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "0.2"})
    gained = (found["blocks"] - everything["blocks"]) * 16 * (8 << 10)
    assert gained == pytest.approx(found["offloaded_bytes"], abs=32 * MIB)
    assert found["hashes"] == everything["hashes"]


def test_switch_alone_serves_a_model_that_hbm_does_not_hold(engines: Engines) -> None:
    larger = {"num_hidden_layers": 40, "intermediate_size": 16384}  # 4 GiB
    options = {"hf_overrides": larger, "max_num_batched_tokens": 1024}
    small = {**options, "gpu_memory_utilization": 3 * GIB / torch.cuda.mem_get_info()[1]}
    load = {**LOAD, "sequences": 4}
    refused, _ = engines.try_to_serve(small, {}, load)
    assert "memory" in refused["failed"]
    expected, _ = engines.serve(options, {}, load)
    found, _ = engines.serve(small, {"EGM_ALLOC_VLLM": "1"}, load)
    assert found["offloaded_bytes"] > GIB
    assert found["hashes"] == expected["hashes"]


def test_prefixes_in_extended_blocks_are_found_again(engines: Engines) -> None:
    caching = {"enable_prefix_caching": True}
    twice = {**LOAD, "repeat": 2}
    expected, _ = engines.serve({**ROOMY, **caching}, {}, twice)
    found, _ = engines.serve({**KV, **caching}, EXTENDED, twice)
    assert found["extended_blocks"] > 0
    # All prompt tokens but those of each one's last block, which HBM alone could not hold.
    assert found["cached_prompt_tokens"] == expected["cached_prompt_tokens"]
    assert found["cached_prompt_tokens"] >= LOAD["sequences"] * (LOAD["prompt"] - 16)
    assert found["hashes"] == expected["hashes"]


def test_tokens_depend_on_what_is_in_extended_blocks(engines: Engines) -> None:
    caching = {**KV, "enable_prefix_caching": True}
    engine = Engine("zeroed", caching, EXTENDED, path=engines.path)
    engine.start(engines.options)
    try:
        hbm_blocks = 1024
        assert engine.wait()["blocks"] > 2 * hbm_blocks
        engine.serve(LOAD)
        found = engine.serve(LOAD)
        zeroed = engine.serve({**LOAD, "zeros_from_block": hbm_blocks})
    finally:
        engine.stop()
    assert found["cached_prompt_tokens"] == zeroed["cached_prompt_tokens"] > 0
    assert found["hashes"] != zeroed["hashes"]


def test_kv_connector_beside_weights_on_the_host(engines: Engines) -> None:
    # HBM holds six sequences, the connector all.
    connector = {**KV_OF_LESS_THAN_ONE, "enable_prefix_caching": True, "kv_offloading_size": 1}
    twice = {**LOAD, "sequences": 12, "repeat": 2, "one_by_one": 1}
    expected, _ = engines.serve(connector, {}, twice)
    found, _ = engines.serve(connector, {"EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "0.2"}, twice)
    assert found["offloaded_bytes"] > 64 * MIB
    assert found["cached_prompt_tokens"] > 0
    assert found["hashes"] == expected["hashes"]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"max_num_batched_tokens": 256, "enable_prefix_caching": True}, {}),
        ({"enforce_eager": False}, {}),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        ),
    ],
    ids=["expandable segments", "chunked prefill, prefix caching", "graphs", "speculation"],
)
def test_tokens_together_with_others(
    engines: Engines, options: dict[str, Any], settings: dict[str, str]
) -> None:
    expected, _ = engines.serve({**ROOMY, **options}, settings)
    found, _ = engines.serve(
        {**KV, **options},
        {**settings, **EXTENDED, "EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "0.2"},
    )
    assert found["extended_blocks"] > 0
    assert found["offloaded_bytes"] > 0
    assert found["hashes"] == expected["hashes"]


def test_worker_class_without_the_plugin(engines: Engines) -> None:
    expected, _ = engines.serve(ROOMY, {})
    options = {**KV, "worker_cls": "egm_alloc.vllm.Worker"}
    found, _ = engines.serve(options, {**EXTENDED, "VLLM_PLUGINS": ""})
    assert found["hashes"] == expected["hashes"]
    assert found["blocks"] > 4 * 1024
