"""Scripts in processes of their own: what they find, what they leave, how they end."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from pathlib import Path

import pytest

import egm_alloc
from tests.allocator.conftest import Background, block
from tests.simulator import ScriptError, launch, run_script

EITHER_WAY = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])


@EITHER_WAY
def test_script_finds_what_a_new_process_finds(fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("word = 'shown'")
    script = """
        import os, sys
        import shown
        print(__name__, sys.argv, os.environ["EGM_SIM_OF_A_TEST"], shown.word, os.getcwd())
        print("egm_alloc" in sys.modules, "tests" in sys.modules, sys.stdin.read() == "")
        try:
            def annotated(argument: unknown): ...
        except NameError:
            print("annotations are evaluated")
        import torch
        print(torch.cuda.is_initialized(), torch.cuda.device_count())
        import egm_alloc
        torch.cuda.init()
        print(round(egm_alloc.stats().host_available_bytes / (1 << 30), 1))  # nine tenths
    """
    env = {"EGM_SIM_OF_A_TEST": "word", "EGM_SIM_HOST_GIB": "64"}
    ran = run_script(script, "a", "b", devices=3, env=env, path=tmp_path, fresh=fresh)
    assert ran.stdout.splitlines() == [
        f"__main__ ['-c', 'a', 'b'] word shown {os.getcwd()}",
        "False False True",
        "annotations are evaluated",
        "False 3",
        "57.6",
    ]
    assert ran.stderr == ""


def test_script_leaves_the_next_one_nothing(tmp_path: Path) -> None:
    (tmp_path / "shown.py").touch()
    script = """
        import os, shown, torch
        torch.left = os.environ["LEFT"] = "left"
        torch.zeros(1, device="cuda")
    """
    run_script(script, path=tmp_path)
    script = """
        import importlib.util, os, sys, torch
        print(hasattr(torch, "left"), "LEFT" in os.environ, torch.cuda.is_initialized())
        print(importlib.util.find_spec("shown"))
    """
    assert run_script(script).stdout.split() == ["False", "False", "False", "None"]


@EITHER_WAY
def test_end_of_a_script_is_told(fresh: bool) -> None:
    def end(script: str) -> tuple[int, str, str]:
        ran = run_script(script, check=False, fresh=fresh)
        return ran.returncode, ran.stdout, ran.stderr.strip().rpartition("\n")[2]

    assert end("import atexit; atexit.register(print, 'last')") == (0, "last\n", "")
    assert end("import sys; sys.exit(3)") == (3, "", "")
    assert end("raise ValueError('why')") == (1, "", "ValueError: why")
    assert end("import os; os.kill(os.getpid(), 15)") == (-signal.SIGTERM, "", "")
    with pytest.raises(ScriptError, match="ValueError: why"):
        run_script("raise ValueError('why')", fresh=fresh)


def test_script_that_hangs_is_ended() -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        run_script(script, timeout=1)
    pid = int(raised.value.stdout or b"")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert run_script("print('next')").stdout == "next\n"


def test_what_torch_may_have_read_gets_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys; print('torch' in sys.modules, os.environ.get('TORCH_OF_A_TEST'))"
    assert run_script(script).stdout == "True None\n"
    assert run_script(script, env={"EGM_SIM_OF_A_TEST": "1"}).stdout == "True None\n"
    assert run_script(script, env={"TORCH_OF_A_TEST": "1"}).stdout == "False 1\n"
    assert run_script(script, fresh=True).stdout == "False None\n"
    script = "import torch; print(torch.cuda.get_allocator_backend())"
    assert run_script(script).stdout == "native\n"
    with monkeypatch.context() as changed:
        changed.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
        assert run_script(script).stdout == "cudaMallocAsync\n"
    assert run_script(script).stdout == "native\n"


def test_server_that_ended_is_told_and_replaced() -> None:
    run_script("pass")
    launch._idle_servers[-1].process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        run_script("pass")
    assert run_script("pass").returncode == 0


def test_scripts_of_several_threads_run_at_a_time(tmp_path: Path) -> None:
    script = """
        import pathlib, sys, time
        mine, other = map(pathlib.Path, sys.argv[1:])
        mine.touch()
        while not other.exists():
            time.sleep(0.01)
    """
    names = [str(tmp_path / name) for name in "ab"]
    orders = (names, names[::-1])
    threads = [Background(functools.partial(run_script, script, *order)) for order in orders]
    for thread in threads:
        thread.finish()


def test_file_runs_as_a_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print(__file__, sys.argv[1:])")
    assert run_script(program, "a").stdout == f"{program} ['a']\n"


def test_workers_of_pytest_do_not_share_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
        import egm_alloc, torch
        torch.cuda.init()
        egm_alloc.stats()
        print(egm_alloc._C.host_bookings()["other_processes"])
    """
    egm_alloc.enable(threshold_gib=1 / 1024, preferred_location="host", spill=False)
    kept = block(4 << 20)
    assert run_script(script).stdout == "1\n"
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "another")
    assert run_script(script).stdout == "0\n"
    del kept
