"""Runs commands and scripts on the simulated machine, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.simulator.build import build
from tests.simulator.fork_server import ForkServer
from tests.simulator.host import DEFAULT_HOST_GIB, EGM_GIB, write_host

_REPOSITORY = Path(__file__).resolve().parents[2]

DEFAULT_MACHINE = "h200"
DEFAULT_DEVICES = 2
DEFAULT_HBM_GIB = 8.0


def _of_torch(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that torch may read when it is imported."""
    ours = ("EGM_", "PYTEST_", "PYTHONPATH")
    return {name: value for name, value in variables.items() if not name.startswith(ours)}


# Those that run no script now; several are there only if several scripts ran at a time.
_idle_servers: list[ForkServer] = []


def environment(
    machine: str = DEFAULT_MACHINE,
    devices: int = DEFAULT_DEVICES,
    hbm_gib: float = DEFAULT_HBM_GIB,
    extra: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """The environment in which a process finds itself on the simulated machine.

    Parameters
    ----------
    machine : str
        Name of a preset; README.md lists them.
    devices : int
        Number of devices; presets without a device keep none.
    hbm_gib : float
        HBM of each device in GiB.
    extra : mapping, optional
        Further variables; None removes one.
    """
    variables = dict(os.environ)
    objects = build()
    libraries = [str(library) for library in objects]
    before = [entry for entry in variables.get("LD_PRELOAD", "").split(":") if entry]
    variables["LD_PRELOAD"] = ":".join(dict.fromkeys([*before, *libraries]))
    variables["EGM_SIM_MACHINE"] = machine
    variables["EGM_SIM_DEVICES"] = str(devices)
    variables["EGM_SIM_HBM_GIB"] = str(hbm_gib)
    named = {**variables, **{name: value for name, value in (extra or {}).items() if value}}
    total_gib = float(named.get("EGM_SIM_HOST_GIB", DEFAULT_HOST_GIB))
    egm_gib = float(named.get("EGM_SIM_EGM_GIB", EGM_GIB.get(machine, 0)))
    # Tests that run side by side do not see each other's bookings of host memory.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    host = objects[0].parent / f"host-{total_gib:g}-{egm_gib:g}{worker and '-' + worker}"
    variables["EGM_SIM_HOST_ROOT"] = str(write_host(host, total_gib, 0.9 * total_gib, egm_gib))
    # cuDNN is not simulated; attention has other kernels to choose from.
    variables["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    for name, value in (extra or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return variables


@dataclass(frozen=True)
class Completed:
    """A script that ended: its exit status and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class ScriptError(AssertionError):
    """A script exited with a status other than zero; the message has both its streams."""


def run_script(
    script: str | Path,
    *arguments: str,
    machine: str = DEFAULT_MACHINE,
    devices: int = 1,
    hbm_gib: float = 4.0,
    env: Mapping[str, str | None] | None = None,
    path: Path | None = None,
    timeout: float = 120.0,
    check: bool = True,
    fresh: bool = False,
) -> Completed:
    """Run Python in a process of its own on a simulated machine.

    Source code runs in the fork of a process that has imported torch (fork_server.py), unless its
    environment differs from this process's in more than variables of egm_alloc and the simulator,
    which torch may read in its import.

    Parameters
    ----------
    script : str or Path
        Source code (indentation common to all lines is removed), or the path of a file.
    *arguments : str
        ``sys.argv[1:]`` of the script.
    machine, devices, hbm_gib
        The machine, as in :func:`environment`.
    env : mapping, optional
        Further environment variables; None removes one.
    path : Path, optional
        Goes before all else on the import path.
    timeout : float
        Seconds.
    check : bool
        Whether a status other than zero raises.
    fresh : bool
        Whether nothing may be imported before.

    Raises
    ------
    ScriptError
        If ``check`` and the status is not zero.
    subprocess.TimeoutExpired
        After ``timeout`` seconds.

    Examples
    --------
    >>> run_script("import torch; print(torch.cuda.device_count())", devices=3).stdout
    '3\\n'
    """
    variables = environment(machine, devices, hbm_gib, env)
    paths = [str(path or ""), str(_REPOSITORY), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = ":".join(filter(None, paths))
    source = str(script) if isinstance(script, Path) else textwrap.dedent(script)
    if fresh or isinstance(script, Path) or _of_torch(env or {}):
        program = [source] if isinstance(script, Path) else ["-c", source]
        result = subprocess.run(
            [sys.executable, *program, *arguments],
            check=False,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    else:
        result = _run_forked(source, list(arguments), variables, timeout)
    if check and result.returncode != 0:
        raise ScriptError(
            f"exit status {result.returncode}\n--- stdout\n{result.stdout}"
            f"\n--- stderr\n{result.stderr}"
        )
    return Completed(result.returncode, result.stdout, result.stderr)


def _take_server(variables: Mapping[str, str]) -> ForkServer:
    """A server that has imported torch where it found what it finds among these variables."""
    while True:
        try:
            server = _idle_servers.pop()
        except IndexError:
            return ForkServer(environment())
        if _of_torch(server.variables) == _of_torch(variables):
            return server
        server.end()


def _run_forked(
    source: str, arguments: list[str], variables: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script in the fork of a server, which is kept unless it may still be at work."""
    server = _take_server(variables)
    try:
        result = server.run(source, arguments, variables, timeout)
    except subprocess.TimeoutExpired:
        _idle_servers.append(server)
        raise
    except BaseException:
        server.end()
        raise
    _idle_servers.append(server)
    return result
