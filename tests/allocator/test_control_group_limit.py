"""The reserve under a real limit of the kernel's: a control group, in a process of its own.

Pinned memory is real memory of this machine on the simulated device too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.simulator.launch import environment

MIB = 1 << 20
LIMIT = 1536 * MIB
KILLED = -9

pytestmark = pytest.mark.simulated

Run = Callable[[str], "subprocess.CompletedProcess[str]"]


def _limited_group() -> Path | None:
    """Make a control group with a memory limit, or return None where that is not allowed."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"egm_alloc-test-{uuid.uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT))
            return group
        except OSError:
            group.rmdir()
    return None


@pytest.fixture
def run_limited() -> Iterator[Run]:
    """Run Python on the simulated device, with the kernel's own files, under a memory limit."""
    group = _limited_group()
    if group is None:
        pytest.skip("needs the right to make a control group with a memory limit")

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            env=environment("h100", devices=1, extra={"EGM_SIM_HOST_ROOT": None}),
            cwd=Path(__file__).resolve().parents[2],
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield run
    group.rmdir()


ASK_FOR_MORE = f"""
import torch, egm_alloc
held = []
try:
    with egm_alloc.place("pinned"):
        while len(held) * 64 < 2 * {LIMIT // MIB}:
            held.append(torch.ones(64 << 20, dtype=torch.uint8, device="cuda"))
except torch.cuda.OutOfMemoryError as error:
    print("refused", len(held), error)
"""

TOUCH_MORE = f"""
held = bytearray(2 * {LIMIT})
print("not killed")
"""


def test_process_gets_the_error_and_never_the_kernels_killer(run_limited: Run) -> None:
    killed = run_limited(TOUCH_MORE)
    assert killed.returncode == KILLED, killed.stdout  # the limit is one
    done = run_limited(ASK_FOR_MORE)
    assert done.returncode == 0, done.stderr
    word, count, message = done.stdout.split(maxsplit=2)
    assert word == "refused"
    assert int(count) >= 4
    assert "would cut into the reserve of 0.07 GiB" in message  # 5 % of the limit
    assert "limited by cgroup limit of /egm_alloc-test-" in message
    assert "host_reserve_gib" in message
