"""One vLLM engine with random weights: starts, then serves each load that it is told.

Run by vllm_serving.py in a process of its own, with vLLM's options as JSON on the command line. It
reads a load as JSON from each line, and answers each with a line of JSON behind ``RESULT``; the
first answer says how it started. A load with ``restart`` is served by a new engine in this process;
one with ``one_by_one`` lets each sequence be done before the next is asked for; one with
``zeros_from_block`` has the KV blocks from that number on zeroed before.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import logging
import random
import sys
import time
import zlib
from typing import Any


def mem_available_bytes() -> int:
    """Return what the kernel says can be had of host memory."""
    import psutil  # vLLM needs it too

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
    seconds, hashes, cached = 0.0, set(), 0
    for _ in range(load.get("repeat", 1)):
        start = time.perf_counter()
        outputs = [
            output
            for batch in ([[each] for each in prompts] if load.get("one_by_one") else [prompts])
            for output in llm.generate(batch, sampling, use_tqdm=False)
        ]
        seconds += time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        hashes.add(hashlib.sha256(json.dumps(tokens).encode()).hexdigest())
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
    return {
        "tokens_per_s": load.get("repeat", 1) * sum(map(len, tokens)) / seconds,
        "hashes": sorted(hashes),
        "distinct_tokens": len({token for sequence in tokens for token in sequence}),
        "cached_prompt_tokens": cached,
    }


def core_of(llm: Any) -> Any:
    """Return the engine core, or None if it is in another process."""
    client = getattr(llm.llm_engine, "engine_core", None)
    return getattr(client, "engine_core", None)


def most_extended_blocks(llm: Any) -> int | None:
    """Return the most extended KV blocks that were in use at a time since this was last asked.

    None if the engine core is in another process. The count is the free queue's, which the plugin
    has put in the place of vLLM's.
    """
    core = core_of(llm)
    if core is None:
        return None
    queue = core.scheduler.kv_cache_manager.block_pool.free_block_queue
    most = int(getattr(queue, "most_extended", 0))
    if most:
        queue.most_extended = 0
    return most


def runner_of(llm: Any) -> Any:
    """Return the model runner, or None if it is in another process."""
    core = core_of(llm)
    try:
        return core.model_executor.driver_worker.worker.model_runner
    except AttributeError:
        return None


def model_of(llm: Any) -> Any:
    """Return the model, or None if it is in another process."""
    return getattr(runner_of(llm), "model", None)


def zero_blocks(llm: Any, first: int) -> None:
    """Zero the KV blocks from a number on, in every layer; the engine must be in this process."""
    import torch

    with torch.inference_mode():  # as they may have been made
        for cache in runner_of(llm).kv_caches:
            cache[first:].zero_()


def weights_bytes(llm: Any) -> int:
    """Return the bytes of all parameters and buffers; 0 if the model is in another process."""
    model = model_of(llm)
    if model is None:
        return 0
    return sum(int(t.nbytes) for part in (model.parameters(), model.buffers()) for t in part)


def offloaded_bytes(llm: Any) -> int:
    """Return the bytes of the parameters on the host, moved by vLLM or by the plugin.

    0 if the model is in another process.
    """
    model = model_of(llm)
    if model is None:
        return 0
    by_vllm = sum(
        int(p.nbytes) for p in model.parameters() if getattr(p, "_vllm_is_uva_offloaded", False)
    )
    if "egm_alloc" not in sys.modules:
        return by_vllm
    import egm_alloc

    return by_vllm + sum(
        int(p.nbytes)
        for p in model.parameters()
        if p.is_cuda and egm_alloc.info(p.detach()).tag == "weights"
    )


def fill_weights(model: Any) -> None:
    """Give a model weights with which the next token depends on all of those before it.

    vLLM's dummy weights are so small that neither attention nor the layers change a token: with
    them a lost KV cache would not show. In place, and alike wherever the weights are. Norms are 1;
    the others are random, by the parameter's name: the embedding as large as what the layers add
    to it, queries and keys somewhat larger than usual, so that attention is not even.
    """
    import torch

    with torch.inference_mode():  # as they may have been made
        for name, parameter in model.named_parameters():
            data = parameter.data
            if data.dim() < 2:
                data.fill_(1)
                continue
            generator = torch.Generator(data.device).manual_seed(zlib.crc32(name.encode()))
            spread = 1.0 if "embed" in name else data.shape[-1] ** -0.5
            data.normal_(0, spread, generator=generator)
            if "qkv_proj" in name:
                data.mul_(1.5)


def answer(found: dict[str, Any]) -> None:
    """Print an answer."""
    print("RESULT " + json.dumps(found), flush=True)


def start(options: dict[str, Any]) -> tuple[Any, float]:
    """Start an engine, and return it and the seconds that it took.

    vLLM's own imports are not counted: they come before it asks for plugins, and vary a lot.
    """
    from vllm import LLM

    began = time.perf_counter()
    llm = LLM(
        **{
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "disable_log_stats": True,
            "enable_prefix_caching": False,
            "seed": 0,
            **options,
        }
    )
    took = time.perf_counter() - began
    llm.apply_model(fill_weights)
    return llm, took


def end(engines: list[Any]) -> None:
    """End the only engine as vLLM's own tests do, so that another may start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engines.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    """Start the engine, and serve until there are no more loads."""
    options = json.loads(sys.argv[1])
    before = mem_available_bytes()
    importlib.import_module("vllm")
    lines = Lines()
    logging.getLogger("vllm.egm_alloc").addHandler(lines)  # importing vLLM sets logging up anew
    llm, started = start(options)
    taken = before - mem_available_bytes()
    serve(llm, {"sequences": 2, "prompt": 16, "output": 4})
    answer(
        {
            "start_s": started,
            "host_bytes_taken": taken,
            "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "offloaded_bytes": offloaded_bytes(llm),
            "weights_bytes": weights_bytes(llm),
            "plugin_said": lines.texts,
        }
    )
    engines = [llm]
    del llm
    for line in sys.stdin:
        load = json.loads(line)
        if load.pop("restart", False):
            end(engines)
            engines.append(start(options)[0])
        (llm,) = engines
        if (first := load.pop("zeros_from_block", None)) is not None:
            zero_blocks(llm, first)
        most_extended_blocks(llm)
        result = serve(llm, load)
        result["extended_blocks"] = most_extended_blocks(llm)
        result["mem_available_bytes"] = mem_available_bytes()
        answer(result)
        del llm


if __name__ == "__main__":
    main()
