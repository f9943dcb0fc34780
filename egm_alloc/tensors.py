"""Where one tensor lives: by our books (`info`) and by the system's (`residency`)."""

from __future__ import annotations

import dataclasses

import torch
from torch._subclasses import FakeTensor

from egm_alloc import _C
from egm_alloc.placement import tag_name


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's storage was placed.

    Parameters
    ----------
    tier : {"device", "extended"} or None
        ``"device"`` also for the backing ``"device"``, which `stats` counts with the extended
        tier's. None if the storage has no bytes and so no memory.
    backing : str or None
        How its memory was had; None for torch's own in the device tier.
    device : int
        The index of the tensor's device.
    segment_address, segment_bytes : int or None
        The segment that holds the storage; None where `backing` is None.
    preferred_location : {"device", "host"} or None
        The advice that a managed segment was made with; `advise` does not show.
    accessed_by : tuple of {"device", "host"}
        Likewise.
    prefetched : bool
        Whether the segment was prefetched to the device when it was made.
    owner : {"torch", "pair"} or None
        Who asked for the segment: torch's cache or the C pair.
    spilled : bool
        Whether it is there because HBM could not hold it.
    tag : str or None
        The tag of the `place` block that placed it.
    on_device_bytes : int or None
        Of a ``"numa"`` or ``"split"`` segment, the bytes that are in HBM.
    """

    tier: str | None
    backing: str | None
    device: int
    segment_address: int | None
    segment_bytes: int | None
    preferred_location: str | None
    accessed_by: tuple[str, ...]
    prefetched: bool
    owner: str | None
    spilled: bool = False
    tag: str | None = None
    on_device_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Residency:
    """Where a tensor's pages are now, in bytes of whole pages.

    Parameters
    ----------
    memory_type : {"managed", "device", "host", "unregistered"}
        What the driver says the memory is.
    host_bytes : int
        Bytes in pages that the kernel has on a NUMA node of the host.
    device_node_bytes : int
        Bytes in pages on the NUMA node that is the GPU's memory; only coherent machines
        (GH200, GB200) show one.
    unmapped_bytes : int
        Bytes in pages that are not mapped for the CPU. Of managed memory on a PCIe machine that
        means: in HBM, or not populated yet.
    """

    memory_type: str
    host_bytes: int
    device_node_bytes: int
    unmapped_bytes: int


def require_cuda_tensor(tensor: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `tensor` is a strided tensor on a CUDA device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}; allowed: a torch.Tensor")
    if tensor.device.type != "cuda":
        raise ValueError(f"tensor is on {tensor.device}; allowed: a tensor on a CUDA device")
    if tensor.is_nested:
        raise ValueError(
            "tensor is a nested tensor; allowed: one that is not (ask about those of its unbind())"
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f"tensor has the layout {tensor.layout}; allowed: torch.strided "
            "(ask about the parts of a sparse tensor, such as its values())"
        )
    if not _has_memory(tensor):
        raise ValueError(
            f"tensor is a {type(tensor).__name__} without memory of its own; allowed: one with "
            "storage (of a DTensor ask about to_local())"
        )


def _has_memory(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, FakeTensor):  # torch warns whoever asks for its address
        return False
    try:
        return tensor.data_ptr() != 0 or span_bytes(tensor) == 0
    except (RuntimeError, NotImplementedError):  # of a DTensor, within vmap
        return False


def span_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last; 0 without any.

    No more than its storage has: ``untyped_storage().resize_()`` leaves the shape as it was. FSDP
    resizes it to 0.
    """
    if tensor.numel() == 0:
        return 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    size = tensor.element_size()
    behind = tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * size
    return max(0, min((last + 1) * size, behind))


def info(tensor: torch.Tensor) -> TensorInfo:
    """Return where the storage of a tensor was placed.

    Parameters
    ----------
    tensor : torch.Tensor
        A tensor of any shape and dtype on a CUDA device. A view has its base's placement.

    Returns
    -------
    TensorInfo

    Raises
    ------
    TypeError
        If `tensor` is not a tensor.
    ValueError
        If it is not a strided tensor on a CUDA device.

    Examples
    --------
    >>> cache = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
    >>> egm_alloc.info(cache).tier
    'extended'
    """
    require_cuda_tensor(tensor)
    storage = tensor.untyped_storage()
    segment = _C.segment_of(storage.data_ptr()) if storage.nbytes() > 0 else None
    if segment is None:
        return TensorInfo(
            tier="device" if storage.nbytes() > 0 else None,
            backing=None,
            device=tensor.device.index,
            segment_address=None,
            segment_bytes=None,
            preferred_location=None,
            accessed_by=(),
            prefetched=False,
            owner=None,
        )
    return TensorInfo(
        tier="device" if segment["backing"] == "device" else "extended",
        backing=segment["backing"],
        device=segment["device"],
        segment_address=segment["address"],
        segment_bytes=segment["size_bytes"],
        preferred_location=segment["preferred_location"],
        accessed_by=segment["accessed_by"],
        prefetched=segment["prefetched"],
        owner=segment["owner"],
        spilled=segment["spilled"],
        tag=tag_name(segment["tag"]) if segment["tag"] else None,
        on_device_bytes=segment["on_device_bytes"],
    )


def residency(tensor: torch.Tensor) -> Residency:
    """Ask the driver and the kernel where the pages of a tensor are now.

    Parameters
    ----------
    tensor : torch.Tensor
        A tensor of any shape and dtype on a CUDA device.

    Returns
    -------
    Residency
        Of the pages from the tensor's first element to its last, so of a view only its part. No
        bytes for a tensor without elements or storage.

    Raises
    ------
    TypeError
        If `tensor` is not a tensor.
    ValueError
        If it is not a strided tensor on a CUDA device.

    Notes
    -----
    Pages move on their own: kernels that still run may change the answer, so synchronise first.
    The sources are cudaPointerGetAttributes (CUDA Runtime API, "Unified Addressing") and
    move_pages(2), which without target nodes only reports. Managed pages on the host show there
    when they are mapped for the CPU, which the advice ``accessed_by=("host",)`` sees to. Of
    memory in ``"numa"`` and ``"split"`` the kernel knows nothing, so all of it counts as unmapped:
    ask ``info(tensor).on_device_bytes``.
    """
    require_cuda_tensor(tensor)
    size_bytes = span_bytes(tensor)
    if size_bytes == 0:
        return Residency("unregistered", host_bytes=0, device_node_bytes=0, unmapped_bytes=0)
    return Residency(**_C.residency(tensor.data_ptr(), size_bytes, tensor.device.index))
