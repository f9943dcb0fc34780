"""``python -m tests.simulator [--machine NAME] [--devices N] [--hbm-gib X] -- COMMAND...``"""

from __future__ import annotations

import argparse
import os
import sys

from tests.simulator.launch import DEFAULT_DEVICES, DEFAULT_HBM_GIB, DEFAULT_MACHINE, environment


def main() -> None:
    """Replace this process by the command, on the simulated machine."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulator", description="Run a command on a simulated CUDA machine."
    )
    parser.add_argument("--machine", default=DEFAULT_MACHINE, help="preset (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=DEFAULT_DEVICES)
    parser.add_argument("--hbm-gib", type=float, default=DEFAULT_HBM_GIB, help="of each device")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command given")
    try:
        variables = environment(options.machine, options.devices, options.hbm_gib)
    except RuntimeError as error:
        sys.exit(f"tests.simulator: {error}")
    os.execvpe(command[0], command, variables)


main()
