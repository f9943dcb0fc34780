"""One vLLM engine with dummy weights: starts, serves the loads that it is told, says what it saw.

Run by vllm_serving.py in a process of its own; reads one JSON object from its command line and
prints one, behind ``RESULT``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sys
import time
from typing import Any

import psutil  # vLLM needs it too


def mem_available_bytes() -> int:
    """Return what the kernel says can be had of host memory."""
    return int(psutil.virtual_memory().available)


class Lines(logging.Handler):
    """Keeps what the plugin logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.texts.append(record.getMessage())


def serve(llm: Any, load: dict[str, int], rounds: int) -> dict[str, Any]:
    """Serve a load some times and return its speeds, and what identifies its tokens."""
    from vllm import SamplingParams

    rng = random.Random(load["sequences"])
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 32000) for _ in range(load["prompt"])]}
        for _ in range(load["sequences"])
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=load["output"], ignore_eos=True, detokenize=False
    )
    speeds, hashes, distinct = [], set(), 0
    for _ in range(rounds):
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        speeds.append(sum(map(len, tokens)) / seconds)
        hashes.add(hashlib.sha256(json.dumps(tokens).encode()).hexdigest())
        distinct = len({token for sequence in tokens for token in sequence})
    return {
        **load,
        "tokens_per_s": speeds,
        "hashes": sorted(hashes),
        "distinct_tokens": distinct,
    }


def main() -> None:
    """Do what the command line says."""
    job = json.loads(sys.argv[1])
    lines = Lines()
    logging.getLogger("vllm.egm_alloc").addHandler(lines)
    before = mem_available_bytes()
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(
        **{
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "seed": 0,
            **job["engine"],
        }
    )
    started = time.perf_counter() - start
    resident = before - mem_available_bytes()
    warm_up = {"sequences": 2, "prompt": 16, "output": 4}
    serve(llm, warm_up, rounds=1)
    loads = []
    for load in job["loads"]:
        seen = len(lines.texts)
        result = serve(llm, load, job["rounds"])
        # Seen only where the engine core is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
        result["extended_blocks_used"] = any("in use now" in text for text in lines.texts[seen:])
        loads.append(result)
    cache = llm.llm_engine.vllm_config.cache_config
    found = {
        "start_s": started,
        "host_bytes_taken": resident,
        "blocks": cache.num_gpu_blocks,
        "loads": loads,
        "plugin_said": lines.texts,
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
