"""What a start-up says about where things are, and what going beyond HBM costs."""

from __future__ import annotations

import logging
from typing import Any

import torch

import egm_alloc
from egm_alloc.vllm.kv_cache import Boundary
from egm_alloc.vllm.settings import KV, WEIGHTS
from egm_alloc.vllm.weights import fits_length_to_cache, kv_bytes_of_sequence

logger = logging.getLogger("vllm.egm_alloc")

_GIB = 1 << 30
_SAMPLE_BYTES = 256 << 20
_BEYOND_CACHES_BYTES = 128 << 20


def log_costs(
    worker: Any,
    kv_cache_config: Any,
    boundary: Boundary,
    extended_weights: int,
    bytes_per_second: float | None,
) -> None:
    """Log one block: weights and KV tokens per tier, the link, the time that each step loses.

    Parameters
    ----------
    worker, kv_cache_config : object
        vLLM's.
    boundary : Boundary
        Of this KV cache.
    extended_weights : int
        Bytes of the weights that are not in HBM.
    bytes_per_second : float or None
        How fast the GPU reads host memory; None: to be found out with the weights.
    """
    device = worker.device.index
    extended_kv = boundary.extended_blocks * boundary.block_bytes
    if extended_weights == 0 and extended_kv == 0:
        return
    # With layers of several kinds a token takes blocks of each, and with context parallelism ranks
    # share its blocks: vLLM alone knows how many.
    tokens_a_block = 0
    parallel = worker.parallel_config
    ranks = getattr(parallel, "decode_context_parallel_size", 1) * getattr(
        parallel, "prefill_context_parallel_size", 1
    )
    if len(kv_cache_config.kv_cache_groups) == 1 and ranks == 1:
        tokens_a_block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size

    def kv_part(blocks: int) -> str:
        tokens = f", {blocks * tokens_a_block} tokens" if tokens_a_block else ""
        return f"{_gib(blocks * boundary.block_bytes)} ({blocks} blocks{tokens})"

    lines = [
        f"egm_alloc on cuda:{device} ({torch.cuda.get_device_name(device)}):",
        f"  weights: {_gib(_weights_in_hbm(worker, extended_weights))} in HBM, "
        f"{_gib(extended_weights)} on the host",
        f"  KV cache: {kv_part(boundary.hbm_blocks)} in HBM, "
        f"{kv_part(boundary.extended_blocks)} on the host",
    ]
    speed = bytes_per_second
    if speed is None and (sample := _sample_of_weights(worker)) is not None:
        speed = read_bytes_per_second(sample)
    if speed is not None:
        lines.append(f"  link: the GPU reads host memory at {speed / 1e9:.1f} GB/s")
        if extended_weights:
            lost = extended_weights / speed * 1e3
            lines.append(f"  cost: each step reads the weights on the host, {lost:.1f} ms")
        if extended_kv:
            lines.append(
                "  cost: a step also reads the extended KV of its requests, "
                f"{_GIB / speed * 1e3:.1f} ms per GiB, {extended_kv / speed * 1e3:.1f} ms for all "
                "of it; none while the blocks in HBM suffice"
            )
    logger.info("\n".join(lines))


def warn_of_small_kv_cache(worker: Any, in_hbm: int, extended: int, extended_weights: int) -> None:
    """Say what to change if the KV cache cannot hold a sequence: vLLM's own error names other ways.

    Parameters
    ----------
    worker : object
        vLLM's.
    in_hbm, extended : int
        Bytes for the KV cache in HBM, below zero if activations lack room too, and on the host.
    extended_weights : int
        Bytes of the weights that are not in HBM.
    """
    config = worker.vllm_config
    length = 1 if fits_length_to_cache(config) else config.model_config.max_model_len
    needed = kv_bytes_of_sequence(config, length)
    if in_hbm > 0 and in_hbm + extended >= needed:
        return
    ways = "a lower max_num_batched_tokens or max_num_seqs, a higher gpu_memory_utilization"
    if in_hbm > 0:
        ways = f"a lower max_model_len, more {KV}"
    weights = _weights_in_hbm(worker, extended_weights)
    if weights >= _GIB // 100:
        ways = f"a {WEIGHTS} below the {_gib(weights)} that the weights take now, {ways}"
    logger.warning(
        "egm_alloc: HBM has %s left for the KV cache and the host %s, and a sequence of %d tokens "
        "needs about %s. What helps: %s",
        _gib(max(0, in_hbm)),
        _gib(extended),
        length,
        _gib(needed),
        ways,
    )


def _weights_in_hbm(worker: Any, extended: int) -> int:
    return int(worker.model_runner.model_memory_usage) - extended


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _sample_of_weights(worker: Any) -> torch.Tensor | None:
    """Return a part of a parameter on the host, as large as the sample if there is one."""
    on_host = [
        p.untyped_storage()
        for p in worker.model_runner.model.parameters()
        if p.is_cuda and egm_alloc.info(p.detach()).tag == "weights"
    ]
    if not on_host:
        return None
    largest = max(on_host, key=lambda storage: storage.nbytes())
    everything = torch.empty(0, dtype=torch.int8, device=worker.device).set_(largest)
    return everything[:_SAMPLE_BYTES]


def read_speed_of_tail(tensor: torch.Tensor, boundary: Boundary) -> float | None:
    """Return how fast kernels read the part of a KV tensor that is on the host.

    Parameters
    ----------
    tensor : torch.Tensor
        An allocation of the KV cache, one-dimensional, of one byte an element.
    boundary : Boundary
        Of this KV cache.

    Returns
    -------
    float or None
        In bytes per second; None if that could not be found out, which the log says.
    """
    tail = tensor[boundary.head_bytes(tensor.numel()) :]
    try:
        return read_bytes_per_second(tail[-_SAMPLE_BYTES:])
    except Exception:  # a report must not end a start that goes well
        logger.exception("egm_alloc: the speed of the link could not be found out")
        return None


def read_bytes_per_second(tensor: torch.Tensor) -> float:
    """Return how fast kernels read memory; takes some tens of milliseconds.

    Parameters
    ----------
    tensor : torch.Tensor
        Bytes on a GPU, one-dimensional, at least 8.

    Returns
    -------
    float
        Of the best of three readings, in bytes per second; of the first one of what may be in a
        cache then.
    """
    torch.zeros(8, dtype=torch.int64, device=tensor.device).max()  # loads the kernel
    start = -tensor.data_ptr() % 8
    words = tensor[start : start + (tensor.numel() - start) // 8 * 8].view(torch.int64)
    times = []
    for _ in range(3 if tensor.numel() >= _BEYOND_CACHES_BYTES else 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        words.max()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(words.numel() * 8 / max(min(times), 1e-9))
