"""Whether a KV cache that was made is as the boundary says: by its strides, and by the driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

import egm_alloc
from egm_alloc.vllm.kv_cache import Boundary, least_chunk


def check_heads(tensors: Sequence[torch.Tensor], boundary: Boundary) -> None:
    """Ask the driver whether the blocks that should be in HBM are there.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        The allocations of the KV cache, one-dimensional, of one byte an element.
    boundary : Boundary
        Of this KV cache.

    Raises
    ------
    RuntimeError
        If a part of them is not.
    """
    for tensor in tensors:
        head = tensor[: boundary.head_bytes(tensor.numel())]
        if egm_alloc.info(tensor).backing == "managed":
            torch.cuda.synchronize()  # its pages may be on their way still
            wrong = egm_alloc.residency(head).host_bytes
        else:
            step = least_chunk(tensor.numel())
            chunks = [*range(0, head.numel(), step), *([head.numel() - 1] if head.numel() else [])]
            on_device = (
                egm_alloc.residency(head[at : at + 1]).memory_type == "device" for at in chunks
            )
            wrong = sum(step for it_is in on_device if not it_is)
        if wrong:
            raise RuntimeError(
                f"egm_alloc: {wrong} bytes of KV blocks below block {boundary.hbm_blocks} are not "
                "in HBM, where all of them should be: lower gpu_memory_utilization, or set "
                "EGM_ALLOC_VLLM_KV_GIB=0"
            )


def check_layout(
    views: Iterable[torch.Tensor | Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    boundary: Boundary,
) -> None:
    """Check that each layer keeps the blocks below the boundary in the head of its allocation.

    Parameters
    ----------
    views : iterable of torch.Tensor or sequence of torch.Tensor
        The layers' KV caches as the attention kernels see them.
    tensors : sequence of torch.Tensor
        The allocations behind them.
    boundary : Boundary
        Of this KV cache.

    Raises
    ------
    RuntimeError
        If the layout does not keep them there; says which to choose.
    """
    if boundary.hbm_blocks == 0:
        return
    heads = {
        tensor.untyped_storage().data_ptr(): boundary.head_bytes(tensor.numel())
        for tensor in tensors
    }
    flat = (
        view
        for entry in views
        for view in ([entry] if isinstance(entry, torch.Tensor) else entry)
        if view.numel() > 0
    )
    seen = set()
    for view in flat:
        start = view.untyped_storage().data_ptr()
        if start not in heads:
            raise RuntimeError(
                "egm_alloc: a layer's KV cache is in none of the tensors that the plugin placed: "
                "set EGM_ALLOC_VLLM_KV_GIB=0"
            )
        seen.add(start)
        if _end_of_blocks(view, boundary) - start > heads[start]:
            raise RuntimeError(
                f"egm_alloc: this layout of the KV cache (shape {tuple(view.shape)}, strides "
                f"{view.stride()}) does not begin with whole blocks, so HBM cannot hold the first "
                f"{boundary.hbm_blocks} of them: choose a layout with blocks outermost (from vLLM "
                "0.29 VLLM_KV_CACHE_LAYOUT=BLHNC, before another attention backend), or set "
                "EGM_ALLOC_VLLM_KV_GIB=0"
            )
    if len(seen) < len(heads):
        raise RuntimeError(
            f"egm_alloc: the layers use {len(seen)} of the {len(heads)} KV tensors that the plugin "
            "placed, so the layout of the others is not known: set EGM_ALLOC_VLLM_KV_GIB=0"
        )


def _end_of_blocks(view: torch.Tensor, boundary: Boundary) -> int:
    """Return the address behind the last byte of the blocks in HBM, in one layer's view."""
    # The dimension of blocks is the outermost whose size is that of the blocks; a block of vLLM's
    # may be several of the kernel's.
    dimensions = [d for d in range(view.dim()) if view.shape[d] % boundary.num_blocks == 0]
    if not dimensions:
        raise RuntimeError(
            f"egm_alloc: a KV cache of shape {tuple(view.shape)} has no dimension of "
            f"{boundary.num_blocks} blocks: set EGM_ALLOC_VLLM_KV_GIB=0"
        )
    blocks = max(dimensions, key=view.stride)
    per_block = view.shape[blocks] // boundary.num_blocks
    head = view.narrow(blocks, 0, boundary.hbm_blocks * per_block)
    last = sum((n - 1) * s for n, s in zip(head.shape, head.stride(), strict=True))
    return head.data_ptr() + (last + 1) * head.element_size()
