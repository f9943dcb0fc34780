"""Which host memory is used, and how much of it."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from typing import Any, TypeVar

import torch

from egm_alloc import _C
from egm_alloc.vllm import kv_cache
from egm_alloc.vllm.settings import BACKING, KV, Settings

logger = logging.getLogger("vllm.egm_alloc")

_GIB = 1 << 30
_T = TypeVar("_T")


def weights_backing(settings: Settings, device: int) -> str:
    """Return the kind of memory for weights: one that the GPU reads where it is, without faults."""
    if settings.backing != "auto":
        return settings.backing
    suits, _ = _C.choose_backing(device)
    return "numa" if suits == "numa" else "pinned"


def kv_maker(settings: Settings, device: int) -> kv_cache.Maker:
    """Return what makes a KV tensor with its head in HBM: by mapping, or by advice."""
    maps_host_nodes = _C.device_traits(device)["host_numa_vmm"]
    if settings.backing == "numa" or (settings.backing == "auto" and maps_host_nodes):
        return kv_cache.make_split
    return kv_cache.make_managed


def check_backing(settings: Settings, device: int) -> None:
    """Refuse memory of a host NUMA node where the driver cannot map it.

    Raises
    ------
    ValueError
        Names the setting and what may be chosen.
    """
    if settings.backing == "numa" and not _C.device_traits(device)["host_numa_vmm"]:
        raise ValueError(
            f"{BACKING} is 'numa', and this driver cannot map memory of a host NUMA node: choose "
            "'managed', 'auto' or, for weights alone, 'pinned'"
        )


def extends_kv(settings: Settings, device: int) -> bool:
    """Return whether anything is added to the KV cache; with ``auto``, not over PCIe."""
    if settings.kv_bytes == "auto":
        return _C.choose_backing(device)[0] != "pinned"
    return settings.kv_bytes > 0


def _spare_bytes(settings: Settings) -> tuple[int, str]:
    """Return what the host can give without cutting into the reserve, and what limits it."""
    carveout, booked = _C.egm_carveout(), _C.host_bookings()
    if carveout is not None and settings.backing in ("auto", "numa"):
        left = carveout - booked["others_carveout_bytes"]
        return max(0, left), "the carve-out of Extended GPU Memory"
    found = _C.host_memory()
    spare = found["available_bytes"] - found["reserve_bytes"] - booked["promised_bytes"]
    spare -= booked["others_promised_bytes"] + booked["others_pending_bytes"]
    return max(0, spare), found["limited_by"]


def check_room(size: int, settings: Settings) -> int:
    """Refuse an extended KV cache that the host has no room for now, before weights are loaded.

    Parameters
    ----------
    size : int
        The bytes that this worker wants.
    settings : Settings
        The plugin's.

    Returns
    -------
    int
        The bytes that the host has room for.

    Raises
    ------
    RuntimeError
        If they would cut into the reserve; names the setting and what is left.
    """
    spare, limit = _spare_bytes(settings)
    if size > spare:
        raise _no_room(f"{size / _GIB:.2f}", spare, f"the reserve ({limit})")
    return spare


def check_room_of_all(size: int, spare: int) -> None:
    """Refuse what the workers of a host want together and it has no room for; all meet in it.

    Parameters
    ----------
    size : int
        The bytes that this worker wants.
    spare : int
        What `check_room` found before this worker took anything. The worker that asked first saw
        what was there before any of them did.

    Raises
    ------
    RuntimeError
        In each worker of that host, with the numbers.
    """
    all_of_them = _of_all((socket.gethostname(), size, spare))
    here = [each for each in all_of_them if each[0] == socket.gethostname()]
    wanted, room = sum(each[1] for each in here), max(each[2] for each in here)
    if wanted > room:
        raise _no_room(f"{size / _GIB:.2f} on each of {len(here)} GPUs", room, "the reserve")


def _no_room(wanted: str, room: int, reserve: str) -> RuntimeError:
    return RuntimeError(
        f"egm_alloc: {KV} is {wanted}, and the host has room for {room / _GIB:.2f} GiB beside "
        f"{reserve}: lower it, or EGM_ALLOC_HOST_RESERVE_GIB"
    )


def kv_bytes(worker: Any, settings: Settings) -> int:
    """Return the extended bytes for the KV cache of one GPU, alike in all workers.

    With ``auto``: none where the GPU reaches host memory over PCIe, because there a KV cache on
    the host makes serving slower than waiting; else half of what the host can spare, divided among
    its GPUs.
    """
    if settings.kv_bytes != "auto":
        return settings.kv_bytes
    if not extends_kv(settings, worker.device.index):
        _, reason = _C.choose_backing(worker.device.index)
        logger.info(
            "egm_alloc: %s=auto adds nothing to the KV cache: %s, and waiting for blocks in HBM is "
            "faster than that. Give a number of GiB to have them all the same.",
            KV,
            reason,
        )
        return 0
    found = _of_all((socket.gethostname(), _spare_bytes(settings)[0]))
    gpus = Counter(hostname for hostname, _ in found)
    # The least of all, so that they have the same boundary.
    return min(spare // 2 // gpus[hostname] // _GIB * _GIB for hostname, spare in found)


def _of_all(mine: _T) -> list[_T]:
    """Return what each worker gives."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group().cpu_group
    found = [mine] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, mine, group=group)
    return found
