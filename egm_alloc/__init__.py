"""Extended GPU memory for PyTorch: large tensors beyond HBM at the speed of torch's own allocator.

Importing this package switches it on, unless the environment says ``EGM_ALLOC_AUTO_ENABLE=0``.
"""

# The order matters: torch first, since the extension finds torch's libraries only once they are
# loaded; then the check, since a binary for another torch may load and misbehave.
# ruff: noqa: E402

from importlib.util import find_spec

import torch

if find_spec("egm_alloc._build_info") is None or find_spec("egm_alloc._C") is None:
    raise ImportError(
        "egm_alloc is not built here: run 'pip install .' in its source tree, and import it from "
        "another folder"
    )

from egm_alloc import _build_info, _compat

_compat.check(_build_info, torch)

from egm_alloc.config import Config
from egm_alloc.control import disable, enable, enable_at_import, get_config, is_enabled
from egm_alloc.diagnosis import DeviceDiagnosis, DeviceTraits, Diagnosis, doctor
from egm_alloc.host import HostDiagnosis
from egm_alloc.movement import advise, migrate, prefetch
from egm_alloc.placement import place
from egm_alloc.pluggable import get_include, mem_pool, pluggable_allocator
from egm_alloc.problems import Problem
from egm_alloc.stats import (
    BackingStats,
    Stats,
    TierStats,
    memory_summary,
    reset_peak_stats,
    stats,
)
from egm_alloc.tensors import Residency, TensorInfo, info, residency

__version__ = "0.1.0"

__all__ = [
    "BackingStats",
    "Config",
    "DeviceDiagnosis",
    "DeviceTraits",
    "Diagnosis",
    "HostDiagnosis",
    "Problem",
    "Residency",
    "Stats",
    "TensorInfo",
    "TierStats",
    "__version__",
    "advise",
    "disable",
    "doctor",
    "enable",
    "get_config",
    "get_include",
    "info",
    "is_enabled",
    "mem_pool",
    "memory_summary",
    "migrate",
    "place",
    "pluggable_allocator",
    "prefetch",
    "reset_peak_stats",
    "residency",
    "stats",
]

enable_at_import()
