"""The simulated machine's host memory, in files as the kernel has them; see csrc/host_files.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

DEFAULT_HOST_GIB = 512.0
# Of the presets that have one; as in csrc/machine.cpp.
EGM_GIB = {"gh200-egm": 400.0}


def write_host(root: Path, total_gib: float, available_gib: float, egm_gib: float = 0) -> Path:
    """Write the files of a host with one NUMA node and no control group.

    Parameters
    ----------
    root : Path
        The folder that stands for ``/``; made if need be.
    total_gib, available_gib : float
        Its memory, and what can be taken of it.
    egm_gib : float
        The carve-out for the GPU, which is no part of that; 0 for none.

    Returns
    -------
    Path
        `root`.
    """
    total, available = (int(gib * (1 << 20)) for gib in (total_gib, available_gib))
    files = {
        "proc/meminfo": f"MemTotal: {total} kB\nMemFree: {available} kB\n"
        f"MemAvailable: {available} kB\n",
        "proc/self/status": "Name:\tsimulated\nMems_allowed_list:\t0\n",
        "proc/self/cgroup": "0::/\n",
        "sys/devices/system/node/node0/meminfo": f"Node 0 MemTotal: {total} kB\n"
        f"Node 0 MemFree: {available} kB\n",
        "sys/devices/system/node/online": "0\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    if egm_gib:
        files["sys/class/egm/egm0/egm_size"] = f"{int(egm_gib * (1 << 30))}\n"
    # Where its processes keep what they share; on a real host too.
    (root / "dev/shm").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole at once: other processes may be reading it.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as partial:
            partial.write(text)
        Path(partial.name).chmod(0o644)
        Path(partial.name).replace(path)
    return root
