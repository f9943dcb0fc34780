"""The command line: ``egm-alloc`` or ``python -m egm_alloc``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from egm_alloc.cli import bench, doctor, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command and its options; those of this process if not given.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="egm-alloc", description="Extended GPU memory for PyTorch: look at this machine."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    doctor.add_command(commands)
    bench.add_command(commands)
    plan.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status
