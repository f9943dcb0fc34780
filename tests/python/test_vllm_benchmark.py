"""The benchmark of vLLM, with a package of that name which answers at once."""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import vllm_process
from benchmarks.vllm_engine import fill_weights
from benchmarks.vllm_process import Engine, one_line
from benchmarks.vllm_serving import tokens_alike
from tests.allocator.conftest import Background

ROOT = Path(__file__).parents[2]
VOCABULARY, WIDTH = 500, 64

VLLM = """
import os
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)

class LLM:
    def __init__(self, **options):
        cache = SimpleNamespace(num_gpu_blocks=7)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
        longest = 40000 if "EGM_ALLOC_VLLM_KV_GIB" in os.environ else 20000
        if options["max_model_len"] > longest:
            raise ValueError("Error: larger than the available KV cache memory")

    def apply_model(self, function):
        function(SimpleNamespace(named_parameters=lambda: []))

    def generate(self, prompts, sampling, use_tqdm):
        one = SimpleNamespace(token_ids=list(range(sampling.max_tokens)))
        return [SimpleNamespace(outputs=[one], num_cached_tokens=None) for _ in prompts]
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "psutil.py").write_text(
        "from types import SimpleNamespace\n"
        "def virtual_memory(): return SimpleNamespace(available=64 << 30)\n"
    )
    return f"{tmp_path}:{ROOT}"


def serve(path: str, logs: Path, *arguments: str) -> str:
    """Run the benchmark and return what it prints."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.vllm_serving", "--model", "m"),
            *("--turns", "2", "--fitting", "16", "--logs", str(logs), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engines_take_turns_and_are_compared(path: str, tmp_path: Path) -> None:
    said = serve(path, tmp_path / "logs", "--only", "fitting").splitlines()
    runs = [line.split(",")[0].strip() for line in said if "distinct" in line]
    assert runs == ["plain", "extended"] * 2
    assert said[-2].startswith("  = 16 sequences, tokens/s: plain ")
    assert said[-1] == "  = tokens identical"


def test_engine_that_cannot_start_is_said_and_the_others_go_on(path: str, tmp_path: Path) -> None:
    said = serve(path, tmp_path / "logs", "--only", "context", "--prompt", "1000")
    assert "plain: failed: ValueError: Error: larger than the available KV cache memory" in said
    assert "extended, 1 x " in said
    assert "tokens identical (4 of 6 runs failed)" in said


def test_engine_that_hangs_is_ended_with_what_it_has_started(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child of an engine that is gone holds its output."""
    (tmp_path / "vllm" / "__init__.py").write_text(
        "import os, subprocess\nsubprocess.Popen(['sleep', '600'])\nos._exit(3)\n"
    )
    monkeypatch.setattr(vllm_process, "_LONGEST_S", 2.0)
    monkeypatch.setenv("PYTHONPATH", path)
    engine = Engine("hangs")
    engine.start(argparse.Namespace(engine="{}", logs=tmp_path / "logs"))
    assert engine.process is not None
    answer = Background(engine.wait).finish(30)
    assert isinstance(answer, dict)
    assert "exit status 3" in answer["failed"]
    engine.stop()


def test_unequal_tokens_are_said() -> None:
    a, b, failed = {"hashes": ["a"]}, {"hashes": ["b"]}, {"failed": "x"}
    assert tokens_alike([(9, [a, a]), (9, [a]), (7, [a])]) == "tokens identical"
    assert tokens_alike([(9, [a, b])]) == "TOKENS DIFFER"
    assert tokens_alike([(9, [a]), (9, [b])]) == "TOKENS DIFFER"
    assert tokens_alike([(9, [a]), (9, [a, failed]), (7, [b])]) == (
        "tokens identical where engines have the same number of blocks (1 of 4 runs failed)"
    )
    assert tokens_alike([(9, [failed, failed])]) == "tokens not compared (2 of 2 runs failed)"


class Decoder(nn.Module):
    """A small Llama, its parameters named as vLLM names them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        layer = {
            "qkv_proj": nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            "o_proj": nn.Linear(WIDTH, WIDTH, bias=False),
            "norm": nn.RMSNorm(WIDTH),
        }
        self.layers = nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(4))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the token that comes next."""
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            parts = layer["qkv_proj"](layer["norm"](hidden)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(0, 1) for part in parts)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            hidden = hidden + layer["o_proj"](mixed.transpose(0, 1).flatten(1))
        logits: torch.Tensor = self.lm_head(self.norm(hidden[-1]))
        return logits.argmax()


def same_next_tokens(model: Decoder) -> int:
    """Return for how many of 20 prompts the next token is the same after one early one changed."""
    generator = torch.Generator().manual_seed(0)
    same = 0
    for _ in range(20):
        prompt = torch.randint(0, VOCABULARY, (64,), generator=generator)
        changed = prompt.clone()
        changed[5] = (changed[5] + 1) % VOCABULARY
        same += int(model(prompt) == model(changed))
    return same


@torch.no_grad()
def test_next_token_depends_on_every_one_before_it() -> None:
    model = Decoder()
    for parameter in model.parameters():  # as vLLM's dummy weights are
        parameter.uniform_(-1e-3, 1e-3)
    assert same_next_tokens(model) == 20
    fill_weights(model)
    first = [parameter.clone() for parameter in model.parameters()]
    assert same_next_tokens(model) < 15
    fill_weights(model)
    assert all(map(torch.equal, first, model.parameters()))


def test_line_about_a_run_has_its_extended_blocks() -> None:
    load = {"sequences": 3, "prompt": 4, "output": 5}
    result = {
        "tokens_per_s": 6.4,
        "distinct_tokens": 7,
        "cached_prompt_tokens": 0,
        "extended_blocks": 8,
    }
    assert one_line(load, result) == "3 x 4+5: 6 tokens/s, 7 distinct, 8 extended blocks"
    assert one_line(load, {"failed": "why"}) == "3 x 4+5: failed: why"
