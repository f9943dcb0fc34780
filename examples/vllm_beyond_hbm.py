"""vLLM with more than HBM holds: one long context, a larger model, or many sequences.

    python examples/vllm_beyond_hbm.py long-context --model MODEL --kv-gib 32
    python examples/vllm_beyond_hbm.py larger-model --model MODEL --weights-hbm-gib 40
    python examples/vllm_beyond_hbm.py many-sequences --model MODEL --kv-gib 64

The settings are environment variables, set before vLLM starts; with ``vllm serve`` they are set in
the shell (docs/vllm.md). What each start-up log block says is what the choice costs.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any


def main() -> None:
    """Run one of the cases."""
    parser = argparse.ArgumentParser(prog="vllm_beyond_hbm.py")
    parser.add_argument("case", choices=["long-context", "larger-model", "many-sequences"])
    parser.add_argument("--model", required=True, help="a folder or a name that vLLM knows")
    parser.add_argument("--kv-gib", type=float, default=8.0, help="extended KV cache")
    parser.add_argument("--weights-hbm-gib", type=float, help="what weights may take of HBM")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the long context")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--output", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--dummy", action="store_true", help="random weights; needs config.json")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enforce-eager", action="store_true", help="starts sooner, runs slower")
    options = parser.parse_args()

    engine: dict[str, Any] = {
        "model": options.model,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager,
    }
    if options.dummy:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True}
    sequences, prompt = 4, 128
    if options.case == "larger-model":
        if options.weights_hbm_gib is None:
            parser.error("larger-model needs --weights-hbm-gib")
        os.environ["EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB"] = str(options.weights_hbm_gib)
    else:
        os.environ["EGM_ALLOC_VLLM_KV_GIB"] = str(options.kv_gib)
    if options.case == "long-context":
        # The model must have been trained for it; HBM's KV cache alone need not hold it.
        engine["max_model_len"] = options.context
        sequences, prompt = 1, options.context - options.output
    elif options.case == "many-sequences":
        engine["max_num_seqs"] = sequences = options.sequences

    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    prompts = [
        {"prompt_token_ids": [(7 * number + at) % 30000 + 10 for at in range(prompt)]}
        for number in range(sequences)
    ]
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=options.output,
        ignore_eos=True,
        detokenize=not options.dummy,
    )
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(
        f"{sequences} sequences of {prompt} tokens: {tokens} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
