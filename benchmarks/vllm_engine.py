"""One vLLM engine with dummy weights: starts, then serves each load that it is told.

Run by vllm_serving.py in a process of its own, with vLLM's options as JSON on the command line. It
reads a load as JSON from each line, and answers each with a line of JSON behind ``RESULT``; the
first answer says how it started.
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


def serve(llm: Any, load: dict[str, int]) -> dict[str, Any]:
    """Serve a load and return how fast, and what identifies its tokens."""
    from vllm import SamplingParams

    rng = random.Random(load["sequences"])
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 32000) for _ in range(load["prompt"])]}
        for _ in range(load["sequences"])
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=load["output"], ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    for _ in range(load.get("repeat", 1)):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = (time.perf_counter() - start) / load.get("repeat", 1)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "tokens_per_s": sum(map(len, tokens)) / seconds,
        "hash": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "distinct_tokens": len({token for sequence in tokens for token in sequence}),
        "cached_prompt_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
    }


def answer(found: dict[str, Any]) -> None:
    """Print an answer."""
    print("RESULT " + json.dumps(found), flush=True)


def main() -> None:
    """Start the engine, and serve until there are no more loads."""
    before = mem_available_bytes()
    from vllm import LLM

    lines = Lines()
    logging.getLogger("vllm.egm_alloc").addHandler(lines)  # importing vLLM sets logging up anew
    start = time.perf_counter()
    llm = LLM(
        **{
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "seed": 0,
            **json.loads(sys.argv[1]),
        }
    )
    started = time.perf_counter() - start
    taken = before - mem_available_bytes()
    serve(llm, {"sequences": 2, "prompt": 16, "output": 4})
    cache = llm.llm_engine.vllm_config.cache_config
    answer(
        {
            "start_s": started,
            "host_bytes_taken": taken,
            "blocks": cache.num_gpu_blocks,
            "plugin_said": lines.texts,
        }
    )
    for line in sys.stdin:
        seen = len(lines.texts)
        result = serve(llm, json.loads(line))
        # Seen only where the engine core is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
        result["extended_blocks_used"] = any("in use now" in text for text in lines.texts[seen:])
        answer(result)


if __name__ == "__main__":
    main()
