"""One way of serving as a process that is started, told what to serve, and ended."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
# An engine that has not answered by then is ended; arbitrary.
_LONGEST_S = 300.0
Load = dict[str, int]
Result = dict[str, Any]


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started, which may outlive it and hold its output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Engine:
    """A vLLM engine: its options, and the environment in which it starts."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    starts_s: list[float] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    log: Path = Path(os.devnull)
    path: str = ""  # goes before PYTHONPATH
    blocks: int = 0  # of its KV cache, once it is up

    def extends(self) -> bool:
        """Return whether it takes host memory for weights or its KV cache."""
        return any(name.startswith("EGM_ALLOC_") for name in self.settings)

    def start(self, options: argparse.Namespace) -> None:
        """Start it; `wait` waits until it is up."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("EGM_ALLOC_")}
        engine = {**json.loads(options.engine), **self.options}
        options.logs.mkdir(parents=True, exist_ok=True)
        self.log = options.logs / f"{self.name.replace(' ', '_').replace(',', '')}.log"
        path = ":".join(filter(None, (self.path, os.environ.get("PYTHONPATH"))))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.vllm_engine", json.dumps(engine)],
                env={
                    **kept,
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    # Without it a model in another process cannot be given its weights.
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                    "PYTHONPATH": path,
                    **self.settings,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait(self, alone: bool = True) -> Result:
        """Wait until it is up, print what it says then, and return it.

        Parameters
        ----------
        alone : bool
            Whether nothing else was starting, so that its time and memory are its own.
        """
        result = self._answer()
        if "failed" in result:
            print(f"  {self.name}: failed: {result['failed']}", flush=True)
            return result
        self.starts_s.append(result["start_s"])
        self.blocks = result["blocks"]
        moved = result["offloaded_bytes"]
        print(
            f"  {self.name}: up, {result['blocks']} blocks"
            + (
                f" in {result['start_s']:.1f} s, host memory taken "
                f"{result['host_bytes_taken'] / GIB:.2f} GiB"
                if alone
                else ""
            )
            + (f", {moved} bytes of parameters on the host" if moved else ""),
            flush=True,
        )
        for text in result["plugin_said"]:
            print("    | " + text.replace("\n", "\n    | "), flush=True)
        return result

    def begin(self, load: Load) -> None:
        """Have it serve a load, without waiting for the answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: the answer says why
            print(json.dumps(load), file=self.process.stdin, flush=True)

    def serve(self, load: Load) -> Result:
        """Have it serve a load."""
        self.begin(load)
        return self._answer()

    def stop(self) -> None:
        """End it in good order, if it runs."""
        if self.process is None:
            return
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """End it and the processes that it has started, at once."""
        assert self.process is not None
        _end_group(self.process)
        self.process.communicate()
        self.process = None

    def _answer(self) -> Result:
        assert self.process is not None
        late = threading.Timer(_LONGEST_S, _end_group, (self.process,))
        late.start()
        try:
            return self._next_result()
        finally:
            late.cancel()

    def _next_result(self) -> Result:
        assert self.process is not None
        assert self.process.stdout is not None
        lines = []
        with self.log.open("a") as log:
            for line in self.process.stdout:
                if line.startswith("RESULT "):
                    answer: Result = json.loads(line.removeprefix("RESULT "))
                    return answer
                lines.append(line)
                log.write(line)
        lines += self.log.read_text("utf-8", "replace").splitlines()
        last = [line for line in lines if "Error" in line][-1:]
        said = last[0].strip()[-400:] if last else f"exit status {self.process.wait()}"
        return {"failed": f"{said} ({self.log})"}


def one_line(load: Load, result: Result) -> str:
    """Return one line about a load that was served."""
    what = f"{load['sequences']} x {load['prompt']}+{load['output']}"
    if "failed" in result:
        return f"{what}: failed: {result['failed']}"
    cached = result["cached_prompt_tokens"]
    return (
        f"{what}: {result['tokens_per_s']:.0f} tokens/s, {result['distinct_tokens']} distinct"
        + (f", {cached} prompt tokens from the cache" if cached else "")
        + (f", {result['extended_blocks']} extended blocks" if result["extended_blocks"] else "")
    )
