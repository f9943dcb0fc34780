"""Python processes for tests that need a fresh one; not for the simulated device.

``tests.simulator.run_script`` runs scripts on a simulated machine.
"""

from __future__ import annotations

import os
import subprocess
import sys


def run_without_gpu(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script where no GPU can be seen, real or simulated; it may fail.

    Parameters
    ----------
    script : str
        Python source.
    **variables : str
        More environment variables.

    Returns
    -------
    subprocess.CompletedProcess
        With ``stdout`` and ``stderr`` as text.
    """
    dropped = ("LD_PRELOAD", "EGM_SIM_", "EGM_ALLOC_", "PYTHONWARNINGS")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(dropped)
    }
    environment.update({"CUDA_VISIBLE_DEVICES": "", **variables})
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
