"""Where the blocks of the KV cache are: the first ones in HBM, the others on the host.

A block is a row of every layer's KV tensor, so the boundary is one block id, and in each tensor
the head is in HBM and the tail on the host. Needs torch, not vLLM: vLLM's objects are taken as
they come (``vllm/v1/kv_cache_interface.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import egm_alloc

# The most that a split tensor's head can be rounded by: chunks are 2 MiB, or a 1024th part of the
# tensor (csrc/core/chunks.cpp).
PAGE = 2 << 20
_MOST_CHUNKS = 1024
_LARGEST_PIECE = 16 << 20

# Makes a KV tensor of a size in bytes, with its head in HBM; what is in it is left open.
Maker = Callable[[int, torch.device, "Boundary"], torch.Tensor]


def _backings(config: Any) -> list[int]:
    """Return the size in bytes of each allocation of the KV cache; packed layers share one."""
    packed = [t.size for t in config.kv_cache_tensors if getattr(t, "block_stride", 0) > 0]
    return [
        *(t.size for t in config.kv_cache_tensors if getattr(t, "block_stride", 0) == 0),
        *packed[:1],
    ]


def least_chunk(size: int) -> int:
    """Return the least size in bytes of the chunks that a split tensor of this size is made of."""
    return max(PAGE, size // _MOST_CHUNKS // PAGE * PAGE)


def _rounding(size: int) -> int:
    return math.ceil(size / _MOST_CHUNKS) + PAGE


def stock_sizes(extended_bytes: int, layers: int) -> tuple[int, int]:
    """Return how much host memory to bring up ahead for KV tensors, and in which pieces.

    The driver takes up to a third longer for pieces of 2 MiB than for large ones, but who else
    wants something of it waits for one to be done, and what is left of a tensor's tail beside whole
    pieces comes up last. So they are of a few milliseconds, and a sixteenth of a tail at most.

    Parameters
    ----------
    extended_bytes : int
        The extended part of the KV cache, from 0 up.
    layers : int
        Tensors that share it evenly.

    Returns
    -------
    total, piece : int
        In bytes; no tensor's tail leaves pieces over.
    """
    layers = max(1, layers)
    piece = min(_LARGEST_PIECE, extended_bytes // layers // 16) // PAGE * PAGE
    piece = max(PAGE, piece)
    return max(0, extended_bytes - layers * piece), piece


@dataclass(frozen=True)
class Boundary:
    """Which blocks are in HBM.

    Parameters
    ----------
    num_blocks : int
        All blocks of the KV cache.
    hbm_blocks : int
        Blocks with ids below this one are in HBM, whole and in every layer.
    block_bytes : int
        Bytes of a block, summed over the layers.
    """

    num_blocks: int
    hbm_blocks: int
    block_bytes: int

    @property
    def extended_blocks(self) -> int:
        """The number of blocks that are not in HBM; one that straddles the boundary is of them."""
        return self.num_blocks - self.hbm_blocks

    def head_bytes(self, size: int) -> int:
        """Return the part in bytes of a tensor of `size` bytes that holds the blocks in HBM."""
        return self.hbm_blocks * (size // self.num_blocks)

    def device_fraction(self, size: int) -> float:
        """Return the part of a tensor to ask HBM for: its head, and room for rounding down."""
        if self.hbm_blocks == 0:
            return 0.0
        return min(1.0, (self.head_bytes(size) + _rounding(size)) / size)


def find_boundary(config: Any, extended_bytes: int) -> Boundary:
    """Return the boundary, alike in the engine core and in every worker.

    Parameters
    ----------
    config : KVCacheConfig
        vLLM's, with the final number of blocks.
    extended_bytes : int
        The extended memory that was added for the KV cache of each GPU.

    Returns
    -------
    Boundary
        HBM takes no more than vLLM found for the KV cache: rounding goes at the cost of blocks.
    """
    sizes = _backings(config)
    block_bytes = sum(size // config.num_blocks for size in sizes)
    extended = 0
    if extended_bytes > 0 and block_bytes > 0:
        wanted = extended_bytes + sum(map(_rounding, sizes))
        extended = min(config.num_blocks, math.ceil(wanted / block_bytes))
    return Boundary(config.num_blocks, config.num_blocks - extended, block_bytes)


def zero(tensors: Iterable[torch.Tensor]) -> None:
    """Fill tensors with zeros; the GPU does it while the caller goes on."""
    for tensor in tensors:
        tensor.zero_()


class Placement(TorchFunctionMode):
    """Within the block, KV tensors are made with their heads in HBM and their tails on the host.

    A KV tensor is recognised by its size, type and device: vLLM makes each by
    ``torch.zeros(size, dtype=torch.int8, device=...)``. They become zero only when vLLM is given
    the last of them: memory is mapped only once the GPU is done with what it was given before, and
    to fill the tails takes as long as the link needs.

    Parameters
    ----------
    config : KVCacheConfig
        vLLM's.
    boundary : Boundary
        Of this configuration.
    make : Maker
        `make_split` or `make_managed`.
    fill : callable, optional
        Takes all of them, once, and has them be zero.
    """

    def __init__(
        self,
        config: Any,
        boundary: Boundary,
        make: Maker,
        fill: Callable[[Sequence[torch.Tensor]], None] = zero,
    ) -> None:
        super().__init__()
        self._missing = Counter(_backings(config))
        self._boundary = boundary
        self._make = make
        self._fill = fill
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Make KV tensors our way; everything else passes."""
        kwargs = kwargs or {}
        size = args[0] if func is torch.zeros and len(args) == 1 else None
        if not isinstance(size, int) or kwargs.get("dtype") is not torch.int8:
            return func(*args, **kwargs)
        given = kwargs.get("device")
        device = torch.device(torch.get_default_device() if given is None else given)
        if device.type != "cuda" or self._missing[size] == 0:
            return func(*args, **kwargs)
        self._missing[size] -= 1
        tensor = self._make(size, device, self._boundary)
        self.tensors.append(tensor)
        if self._missing.total() == 0:
            self._fill(self.tensors)
        return tensor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the block; if it went well, all KV tensors must have been made in it."""
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if kind is None and self._missing.total() > 0:
            raise RuntimeError(
                f"egm_alloc: {self._missing.total()} of {len(self.tensors)} KV tensors were "
                "allocated in a way that the plugin does not know, so their blocks cannot be "
                "placed: set EGM_ALLOC_VLLM_KV_GIB=0"
            )


def make_split(size: int, device: torch.device, boundary: Boundary) -> torch.Tensor:
    """Return memory in one range of addresses, whose head is in HBM and whose tail is mapped."""
    fraction = boundary.device_fraction(size)
    with egm_alloc.place(
        "split", device_fraction=fraction, layout="head", tag="kv_cache", min_bytes=0
    ):
        return torch.empty(size, dtype=torch.int8, device=device)


def make_managed(size: int, device: torch.device, boundary: Boundary) -> torch.Tensor:
    """Return managed memory, with the advice that its head stays in HBM, its tail not."""
    with egm_alloc.place("managed", tag="kv_cache", min_bytes=0):
        tensor = torch.empty(size, dtype=torch.int8, device=device)
    head = boundary.head_bytes(size)
    for part, where in ((tensor[:head], "device"), (tensor[head:], "host")):
        egm_alloc.advise(part, preferred_location=where, accessed_by=("device", "host"))
        egm_alloc.prefetch(part, where)
    return tensor


def idle_bytes(device: int) -> int:
    """Return the extended memory that torch holds and no tensor uses.

    Up to 0.26 vLLM subtracts all that torch holds from what is in use on the GPU, and adds what
    tensors use, so this much it takes for HBM that is free.
    """
    return sum(
        backing.reserved_bytes - backing.allocated_bytes
        for backing in egm_alloc.stats(device).extended.values()
    )
