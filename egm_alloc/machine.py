"""What the machine has, found out without initialising CUDA in this process.

A process in which CUDA is up cannot fork workers that use CUDA, so importing egm_alloc must not
bring it up.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings

import torch

# Run in a process of its own, because cuInit cannot be taken back.
_COUNT_DEVICES = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
found = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value if found else 0)
"""


def device_count() -> int | None:
    """Return how many CUDA devices this process can see.

    Returns
    -------
    int or None
        The count; None where it cannot be told without initialising CUDA.

    Notes
    -----
    ``torch.cuda.device_count()`` asks NVML, which is harmless, and where NVML is missing (a
    container without the "utility" capability) falls back on cudaGetDeviceCount, after which torch
    refuses CUDA in forked children (torch/csrc/cuda/Module.cpp, ``poison_fork``). So in that case
    a short process of its own is asked instead.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.device_count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = torch.cuda._device_count_nvml()
    if count >= 0:
        return count
    if not has_driver():
        return 0
    return _count_in_subprocess()


def has_driver() -> bool:
    """Return whether the CUDA driver's library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _count_in_subprocess() -> int | None:
    if not sys.executable:
        return None
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _COUNT_DEVICES],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return int(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def why_no_device() -> str:
    """Return a sentence's end that says why no device can be used."""
    if not has_driver():
        return "no CUDA driver (libcuda.so.1) was found"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no GPU is visible (CUDA_VISIBLE_DEVICES is {visible!r})"
    return "the CUDA driver reports no GPU"
