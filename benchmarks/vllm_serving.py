"""vLLM with weights or a KV cache beyond HBM, beside plain vLLM: speeds, tokens, host memory.

    python -m benchmarks.vllm_serving --model FOLDER_WITH_CONFIG_JSON [--only kv,weights]

Every engine is a process of its own with dummy weights; engines that are compared take turns.
HBM is kept small by ``kv_cache_memory_bytes``. The extended KV cache is never larger than half of
the host memory that is available.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.vllm_engine import mem_available_bytes

GIB = 1 << 30
Load = dict[str, int]


@dataclass
class Engine:
    """One way of serving, and what came of it."""

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    def command(self, options: argparse.Namespace, loads: list[Load]) -> list[str]:
        """Return the command that starts it."""
        engine = {
            "model": options.model,
            "gpu_memory_utilization": options.utilization,
            "enforce_eager": options.eager,
            "max_model_len": options.prompt + options.output,
            **({"attention_backend": options.attention} if options.attention else {}),
            **self.engine,
        }
        job = {"engine": engine, "loads": loads, "rounds": options.rounds}
        return [sys.executable, "-m", "benchmarks.vllm_engine", json.dumps(job)]

    def environment(self) -> dict[str, str]:
        """Return the environment that it starts in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("EGM_ALLOC_")}
        return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **self.settings}

    def run(self, options: argparse.Namespace, loads: list[Load]) -> None:
        """Start it, serve, end it."""
        done = subprocess.run(
            self.command(options, loads),
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if answers:
            result = json.loads(answers[-1].removeprefix("RESULT "))
        else:
            last = [line for line in done.stderr.splitlines() if "Error" in line][-1:]
            result = {"failed": last[0][-300:] if last else f"exit status {done.returncode}"}
        self.results.append(result)
        print(f"  {self.name}: {in_words(result)}", flush=True)


def in_words(result: dict[str, Any]) -> str:
    """Return one line about an engine's run."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    speeds = ", ".join(
        f"{load['sequences']} x {load['prompt']}+{load['output']}: "
        f"{statistics.median(load['tokens_per_s']):.0f} tokens/s, {load['distinct_tokens']} "
        f"distinct{', extended blocks used' if load['extended_blocks_used'] else ''}"
        for load in result["loads"]
    )
    return (
        f"start {result['start_s']:.1f} s, host {result['host_bytes_taken'] / GIB:.2f} GiB, "
        f"{result['blocks']} blocks; {speeds}"
    )


def kv(gib: float) -> dict[str, int]:
    """Return the engine option for so much KV cache in HBM."""
    return {"kv_cache_memory_bytes": int(gib * GIB)}


def extended(gib: float) -> dict[str, str]:
    """Return the setting for so much extended KV cache."""
    if gib * GIB > mem_available_bytes() / 2:
        raise SystemExit(f"vllm_serving: {gib} GiB is more than half of the host's free memory")
    return {"EGM_ALLOC_VLLM_KV_GIB": str(gib)}


def compare(
    title: str,
    engines: list[Engine],
    loads: list[Load],
    options: argparse.Namespace,
    same_tokens: bool = True,
) -> None:
    """Run engines in turns, and print ratios to the first and whether the tokens agree."""
    print(title, flush=True)
    for _ in range(options.turns):
        for engine in engines:
            engine.run(options, loads)
    runs = [[r for r in engine.results if "failed" not in r] for engine in engines]
    for index, load in enumerate(loads):
        speeds = [
            [s for result in of for s in result["loads"][index]["tokens_per_s"]] for of in runs
        ]
        hashes = {h for of in runs for result in of for h in result["loads"][index]["hashes"]}
        base = statistics.median(speeds[0]) if speeds[0] else float("nan")
        ratios = ", ".join(
            f"{engine.name} {statistics.median(of) / base:.3f}" if of else f"{engine.name} failed"
            for engine, of in zip(engines[1:], speeds[1:], strict=True)
        )
        tokens = ""
        if same_tokens:
            tokens = "; tokens identical" if len(hashes) == 1 else "; TOKENS DIFFER"
        print(f"  {load['sequences']} sequences: {ratios}{tokens}", flush=True)


def case_idle(options: argparse.Namespace) -> None:
    """Compare plain vLLM with the plugin installed and not configured."""
    engines = [
        Engine("plain", kv(options.kv_gib), {"VLLM_PLUGINS": ""}),
        Engine("installed", kv(options.kv_gib)),
    ]
    compare("installed, not configured", engines, [load(options, options.fitting)], options)


def case_kv(options: argparse.Namespace) -> None:
    """Compare a KV cache 8 times what HBM holds with one that HBM holds, and with waiting."""
    sizes = options.kv_gib, 8 * options.kv_gib
    engines = [
        Engine("all in HBM", kv(sum(sizes))),
        Engine("extended", kv(sizes[0]), extended(sizes[1])),
        Engine("waiting", kv(sizes[0])),
    ]
    loads = [load(options, n * options.fitting) for n in (1, 2, 8)]
    compare("KV cache 8 times HBM's", engines, loads, options)


def case_context(options: argparse.Namespace) -> None:
    """Compare one context that is longer than HBM's KV cache with the same all in HBM."""
    length = 2 * options.fitting * (options.prompt + options.output)
    one = {"sequences": 1, "prompt": length - options.output, "output": options.output}
    engine = {"max_model_len": length, "max_num_batched_tokens": 8192}
    engines = [
        Engine("all in HBM", {**engine, **kv(4 * options.kv_gib)}),
        Engine("extended", {**engine, **kv(options.kv_gib)}, extended(3 * options.kv_gib)),
        Engine("plain", {**engine, **kv(options.kv_gib)}),
    ]
    compare("one context longer than HBM's KV cache", engines, [one], options)


def case_weights(options: argparse.Namespace) -> None:
    """Compare weights twice what HBM may hold of them with vLLM's own offloading."""
    half = options.weights_gib / 2
    bound = {"EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": str(half)}
    first = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    engines = [
        Engine("offloaded by vLLM", {**kv(options.kv_gib), "cpu_offload_gb": half}, first),
        Engine("extended, V1", kv(options.kv_gib), {**bound, **first}),
        Engine("extended, V2", kv(options.kv_gib), {**bound, "VLLM_USE_V2_MODEL_RUNNER": "1"}),
        Engine("all in HBM", kv(options.kv_gib), first),
    ]
    compare("weights twice HBM's", engines, [load(options, options.fitting)], options)


def case_start(options: argparse.Namespace) -> None:
    """Compare starts with and without 32 GiB of extended KV cache."""
    engines = [
        Engine("plain", kv(options.kv_gib)),
        Engine("32 GiB extended", kv(options.kv_gib), extended(32)),
    ]
    compare("start with 32 GiB", engines, [], options)
    starts = [statistics.median(r["start_s"] for r in e.results if "start_s" in r) for e in engines]
    print(f"  added: {starts[1] - starts[0]:.2f} s", flush=True)


def case_restart(options: argparse.Namespace) -> None:
    """Start an engine five times and kill one; the host's memory must come back."""
    size = 8 * options.kv_gib
    print("restarts", flush=True)
    before = mem_available_bytes()
    for in_process in ("0", "1"):
        settings = {**extended(size), "VLLM_ENABLE_V1_MULTIPROCESSING": in_process}
        engine = Engine(f"multiprocessing {in_process}", kv(options.kv_gib), settings)
        for _ in range(5):
            engine.run(options, [load(options, 2)])
        print(f"  host memory missing: {missing(before):.2f} GiB", flush=True)
        process = subprocess.Popen(
            engine.command(options, [load(options, 8 * options.fitting)] * 100),
            env=engine.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(options.kill_after)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(5)
        print(f"  after a kill: {missing(before):.2f} GiB", flush=True)


def missing(before: int) -> float:
    """Return by how many GiB the host has less memory available than before."""
    return (before - mem_available_bytes()) / GIB


def load(options: argparse.Namespace, sequences: int) -> Load:
    """Return a load of so many sequences."""
    return {"sequences": sequences, "prompt": options.prompt, "output": options.output}


CASES = {
    "idle": case_idle,
    "kv": case_kv,
    "context": case_context,
    "weights": case_weights,
    "start": case_start,
    "restart": case_restart,
}


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_serving")
    parser.add_argument("--model", required=True, help="folder with the model's config.json")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV cache in HBM")
    parser.add_argument("--fitting", type=int, default=48, help="sequences that it holds")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of each")
    parser.add_argument("--output", type=int, default=128, help="output tokens of each")
    parser.add_argument("--weights-gib", type=float, default=1.6, help="the model's weights")
    parser.add_argument("--utilization", type=float, default=0.3)
    parser.add_argument("--turns", type=int, default=3, help="how often engines take turns")
    parser.add_argument("--rounds", type=int, default=1, help="measurements in each turn")
    parser.add_argument("--kill-after", type=float, default=60.0, metavar="S")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts sooner")
    parser.add_argument("--attention", help="vLLM's attention backend")
    options = parser.parse_args()
    names = options.only.split(",")
    if not set(names) <= set(CASES):
        parser.error(f"only is {options.only!r}; allowed: {', '.join(CASES)}")
    for name in names:
        CASES[name](options)


if __name__ == "__main__":
    main()
