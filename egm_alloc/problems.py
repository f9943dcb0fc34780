"""What can be in egm_alloc's way, each with what to do about it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from egm_alloc import _C, machine
from egm_alloc.config import FIELDS, Config
from egm_alloc.control import is_enabled
from egm_alloc.environment import (
    AUTO_ENABLE,
    BOOL_WORDS,
    from_environment,
    known_variables,
    parse_bool,
    unknown_variables,
    values_from_environment,
    variable,
)
from egm_alloc.host import HostDiagnosis
from egm_alloc.stats import format_bytes

if TYPE_CHECKING:
    from egm_alloc.diagnosis import DeviceDiagnosis

_NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
_NCCL_HOOK = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
_NCCL_TRUE = ("y", "yes", "1", "t", "true")  # getCvarBool in torch/csrc/distributed/c10d/Utils.hpp
_ON_HOST = ("pinned", "numa")  # backings that requests are spilled to as well
_CAPABILITY = "in a container: start it with --cap-add SYS_NICE"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Parameters
    ----------
    what : str
        What it is, in a sentence without a full stop.
    remedy : str
        What to do about it, likewise.
    stops : bool
        Whether egm_alloc cannot work with it; else it works, less well.
    """

    what: str
    remedy: str
    stops: bool


def cuda_problem() -> Problem | None:
    """Return why torch has no CUDA device here, or None if it has one. Brings CUDA up."""
    if machine.device_count() == 0:
        why = machine.why_no_device()
        if not machine.has_driver():
            remedy = "install the NVIDIA driver; in a container: start it with GPU access"
        elif "CUDA_VISIBLE_DEVICES" in os.environ:
            remedy = "change or unset CUDA_VISIBLE_DEVICES"
        else:
            remedy = "check that nvidia-smi lists the GPU; in a container: start it with GPU access"
        return Problem(why, remedy, stops=True)
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0].rstrip(".")
        return Problem(
            f"torch cannot bring CUDA up: {first_line}",
            f"check that the driver supports CUDA {torch.version.cuda} (nvidia-smi shows it), and "
            "that this process is not a child forked after CUDA was used",
            stops=True,
        )
    return None


def environment_problems(environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Return the environment variables that are wrong for egm_alloc.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.

    Returns
    -------
    list of Problem
    """
    problems = []
    stops = not is_enabled()  # what enable() was given may have made up for it
    for name in [variable(field) for field in FIELDS]:
        try:
            values_from_environment({name: environ[name]} if name in environ else {})
        except (TypeError, ValueError) as error:
            remedy = f"set {name} to what is allowed, or unset it"
            problems.append(Problem(str(error), remedy, stops))
    if not problems:
        try:
            from_environment(environ)
        except ValueError as error:
            remedy = "change one of the EGM_ALLOC_ variables that contradict each other"
            problems.append(Problem(str(error), remedy, stops))
    wanted = environ.get(AUTO_ENABLE, "1")
    try:
        parse_bool(wanted)
    except ValueError:
        what = f"{AUTO_ENABLE} is {wanted!r}; allowed: {BOOL_WORDS}"
        problems.append(Problem(what, f"set {AUTO_ENABLE} to what is allowed, or unset it", stops))
    for name in unknown_variables(environ):
        remedy = f"correct the name; known are {', '.join(known_variables())}"
        problems.append(Problem(f"{name} means nothing to egm_alloc", remedy, stops=False))
    if _NO_CACHING in environ:
        what = f"{_NO_CACHING} turns off torch's caching allocator, which egm_alloc extends"
        problems.append(Problem(what, f"unset {_NO_CACHING}", stops=True))
    if environ.get(_NCCL_HOOK, "").lower() in _NCCL_TRUE:
        what = (
            f"{_NCCL_HOOK} registers every segment with NCCL, extended ones too, which NCCL may "
            "refuse and is not known to be any faster"
        )
        problems.append(Problem(what, f"unset {_NCCL_HOOK}", stops=False))
    return problems


def allocator_problems() -> list[Problem]:
    """Return what is wrong with torch's allocator in this process."""
    name = torch.cuda.get_allocator_backend()
    if name == "native":
        if _C.caching_is_enabled():
            return []
        what = "torch's caching is switched off, and egm_alloc extends the caching allocator"
        remedy = "call torch.cuda.caching_allocator_enable(True)"
        return [Problem(what, remedy, stops=True)]
    return [
        Problem(
            f"torch's allocator is {name!r}, and egm_alloc extends the native one",
            "unset backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF), and do "
            "not call torch.cuda.memory.change_current_allocator",
            stops=True,
        )
    ]


def configuration_problems(
    config: Config | None, devices: Sequence[DeviceDiagnosis]
) -> list[Problem]:
    """Return where a configuration does not suit the devices.

    Parameters
    ----------
    config : Config or None
        The configuration, if there is a valid one.
    devices : sequence of DeviceDiagnosis
        The machine's devices.

    Returns
    -------
    list of Problem
    """
    if config is None:
        return []
    problems = []
    if config.devices is not None and config.devices[-1] >= len(devices):
        what = f"device is {config.devices[-1]}, and this machine's last one is cuda:"
        remedy = "set EGM_ALLOC_DEVICE to devices of this machine, or unset it"
        problems.append(Problem(f"{what}{len(devices) - 1}", remedy, stops=True))
    for device in devices:
        if config.devices is None or device.index in config.devices:
            found = (_backing_problem(config, device), _spill_problem(config, device))
            problems += [problem for problem in found if problem is not None]
    return problems


def _backing_problem(config: Config, device: DeviceDiagnosis) -> Problem | None:
    backing, traits, remedy = config.backing, device.traits, "set EGM_ALLOC_BACKING=auto"
    if backing == "managed" and not traits.concurrent_managed_access:
        if config.mode == "managed":
            remedy += " and EGM_ALLOC_MODE=tiered"
        return Problem(
            f"cuda:{device.index} cannot use managed memory while the CPU does, and that is the "
            "backing: advice and prefetching fail, and the CPU must not touch it meanwhile",
            remedy,
            stops=False,
        )
    if backing == "pinned" and not traits.registered_host_pointers:
        why = "reaches registered host memory only under another address"
    elif backing in ("numa", "split") and not traits.host_numa_vmm:
        why = "cannot map memory of a host NUMA node"
    else:
        return None
    what = f"cuda:{device.index} {why}, and the backing is {backing!r}: its requests fail"
    return Problem(what, remedy, stops=True)


def _spill_problem(config: Config, device: DeviceDiagnosis) -> Problem | None:
    backing = device.auto_backing if config.backing == "auto" else config.backing
    spills_to_pinned = config.spill and config.mode == "tiered" and backing not in _ON_HOST
    if not spills_to_pinned or device.traits.registered_host_pointers:
        return None
    remedy = "set EGM_ALLOC_SPILL=0"
    if device.traits.host_numa_vmm:
        remedy = "set EGM_ALLOC_BACKING=numa, to which it then spills too, or EGM_ALLOC_SPILL=0"
    return Problem(
        f"cuda:{device.index} reaches registered host memory only under another address: what "
        "its HBM cannot hold cannot be spilled to pinned memory",
        remedy,
        stops=False,
    )


def host_problems(host: HostDiagnosis) -> list[Problem]:
    """Return what is wrong with the host.

    Parameters
    ----------
    host : HostDiagnosis
        The host.

    Returns
    -------
    list of Problem
    """
    problems = []
    if host.huge_pages == "never":
        problems.append(
            Problem(
                "transparent huge pages are off: pinned memory takes longer to come up",
                "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
                stops=False,
            )
        )
    if len(host.numa_nodes) > 1 and not host.may_bind_memory:
        what = "this process may not choose NUMA nodes (mbind): pinned memory may be far from a GPU"
        problems.append(Problem(what, _CAPABILITY, stops=False))
    reserve, available = host.reserve_bytes, host.available_bytes
    if reserve is not None and available is not None and reserve >= available:
        what = (
            f"the reserve of {format_bytes(reserve)} leaves nothing of the host memory that can be "
            f"taken ({format_bytes(available)}): requests for some are refused, and none is spilled"
        )
        remedy = f"lower {variable('host_reserve_gib')}, or free host memory"
        problems.append(Problem(what, remedy, stops=False))
    if host.sharing_problem is not None:
        what = f"host memory that other processes have booked is not seen: {host.sharing_problem}"
        remedy = "let this user make files in /dev/shm, and read and write that one"
        problems.append(Problem(what, remedy, stops=False))
    if not host.may_ask_for_pages:
        what = "this process may not ask where pages are (move_pages): residency() fails"
        problems.append(Problem(what, _CAPABILITY, stops=False))
    return problems
