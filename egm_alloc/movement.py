"""Moving the memory of a tensor that lives: `prefetch`, `advise`, `migrate`.

The tensor's address and contents stay. Where it is placed to begin with is in ``placement.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from egm_alloc import _C
from egm_alloc.config import LOCATIONS, check_choice, check_device_fraction, check_field
from egm_alloc.control import KEEP, Keep
from egm_alloc.tensors import TensorInfo, info, span_bytes


def _require_backing(tensor: torch.Tensor, allowed: tuple[str, ...], instead: str) -> TensorInfo:
    found = info(tensor)
    if found.backing not in allowed:
        where = "in HBM by torch" if found.backing is None else f"in {found.backing!r} memory"
        where = "without bytes" if found.tier is None else where
        wanted = " or ".join(repr(backing) for backing in allowed)
        raise ValueError(f"tensor is {where}; allowed: a tensor in {wanted} memory ({instead})")
    return found


def prefetch(tensor: torch.Tensor, location: str, stream: torch.cuda.Stream | None = None) -> None:
    """Move the pages of a managed tensor to its device or to the host, in the order of a stream.

    Parameters
    ----------
    tensor : torch.Tensor
        A tensor in managed memory. Of a view only its part moves, in whole pages: what shares its
        first and last page moves along.
    location : {"device", "host"}
        Where to.
    stream : torch.cuda.Stream, optional
        The stream whose work this follows, of any device; default: the current one of the tensor's
        device.

    Raises
    ------
    TypeError, ValueError
        If `tensor` is not in managed memory, or another argument is not allowed.
    RuntimeError
        If the reserve of host memory leaves no room for what would move there; nothing moves then.
        If the stream is capturing a CUDA graph, or would wait for one that is. If the driver
        refuses.

    Notes
    -----
    cudaMemPrefetchAsync (CUDA Runtime API, "Memory Management"). Contents stay, and kernels of
    other streams may use the tensor meanwhile: they wait for, or fault back, the pages they touch.
    Pages move again on their own when they are touched; `advise` says where they should stay.

    Examples
    --------
    >>> egm_alloc.prefetch(cache, "host")
    """
    found = _require_backing(tensor, ("managed",), "other memory does not move by pages")
    location = check_choice("location", location, LOCATIONS, "'device' or 'host'")
    if stream is not None and not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"stream is {stream!r}; allowed: a torch.cuda.Stream, or None")
    if tensor.numel() == 0:
        return
    used = torch.cuda.current_stream(found.device) if stream is None else stream
    _C.prefetch(
        tensor.data_ptr(),
        span_bytes(tensor),
        found.device,
        location,
        used.cuda_stream,
        used.device_index,
    )


def advise(
    tensor: torch.Tensor,
    *,
    preferred_location: str | Keep | None = KEEP,
    accessed_by: Sequence[str] | Keep = KEEP,
    read_mostly: bool | Keep = KEEP,
) -> None:
    """Change the advice on the pages of a managed tensor.

    Parameters
    ----------
    tensor : torch.Tensor
        A tensor in managed memory. Of a view only its part is advised, in whole pages.
    preferred_location : {"device", "host"} or None, optional
        Where its pages should be; None lets the driver decide.
    accessed_by : sequence of {"device", "host"}, optional
        Who keeps its pages mapped; those left out no longer do.
    read_mostly : bool, optional
        Whether readers get copies of their own. What is not given stays as it is.

    Raises
    ------
    TypeError, ValueError
        If `tensor` is not in managed memory, or another argument is not allowed.
    RuntimeError
        If the reserve of host memory leaves no room for pages that are to be on the host; nothing
        is changed then. If the driver refuses; what came before in the order above is then changed.

    Notes
    -----
    cudaMemAdvise (CUDA C++ Programming Guide, "Data Usage Hints"). The advice is on the memory: it
    stays when torch reuses it for another tensor, until `torch.cuda.empty_cache` gives it back.
    `info` shows the advice that the segment was made with. Contents stay, and nothing is waited
    for: kernels of any stream may use the tensor meanwhile.

    Examples
    --------
    >>> egm_alloc.advise(cache, preferred_location="host", accessed_by=("device", "host"))
    """
    found = _require_backing(tensor, ("managed",), "advice is on managed memory only")
    if not isinstance(preferred_location, Keep):
        check_field("preferred_location", preferred_location, "preferred_location")
    wanted: list[str] | None = None
    if not isinstance(accessed_by, Keep):
        check_field("accessed_by", accessed_by, "accessed_by")
        wanted = list(accessed_by)
    if not isinstance(read_mostly, (bool, Keep)):
        raise TypeError(f"read_mostly is {read_mostly!r}; allowed: True or False")
    if tensor.numel() == 0:
        return
    _C.advise(
        tensor.data_ptr(),
        span_bytes(tensor),
        found.device,
        "keep" if isinstance(preferred_location, Keep) else preferred_location,
        wanted,
        None if isinstance(read_mostly, Keep) else read_mostly,
    )


def migrate(tensor: torch.Tensor, *, device_fraction: float) -> int:
    """Move parts of the segment of a tensor between HBM and host memory.

    Parameters
    ----------
    tensor : torch.Tensor
        A tensor in ``"split"`` or ``"numa"`` memory. The whole segment moves, whoever shares it: a
        split tensor has its own, ``"numa"`` tensors may share one.
    device_fraction : float
        The part of the segment that is to be in HBM, from 0 to 1; rounded down to whole chunks,
        which lie as the tensor's layout says (`place`).

    Returns
    -------
    int
        The bytes that moved.

    Raises
    ------
    TypeError, ValueError
        If `tensor` is in other memory, or `device_fraction` is not allowed.
    RuntimeError
        If the reserve of host memory leaves no room for what would move there. If HBM or the host
        is too short of memory; the tensor is whole then, and chunks that moved before stay moved
        (the message says how much). Both after what is cached was given back.
        During a CUDA graph capture, or within a ``use_mem_pool`` block.

    Notes
    -----
    Waits for all work of the device, then copies and remaps chunk by chunk (CUDA Driver API,
    "Virtual Memory Management"). Nobody may use the segment from another thread meanwhile. A split
    tensor's memory is brought back to its own fraction when torch reuses it, as far as HBM and the
    host have room then; ``"numa"`` memory keeps its parts where they are until
    `torch.cuda.empty_cache` gives it back.

    Examples
    --------
    >>> moved = egm_alloc.migrate(weights, device_fraction=0.75)
    """
    found = _require_backing(tensor, ("split", "numa"), "other memory does not move by parts")
    fraction = check_device_fraction("device_fraction", device_fraction)
    assert found.segment_address is not None
    assert found.segment_bytes is not None
    wanted = int(found.segment_bytes * fraction)
    return _C.migrate(found.segment_address, wanted, found.device)
