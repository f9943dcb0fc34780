"""vLLM with weights or a KV cache beyond HBM, beside plain vLLM: speeds, tokens, host memory.

    python -m benchmarks.vllm_serving --model FOLDER_WITH_CONFIG_JSON [--only kv,weights]

Every engine is a process of its own with random weights; those that are compared live side by side
and serve in turns. HBM is kept small by ``kv_cache_memory_bytes``. The extended KV cache is never
larger than half of the host memory that is available.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.vllm_engine import mem_available_bytes
from benchmarks.vllm_process import Engine, Load, Result, one_line

GIB = 1 << 30


def kv(gib: float) -> dict[str, int]:
    """Return the engine option for so much KV cache in HBM."""
    return {"kv_cache_memory_bytes": int(gib * GIB)}


def extended(gib: float, gpus: int = 1) -> dict[str, str]:
    """Return the setting for so much extended KV cache of each GPU."""
    if gpus * gib * GIB > mem_available_bytes() / 2:
        raise SystemExit(f"vllm_serving: {gib} GiB is more than half of the host's free memory")
    return {"EGM_ALLOC_VLLM_KV_GIB": str(gib)}


def compare(
    title: str,
    engines: list[Engine],
    loads: list[Load],
    options: argparse.Namespace,
    *,
    same_tokens: bool = True,
    together: bool = False,
) -> None:
    """Have engines serve in turns; print ratios to the first and whether the tokens agree.

    With `together` all start at the same time, and what each takes of the host is not known.
    """
    print(title, flush=True)
    found: dict[tuple[int, str], list[Result]] = defaultdict(list)
    engines_to_start = [engine for engine in engines if engine.process is None]
    try:
        # The extended ones after the others, one by one: then what the host has less is theirs.
        plain = [e for e in engines_to_start if together or not e.extends()]
        for engine in plain:
            engine.start(options)
        for engine in plain:
            engine.wait(alone=False)
        for engine in engines_to_start:
            if engine not in plain:
                engine.start(options)
                engine.wait()
        for engine in engines:  # what is compiled at its first use is not measured
            engine.serve({**loads[0], "repeat": 1})
        for index, load in enumerate(loads):
            for _ in range(options.turns):
                for engine in engines:
                    result = engine.serve(load)
                    print(f"  {engine.name}, {one_line(load, result)}", flush=True)
                    found[index, engine.name].append(result)
            print(f"  = {summary(load, [found[index, e.name] for e in engines], engines)}")
            if same_tokens:
                print(f"  = {tokens_alike([(e.blocks, found[index, e.name]) for e in engines])}")
    finally:
        for engine in engines:
            engine.stop()


def tokens_alike(found: list[tuple[int, list[Result]]]) -> str:
    """Return whether all runs gave the same tokens, those left out that failed.

    Those of engines with the same number of KV blocks should: others may run sequences in other
    batches, whose rounding differs.

    Parameters
    ----------
    found : list of (int, list of Result)
        For each engine its number of KV blocks and its runs.
    """
    by_blocks: dict[int, set[str]] = defaultdict(set)
    for blocks, results in found:
        for result in results:
            by_blocks[blocks].update(result.get("hashes", []))
    alike = [len(hashes) == 1 for hashes in by_blocks.values() if hashes]
    if not alike:
        text = "tokens not compared"
    elif not all(alike):
        text = "TOKENS DIFFER"
    elif len(set().union(*by_blocks.values())) == 1:
        text = "tokens identical"
    else:
        text = "tokens identical where engines have the same number of blocks"
    failed = sum("failed" in result for _, results in found for result in results)
    runs = sum(len(results) for _, results in found)
    return text + (f" ({failed} of {runs} runs failed)" if failed else "")


def summary(load: Load, results: list[list[Result]], engines: list[Engine]) -> str:
    """Return the median speed of each engine, and its ratio to the first."""
    medians = [
        statistics.median(r["tokens_per_s"] for r in of)
        if of and all("tokens_per_s" in r for r in of)
        else float("nan")
        for of in results
    ]
    each = ", ".join(
        f"{engine.name} {median:.0f} ({median / medians[0]:.3f})"
        for engine, median in zip(engines, medians, strict=True)
    )
    return f"{load['sequences']} sequences, tokens/s: {each}"


def case_idle(options: argparse.Namespace) -> None:
    """Compare plain vLLM with the plugin installed and not configured."""
    engines = [
        Engine("plain", {**kv(options.kv_gib)}, {"VLLM_PLUGINS": ""}),
        Engine("installed", kv(options.kv_gib)),
    ]
    compare("installed, not configured", engines, [load(options, options.fitting)], options)


def case_kv(options: argparse.Namespace) -> None:
    """Compare a KV cache 8 times what HBM holds with one that HBM holds, and with waiting."""
    sizes = options.kv_gib, 8 * options.kv_gib
    engines = [
        Engine("all in HBM", kv(sum(sizes))),
        Engine("waiting", kv(sizes[0])),
        Engine("extended", kv(sizes[0]), extended(sizes[1])),
    ]
    loads = [load(options, options.fitting)]
    loads += [load(options, n * sequences_per_hbm(options)) for n in (2, 4, 8)]
    compare("KV cache 8 times HBM's", engines, loads, options)


def case_fitting(options: argparse.Namespace) -> None:
    """Compare a KV cache 8 times what HBM holds with plain vLLM, at a load that HBM holds."""
    engines = [
        Engine("plain", kv(options.kv_gib)),
        Engine("extended", kv(options.kv_gib), extended(8 * options.kv_gib)),
    ]
    compare("a load that HBM holds", engines, [load(options, options.fitting)], options)


def case_context(options: argparse.Namespace) -> None:
    """Compare one context that is longer than HBM's KV cache with the same all in HBM."""
    length = 2 * options.fitting * (options.prompt + options.output)
    one = {"sequences": 1, "prompt": length - options.output, "output": options.output}
    engine = {
        "max_model_len": length,
        "max_num_batched_tokens": 8192,
        "hf_overrides": {"max_position_embeddings": length},
    }
    engines = [
        Engine("all in HBM", {**engine, **kv(4 * options.kv_gib)}),
        Engine("plain", {**engine, **kv(options.kv_gib)}),
        Engine("extended", {**engine, **kv(options.kv_gib)}, extended(3 * options.kv_gib)),
    ]
    compare("one context longer than HBM's KV cache", engines, [one], options)


def case_weights(options: argparse.Namespace) -> None:
    """Compare weights twice what HBM may hold of them with vLLM's own offloading."""
    first = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    offload = {**kv(options.kv_gib), "cpu_offload_gb": options.weights_gib / 2}
    theirs = Engine("offloaded by vLLM", offload, first)
    theirs.start(options)
    up = theirs.wait()
    # What vLLM leaves in HBM of the weights: it moves whole parameters, and no buffers.
    left = up.get("weights_bytes", 0) - up.get("offloaded_bytes", 0)
    bound = {"EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": str(left / GIB)}
    engines = [
        theirs,
        Engine("all in HBM, V1", kv(options.kv_gib), first),
        Engine("extended, V1", kv(options.kv_gib), {**bound, **first}),
        Engine("extended, V2", kv(options.kv_gib), {**bound, "VLLM_USE_V2_MODEL_RUNNER": "1"}),
    ]
    once = {**load(options, options.fitting), "repeat": 1}
    compare("weights twice HBM's", engines, [once], options)


def case_prefix(options: argparse.Namespace) -> None:
    """Compare orders of blocks where prompts come again, more than HBM's KV cache holds."""
    engine = {"enable_prefix_caching": True, "max_num_seqs": options.fitting // 2}
    size = extended(8 * options.kv_gib)
    engines = [
        Engine("waiting", {**engine, **kv(options.kv_gib)}),
        Engine("HBM first", {**engine, **kv(options.kv_gib)}, size),
        Engine(
            "offloading connector",
            {**engine, **kv(options.kv_gib), "kv_offloading_size": 8 * options.kv_gib},
        ),
        Engine(
            "vLLM's order",
            {**engine, **kv(options.kv_gib), "worker_cls": "egm_alloc.vllm.Worker"},
            {**size, "VLLM_PLUGINS": ""},
        ),
    ]
    loads = [load(options, n) for n in (options.fitting // 2, 4 * options.fitting)]
    compare("prompts that come again", engines, loads, options, same_tokens=False)


def case_two_gpus(options: argparse.Namespace) -> None:
    """Compare two GPUs that share a model, each with an extended part, with all in HBM."""
    two = {"tensor_parallel_size": 2}
    engines = [
        Engine("all in HBM", {**two, **kv(2 * options.kv_gib)}),
        Engine("extended", {**two, **kv(options.kv_gib)}, extended(options.kv_gib, gpus=2)),
    ]
    # A GPU has half of a token's KV: HBM holds twice the sequences.
    loads = [load(options, n * options.fitting) for n in (2, 3)]
    compare("two GPUs", engines, loads, options, together=True)


def case_start(options: argparse.Namespace) -> None:
    """Compare starts with and without 32 GiB of extended KV cache."""
    print("start with 32 GiB", flush=True)
    engines = [
        Engine("plain", kv(options.kv_gib)),
        Engine("32 GiB extended", kv(options.kv_gib), extended(32)),
    ]
    for _ in range(options.turns):
        for engine in engines:
            engine.start(options)
            engine.wait()
            engine.stop()
    starts = [statistics.median(engine.starts_s) for engine in engines if engine.starts_s]
    if len(starts) == 2:
        print(f"  = {starts[0]:.2f} s and {starts[1]:.2f} s: added {starts[1] - starts[0]:.2f} s")


def case_restart(options: argparse.Namespace) -> None:
    """Start an engine five times in one process and kill it; host memory must come back."""
    size = 8 * options.kv_gib
    print("restarts", flush=True)
    before = mem_available_bytes()
    for in_process in ("0", "1"):
        settings = {**extended(size), "VLLM_ENABLE_V1_MULTIPROCESSING": in_process}
        engine = Engine(f"multiprocessing {in_process}", kv(options.kv_gib), settings)
        engine.start(options)
        engine.wait()
        small = {**load(options, 2), "repeat": 1}
        for number in range(5):
            result = engine.serve({**small, "restart": number > 0})
            if "failed" in result:
                print(f"  start {number + 1} failed: {result['failed']}", flush=True)
                break
            held = (before - result["mem_available_bytes"]) / GIB
            print(f"  start {number + 1}: host memory taken {held:.2f} GiB", flush=True)
        engine.begin(load(options, 8 * options.fitting))
        time.sleep(2)
        engine.kill()
        time.sleep(3)
        print(f"  = missing after a kill in mid-run: {missing(before):.2f} GiB", flush=True)


def missing(before: int) -> float:
    """Return by how many GiB the host has less memory available than before."""
    return (before - mem_available_bytes()) / GIB


def sequences_per_hbm(options: argparse.Namespace) -> int:
    """Return how many sequences, when they are done, have as much KV as HBM's part has room for."""
    whole = (options.prompt + options.output) * options.kv_bytes_per_token
    return int(options.kv_gib * GIB / whole)


def load(options: argparse.Namespace, sequences: int) -> Load:
    """Return a load of so many sequences; a short one is served again and again."""
    repeat = max(1, 8 * options.fitting // sequences)
    return {
        "sequences": sequences,
        "prompt": options.prompt,
        "output": options.output,
        "repeat": repeat,
    }


CASES = {
    "idle": case_idle,
    "fitting": case_fitting,
    "kv": case_kv,
    "context": case_context,
    "weights": case_weights,
    "prefix": case_prefix,
    "start": case_start,
    "restart": case_restart,
    "two_gpus": case_two_gpus,
}


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_serving")
    parser.add_argument("--model", required=True, help="folder with the model's config.json")
    parser.add_argument(
        "--only",
        default=",".join(list(CASES)[:-1]),
        help=f"cases, separated by commas: {', '.join(CASES)} (default: all but the last)",
    )
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV cache in HBM")
    parser.add_argument("--kv-bytes-per-token", type=int, default=32768, help="all layers together")
    parser.add_argument(
        "--fitting",
        type=int,
        default=44,
        help="sequences that it holds, with a block to spare each",
    )
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of each")
    parser.add_argument("--output", type=int, default=128, help="output tokens of each")
    parser.add_argument("--weights-gib", type=float, default=1.6, help="the model's weights")
    parser.add_argument("--utilization", type=float, default=0.2)
    parser.add_argument("--turns", type=int, default=3, help="how often engines take turns")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts sooner")
    parser.add_argument("--attention", help="vLLM's attention backend")
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vllm_serving",
        help="a folder for what the engines say (default: %(default)s)",
    )
    options = parser.parse_args()
    names = options.only.split(",")
    if not set(names) <= set(CASES):
        parser.error(f"only is {options.only!r}; allowed: {', '.join(CASES)}")
    # What every engine has, unless its case says otherwise.
    options.engine = json.dumps(
        {
            "model": options.model,
            "gpu_memory_utilization": options.utilization,
            "enforce_eager": options.eager,
            "max_model_len": options.prompt + options.output,
            **({"attention_backend": options.attention} if options.attention else {}),
        }
    )
    for name in names:
        CASES[name](options)


if __name__ == "__main__":
    main()
