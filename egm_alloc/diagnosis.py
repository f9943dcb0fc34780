"""What this machine is, what egm_alloc makes of it, and what is in its way: `doctor`."""

from __future__ import annotations

import ctypes
import dataclasses
import platform

import torch

from egm_alloc import _C, machine
from egm_alloc.config import Config
from egm_alloc.control import get_config, is_enabled
from egm_alloc.host import HostDiagnosis, diagnose_host, driver_version
from egm_alloc.problems import (
    Problem,
    allocator_problems,
    configuration_problems,
    cuda_problem,
    environment_problems,
    host_problems,
)


@dataclasses.dataclass(frozen=True)
class DeviceTraits:
    """What a device says about itself and the memory around it.

    Parameters
    ----------
    managed, concurrent_managed_access : bool
        Whether it has managed memory, and may use it while the CPU does.
    pageable_memory_access, uses_host_page_tables : bool
        Whether it reaches all of the host's memory, and does so by the host's page tables, over a
        coherent link such as NVLink-C2C.
    integrated : bool
        Whether CPU and GPU have one memory.
    host_numa_vmm : bool
        Whether the driver can map memory of a host NUMA node (backings numa and split).
    registered_host_pointers : bool
        Whether registered host memory has one address for CPU and GPU (backing pinned).
    host_numa_node, hbm_numa_node : int
        The kernel's NUMA nodes next to the GPU and of the GPU's own memory; -1 for none.
    egm_carveout : bool
        Whether the firmware set host memory aside for the GPU (Extended GPU Memory).

    Notes
    -----
    The attributes are those of cudaDeviceGetAttribute (CUDA Runtime API, "Device Management").
    """

    managed: bool
    concurrent_managed_access: bool
    pageable_memory_access: bool
    uses_host_page_tables: bool
    integrated: bool
    host_numa_vmm: bool
    registered_host_pointers: bool
    host_numa_node: int
    hbm_numa_node: int
    egm_carveout: bool


@dataclasses.dataclass(frozen=True)
class DeviceDiagnosis:
    """One CUDA device.

    Parameters
    ----------
    index : int
        Its index among the devices that this process sees.
    name : str
        Its name.
    simulated : bool
        Whether it is the simulated device of the tests, which runs no kernels.
    compute_capability : str
        Such as ``"9.0"``.
    hbm_bytes : int
        All of its own memory.
    traits : DeviceTraits
        What it says about itself.
    auto_backing : str
        What the backing ``"auto"`` means on it.
    auto_reason : str
        Why.
    """

    index: int
    name: str
    simulated: bool
    compute_capability: str
    hbm_bytes: int
    traits: DeviceTraits
    auto_backing: str
    auto_reason: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found.

    Parameters
    ----------
    egm_alloc_version, torch_version, python_version, system : str
        What is at work.
    torch_cuda_version : str or None
        The CUDA that torch was built for.
    driver_version : str or None
        The version of NVIDIA's kernel driver; None where it is not visible.
    driver_cuda_version : str or None
        The newest CUDA that the driver supports; None without a driver.
    enabled : bool
        Whether egm_alloc is on in this process.
    config : Config or None
        The configuration; None if the environment has values that are not allowed.
    devices : tuple of DeviceDiagnosis
        The devices that this process can use.
    host : HostDiagnosis
        The host's memory.
    problems : tuple of Problem
        What is wrong, and what to do.
    """

    egm_alloc_version: str
    torch_version: str
    torch_cuda_version: str | None
    driver_version: str | None
    driver_cuda_version: str | None
    python_version: str
    system: str
    enabled: bool
    config: Config | None
    devices: tuple[DeviceDiagnosis, ...]
    host: HostDiagnosis
    problems: tuple[Problem, ...]

    @property
    def works(self) -> bool:
        """Whether nothing that was found stops egm_alloc from working."""
        return not any(problem.stops for problem in self.problems)


def _driver_cuda_version() -> str | None:
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None


def diagnose_device(index: int) -> DeviceDiagnosis:
    """Ask a device about itself.

    Parameters
    ----------
    index : int
        The device's index, which exists.

    Returns
    -------
    DeviceDiagnosis
    """
    properties = torch.cuda.get_device_properties(index)
    backing, reason = _C.choose_backing(index)
    return DeviceDiagnosis(
        index=index,
        name=properties.name,
        simulated=properties.name.startswith("Simulated "),
        compute_capability=f"{properties.major}.{properties.minor}",
        hbm_bytes=properties.total_memory,
        traits=DeviceTraits(**_C.device_traits(index)),
        auto_backing=backing,
        auto_reason=reason,
    )


def _config() -> Config | None:
    try:
        return get_config()
    except (TypeError, ValueError):
        return None  # environment_problems() says why


def doctor() -> Diagnosis:
    """Find out what this machine has, and what keeps egm_alloc from working well on it.

    Returns
    -------
    Diagnosis
        Its ``problems`` say what is wrong and what to do; ``devices[i].auto_backing`` is what the
        backing ``"auto"`` means.

    Notes
    -----
    Works where egm_alloc cannot be enabled, too. Brings CUDA up in this process, which then can
    no longer fork children that use CUDA.

    Examples
    --------
    >>> for problem in egm_alloc.doctor().problems:
    ...     print(problem.what, "->", problem.remedy)
    """
    from egm_alloc import __version__

    config, host = _config(), diagnose_host()
    problems = environment_problems() + allocator_problems()
    stopped = cuda_problem()
    devices: tuple[DeviceDiagnosis, ...] = ()
    if stopped is not None:
        problems.insert(0, stopped)
    else:
        devices = tuple(map(diagnose_device, range(torch.cuda.device_count())))
        problems += configuration_problems(config, devices)
    return Diagnosis(
        egm_alloc_version=__version__,
        torch_version=str(torch.__version__),
        torch_cuda_version=torch.version.cuda,
        driver_version=driver_version(),
        driver_cuda_version=_driver_cuda_version() if machine.has_driver() else None,
        python_version=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        enabled=is_enabled(),
        config=config,
        devices=devices,
        host=host,
        problems=(*problems, *host_problems(host)),
    )
