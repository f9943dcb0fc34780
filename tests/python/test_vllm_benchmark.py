"""The benchmark of vLLM, with a package of that name which answers at once."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import vllm_process
from benchmarks.vllm_process import Engine, one_line
from benchmarks.vllm_serving import tokens_alike
from tests.allocator.conftest import Background

ROOT = Path(__file__).parents[2]

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
    assert tokens_alike([{"hashes": ["a"]}, {"hashes": ["a"]}]) == "tokens identical"
    assert tokens_alike([{"hashes": ["a"]}, {"hashes": ["a", "b"]}]) == "TOKENS DIFFER"
    assert (
        tokens_alike([{"failed": "x"}, {"failed": "y"}])
        == "tokens not compared (2 of 2 runs failed)"
    )


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
