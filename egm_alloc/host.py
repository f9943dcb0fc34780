"""What the host has, and what its kernel allows this process."""

from __future__ import annotations

import dataclasses
import re

from egm_alloc import _C, machine


@dataclasses.dataclass(frozen=True)
class HostDiagnosis:
    """The host's memory and what the kernel lets this process do with it.

    Parameters
    ----------
    total_bytes, available_bytes : int or None
        What this process may use, within control groups and without GPU memory, and what can be
        taken of it; None where the kernel does not say.
    limited_by : str or None
        Which limit leaves just that available.
    reserve_bytes : int or None
        What must stay free of it (``host_reserve_gib``).
    promised_bytes : int
        What managed memory of this process may still take of the available.
    other_processes : int
        How many other processes have booked host memory that the kernel does not show as taken.
    others_bytes : int
        How much that is: promised to their managed memory, or to requests under way.
    sharing_problem : str or None
        Why other processes' bookings are not seen, if they are not.
    egm_bytes : int or None
        What the firmware set aside for the GPU (Extended GPU Memory); None for nothing.
    numa_nodes : tuple of int
        The NUMA nodes that are online; empty where the kernel does not say.
    huge_pages : {"always", "madvise", "never"} or None
        The setting of transparent huge pages; None for a kernel without them.
    may_bind_memory : bool
        Whether mbind(2) is allowed: pinned memory then comes from the node next to the GPU.
    may_ask_for_pages : bool
        Whether move_pages(2) is allowed: `residency` needs it.
    """

    total_bytes: int | None
    available_bytes: int | None
    limited_by: str | None
    reserve_bytes: int | None
    promised_bytes: int
    other_processes: int
    others_bytes: int
    sharing_problem: str | None
    egm_bytes: int | None
    numa_nodes: tuple[int, ...]
    huge_pages: str | None
    may_bind_memory: bool
    may_ask_for_pages: bool


def _parse_nodes(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``"0-1,8"``."""
    nodes: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        nodes.extend(range(int(first), int(last or first) + 1))
    return tuple(nodes)


def diagnose_host(root: str = "") -> HostDiagnosis:
    """Read what the kernel says about the host.

    Parameters
    ----------
    root : str
        Goes before ``/sys`` for the kernel's settings.

    Returns
    -------
    HostDiagnosis
    """
    try:
        memory = _C.host_memory()
    except RuntimeError:
        memory = None
    # Without a driver nothing is booked, here or elsewhere.
    booked = _C.host_bookings() if machine.has_driver() else None
    # By the extension, so that it is the host that the allocator sees, a simulated one too.
    setting = _C.read_kernel_file(f"{root}/sys/kernel/mm/transparent_hugepage/enabled")
    online = _C.read_kernel_file(f"{root}/sys/devices/system/node/online")
    chosen = re.search(r"\[(\w+)\]", setting or "")
    return HostDiagnosis(
        total_bytes=memory["total_bytes"] if memory else None,
        available_bytes=memory["available_bytes"] if memory else None,
        limited_by=memory["limited_by"] if memory else None,
        reserve_bytes=memory["reserve_bytes"] if memory else None,
        promised_bytes=booked["promised_bytes"] if booked else 0,
        other_processes=booked["other_processes"] if booked else 0,
        others_bytes=booked["others_promised_bytes"] + booked["others_pending_bytes"]
        if booked
        else 0,
        sharing_problem=booked["problem"] if booked else None,
        egm_bytes=_C.egm_carveout(),
        numa_nodes=_parse_nodes(online or ""),
        huge_pages=chosen[1] if chosen else None,
        may_bind_memory=_C.may_bind_memory(),
        may_ask_for_pages=_C.may_ask_for_pages(),
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel driver, or None where it is not visible."""
    version = _C.read_kernel_file("/sys/module/nvidia/version")
    return version.strip() if version else None
