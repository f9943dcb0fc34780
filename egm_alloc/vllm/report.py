"""What a start-up says about where things are, and what going beyond HBM costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

import egm_alloc
from egm_alloc.vllm.kv_cache import Boundary

logger = logging.getLogger("vllm.egm_alloc")

_GIB = 1 << 30
_SAMPLE_BYTES = 256 << 20


def log_costs(worker: Any, boundary: Boundary, kv_tensors: Sequence[torch.Tensor]) -> None:
    """Log one block: weights and KV tokens per tier, the link, the time that each step loses."""
    device = worker.device.index
    tags = egm_alloc.stats(device).tags
    extended_weights = tags["weights"].allocated_bytes if "weights" in tags else 0
    extended_kv = boundary.extended_blocks * boundary.block_bytes
    if extended_weights == 0 and extended_kv == 0:
        return
    sample = _sample(worker, boundary, kv_tensors)
    speed = read_bytes_per_second(sample)
    tokens = worker.cache_config.block_size
    lines = [
        f"egm_alloc on cuda:{device}:",
        _line("weights", worker.model_runner.model_memory_usage - extended_weights)
        + f" in HBM, {extended_weights / _GIB:.2f} GiB on the host",
        _line("KV cache", boundary.hbm_blocks * boundary.block_bytes)
        + f" in HBM ({boundary.hbm_blocks} blocks, {boundary.hbm_blocks * tokens} tokens), "
        f"{extended_kv / _GIB:.2f} GiB on the host ({boundary.extended_blocks} blocks, "
        f"{boundary.extended_blocks * tokens} tokens)",
        f"  link: the GPU reads host memory at {speed / 1e9:.1f} GB/s",
    ]
    if extended_weights:
        lines.append(
            f"  cost: each step reads the weights on the host, {extended_weights / speed * 1e3:.1f}"
            " ms"
        )
    if extended_kv:
        lines.append(
            f"  cost: a step also reads the extended KV of its requests, {_GIB / speed * 1e3:.1f} "
            f"ms per GiB, {extended_kv / speed * 1e3:.1f} ms for all of it; none while the blocks "
            "in HBM suffice"
        )
    logger.info("\n".join(lines))


def _line(name: str, in_hbm: int) -> str:
    return f"  {name}: {in_hbm / _GIB:.2f} GiB"


def _sample(worker: Any, boundary: Boundary, kv_tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a tensor on the host, as large as the sample if there is one."""
    if kv_tensors:
        tail = kv_tensors[0][boundary.head_bytes(kv_tensors[0].numel()) :]
        return tail[-_SAMPLE_BYTES:] if tail.numel() > _SAMPLE_BYTES else tail
    parameters = (p.detach() for p in worker.model_runner.model.parameters())
    on_host = [p for p in parameters if egm_alloc.info(p).tag == "weights"]
    largest: torch.Tensor = max(on_host, key=lambda p: p.numel() * p.element_size())
    return largest.view(-1).view(torch.int8) if largest.is_contiguous() else largest


def read_bytes_per_second(tensor: torch.Tensor) -> float:
    """Return how fast kernels read a tensor; takes some tens of milliseconds.

    Parameters
    ----------
    tensor : torch.Tensor
        On a GPU, of some 100 MiB: of a smaller one the second reading may come from a cache.

    Returns
    -------
    float
        The best of three readings, in bytes per second.
    """
    flat = tensor
    if tensor.is_contiguous() and tensor.dtype == torch.int8 and tensor.numel() >= 8:
        at = -tensor.data_ptr() % 8
        flat = tensor.view(-1)[at : at + (tensor.numel() - at) // 8 * 8].view(torch.int64)
    nbytes = flat.numel() * flat.element_size()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        flat.max()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(nbytes / max(min(times), 1e-9))
