"""A process that has imported torch and forks for each script, because that import takes seconds.

A script finds torch imported and CUDA untouched; it ends as any Python process does. ``launch.py``
decides which scripts run here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_POLL_S = 0.005


class ForkServer:
    """The process, seen from the one that has scripts to run; it runs one at a time.

    Parameters
    ----------
    variables : mapping
        Its environment, with the simulated device preloaded.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        # As source: by its name it would import the package, which asks what machine this is.
        self.process = subprocess.Popen(
            [sys.executable, "-c", Path(__file__).read_text()],
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)

    def end(self) -> None:
        """End it, if it still runs."""
        self.process.kill()
        self.process.communicate()
        atexit.unregister(self.end)

    def run(
        self, source: str, arguments: list[str], variables: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a script, as ``subprocess.run`` would run ``python -c source``.

        Raises
        ------
        subprocess.TimeoutExpired
            After ``timeout`` seconds; the script has been killed then.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            request = {
                "source": source,
                "arguments": arguments,
                "variables": dict(variables),
                "folder": os.getcwd(),
                "files": [str(file) for file in files],
                "timeout": timeout,
            }
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the fork server ended with {self.process.wait()}")
            returncode = json.loads(answer)
            stdout, stderr = (file.read_text() for file in files)
        command = [sys.executable, "-c", source, *arguments]
        if returncode is None:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)


def _exit_status(child: int, timeout: float) -> int | None:
    """Return how a child ended, None if it had to be killed after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return None
        time.sleep(_POLL_S)


def _serve() -> dict[str, Any] | None:
    """Fork for each request; return it in the child, and None when there are no more."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        with warnings.catch_warnings():
            # Of threads: those of torch's libraries are idle, and know of forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            return request
        print(json.dumps(_exit_status(child, request["timeout"])), flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Be the process of a script, with its streams, folder, environment and path."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(request["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.chdir(request["folder"])
    before = os.environ.get("PYTHONPATH", "").split(":")
    os.environ.clear()
    os.environ.update(request["variables"])
    after = os.environ.get("PYTHONPATH", "").split(":")
    sys.path[:] = ["", *after, *(path for path in sys.path[1:] if path not in before)]
    sys.argv = ["-c", *request["arguments"]]
    main = sys.modules["__main__"] = ModuleType("__main__")
    code = compile(request["source"], "<string>", "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _main() -> None:
    importlib.import_module("torch")
    gc.collect()
    gc.freeze()
    request = _serve()
    if request is not None:
        _become(request)


if __name__ == "__main__":
    _main()
