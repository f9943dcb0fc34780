"""The C pair ``managed_malloc`` / ``managed_free`` in the forms that torch takes."""

from __future__ import annotations

import functools
import os

import torch

from egm_alloc import _C
from egm_alloc.control import require_caching


@functools.cache
def pluggable_allocator() -> torch.cuda.memory.CUDAPluggableAllocator:
    """Return the C pair as a pluggable allocator: plain managed memory without torch's cache.

    Returns
    -------
    torch.cuda.memory.CUDAPluggableAllocator
        Always the same object, because memory made through it may outlive every other reference.

    Notes
    -----
    Given to ``torch.cuda.memory.change_current_allocator`` it replaces torch's caching allocator,
    and ours with it: statistics, snapshots, pools and CUDA graphs then raise or break, and every
    allocation goes to the driver. `mem_pool` keeps them. Where ``managed_malloc`` returns NULL,
    which torch does not look at, this one raises torch.cuda.OutOfMemoryError.

    Examples
    --------
    >>> torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
    """
    return torch.cuda.memory.CUDAPluggableAllocator(
        _C.__file__, "egm_alloc_pluggable_malloc", "managed_free"
    )


def mem_pool(**options: bool) -> torch.cuda.MemPool:
    """Return a pool of torch's caching allocator whose segments come from the C pair.

    Parameters
    ----------
    **options : bool
        Keywords of ``torch.cuda.MemPool`` other than the allocator, such as ``no_split``.

    Returns
    -------
    torch.cuda.MemPool
        For ``torch.cuda.use_mem_pool``. What is allocated in it is in managed memory whatever its
        size, and whether or not egm_alloc is enabled.

    Raises
    ------
    TypeError
        If this torch's MemPool does not know a keyword.
    RuntimeError
        If ``PYTORCH_NO_CUDA_MEMORY_CACHING`` is set: torch then ignores pools.

    Examples
    --------
    >>> pool = egm_alloc.mem_pool()
    >>> with torch.cuda.use_mem_pool(pool):
    ...     cache = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    """
    require_caching()
    return torch.cuda.MemPool(_pair().allocator(), **options)


@functools.cache
def _pair() -> torch.cuda.memory.CUDAPluggableAllocator:
    # A pool looks at NULL, and then gives back what is cached before it raises.
    return torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "managed_malloc", "managed_free")


def get_include() -> str:
    """Return the folder of the public C header ``egm_alloc.h``."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")
