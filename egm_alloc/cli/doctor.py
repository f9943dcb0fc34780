"""``egm-alloc doctor``: what this machine has, and what is in egm_alloc's way."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from egm_alloc.cli.text import name_and_value, wrapped
from egm_alloc.diagnosis import DeviceDiagnosis, Diagnosis
from egm_alloc.diagnosis import doctor as diagnose
from egm_alloc.host import HostDiagnosis
from egm_alloc.stats import format_bytes

UNKNOWN = "unknown"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, what egm_alloc makes of it, and what is wrong",
        description="Say what this machine has, what egm_alloc makes of it, and what is wrong. "
        "The exit status is 1 if something stops egm_alloc from working.",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a diagnosis; return 1 if egm_alloc cannot work."""
    diagnosis = diagnose()
    print(json.dumps(as_json(diagnosis), indent=2) if options.json else in_words(diagnosis))
    return 0 if diagnosis.works else 1


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as JSON can hold it: its fields by name, and ``works``."""
    return {"works": diagnosis.works, **dataclasses.asdict(diagnosis)}


def in_words(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as a text of several lines."""
    supports = diagnosis.driver_cuda_version
    driver = diagnosis.driver_version or ("present" if supports else "none")
    software = [
        ("torch", f"{diagnosis.torch_version}, for CUDA {diagnosis.torch_cuda_version}"),
        ("driver", f"{driver}, supports CUDA {supports}" if supports else driver),
        ("Python", diagnosis.python_version),
        ("system", diagnosis.system),
    ]
    parts = [
        f"egm_alloc {diagnosis.egm_alloc_version}: {'on' if diagnosis.enabled else 'off'}",
        name_and_value(software),
        "Configuration",
        _configuration(diagnosis),
        "Host",
        name_and_value(_host(diagnosis.host)),
    ]
    for device in diagnosis.devices:
        parts += [f"cuda:{device.index}: {device.name}", name_and_value(_device(device))]
    parts += ["Problems", _problems(diagnosis)]
    sections = [f"{parts[i]}\n{parts[i + 1]}" for i in range(0, len(parts), 2)]
    return "\n\n".join(sections)


def _configuration(diagnosis: Diagnosis) -> str:
    if diagnosis.config is None:
        return "  not valid: see the problems below"
    return name_and_value([(k, str(v)) for k, v in dataclasses.asdict(diagnosis.config).items()])


def _host(host: HostDiagnosis) -> list[tuple[str, str]]:
    def size(count: int | None) -> str:
        return UNKNOWN if count is None else format_bytes(count)

    def allowed(yes: bool) -> str:
        return "allowed" if yes else "not allowed"

    return [
        ("memory", size(host.total_bytes)),
        ("available", f"{size(host.available_bytes)} ({host.limited_by or UNKNOWN})"),
        ("of that stays free", size(host.reserve_bytes)),
        ("promised to managed memory", format_bytes(host.promised_bytes)),
        (
            "booked by other processes",
            f"{format_bytes(host.others_bytes)} ({host.other_processes})",
        ),
        ("EGM carve-out", "none" if host.egm_bytes is None else format_bytes(host.egm_bytes)),
        ("NUMA nodes", ", ".join(map(str, host.numa_nodes)) or UNKNOWN),
        ("transparent huge pages", host.huge_pages or "none in this kernel"),
        ("choosing nodes (mbind)", allowed(host.may_bind_memory)),
        ("finding pages (move_pages)", allowed(host.may_ask_for_pages)),
    ]


def _device(device: DeviceDiagnosis) -> list[tuple[str, str]]:
    traits = device.traits

    def yes(holds: bool) -> str:
        return "yes" if holds else "no"

    if traits.integrated:
        link = "none: CPU and GPU have one memory"
    elif traits.uses_host_page_tables:
        link = "coherent: the GPU uses the host's page tables"
    else:
        link = "PCIe, or another without common page tables"
    if not traits.managed:
        managed = "no"
    elif traits.concurrent_managed_access:
        managed = "yes, while the CPU uses it too"
    else:
        managed = "yes, but not while the CPU uses it"
    hbm = str(traits.hbm_numa_node) if traits.hbm_numa_node >= 0 else "none"
    host = str(traits.host_numa_node) if traits.host_numa_node >= 0 else "none"
    simulated = [("device", "SIMULATED: allocations are real, kernels do nothing")]
    return [
        *(simulated if device.simulated else []),
        ("HBM", format_bytes(device.hbm_bytes)),
        ("compute capability", device.compute_capability),
        ("link to the host", link),
        ("managed memory", managed),
        ("ordinary host memory", yes(traits.pageable_memory_access)),
        ("pinned memory", yes(traits.registered_host_pointers)),
        ("mapped host NUMA memory", yes(traits.host_numa_vmm)),
        ("NUMA nodes", f"nearest of the host: {host}; of HBM: {hbm}"),
        ('backing "auto"', f"{device.auto_backing}: {device.auto_reason}"),
    ]


def _problems(diagnosis: Diagnosis) -> str:
    if not diagnosis.problems:
        return "  none found"
    lines = []
    for problem in diagnosis.problems:
        prefix = "  - stops egm_alloc: " if problem.stops else "  - "
        lines.append(wrapped(problem.what, prefix, "    "))
        lines.append(wrapped(problem.remedy, "    remedy: ", "    "))
    return "\n".join(lines)
