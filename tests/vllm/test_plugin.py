"""The entry point and the patches, without vLLM: with a package of its name made by the tests."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import egm_alloc_vllm
from tests.simulator import run_script
from tests.vllm.fake_package import CONFIGURE, RUN, SERVE, START, UNTESTED, run, run_worker

ROOT = Path(__file__).resolve().parents[2]

# After it, nothing asks for the plugin.
FORGET = "for name in [n for n in os.environ if n.startswith('EGM_ALLOC_')]: del os.environ[name]"


@pytest.mark.parametrize("variables", [{}, {"EGM_ALLOC_VLLM": "0", "EGM_ALLOC_VLLM_KV_GIB": "1"}])
def test_installed_and_not_configured_changes_nothing(
    vllm: Path, variables: dict[str, str]
) -> None:
    script = START + (
        "print('egm_alloc' in sys.modules, 'torch' in sys.modules, 'vllm' in sys.modules)"
    )
    done = run_script(script, env=variables, path=vllm, fresh=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False False False\n", "")


@pytest.mark.simulated
def test_configured_the_allocator_waits_for_the_workers(vllm: Path) -> None:
    script = (
        "from tests.simulator import sim\n"
        "with sim.call_log(everything=True) as log:\n"
        + textwrap.indent(START + CONFIGURE, "    ")
        + "\nassert log.names == [], log.names\n"
        "import os, egm_alloc, torch\n"
        "print(egm_alloc.is_enabled(), torch.cuda.is_initialized())\n"
        "print(os.environ.get('EGM_ALLOC_AUTO_ENABLE'))"
    )
    done = run(vllm, script, EGM_ALLOC_VLLM="1", **UNTESTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "None"]


@pytest.mark.simulated
@pytest.mark.parametrize("script", [RUN, SERVE], ids=["in process", "process of its own"])
def test_configured_the_kv_cache_is_placed_and_ordered(vllm: Path, script: str) -> None:
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["HbmFirstQueue", "128", "split"], done.stderr


@pytest.mark.simulated
@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_plugin_works_in_children_of_either_kind(vllm: Path, tmp_path: Path, way: str) -> None:
    (tmp_path / "child.py").write_text(
        "def serve():\n" + textwrap.indent(SERVE, "    ") + "\n    sys.stdout.flush()\n"
    )
    (tmp_path / "child.py").write_text("import sys\n" + (tmp_path / "child.py").read_text())
    script = (
        START
        + CONFIGURE
        + f"""
import multiprocessing, child
if __name__ == "__main__":
    process = multiprocessing.get_context({way!r}).Process(target=child.serve)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
    )
    (tmp_path / "parent.py").write_text(script)
    done = run(
        vllm,
        "import runpy; runpy.run_module('parent', run_name='__main__')",
        EGM_ALLOC_VLLM_KV_GIB="0.125",
        **UNTESTED,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["HbmFirstQueue", "128", "split"], done.stderr


@pytest.mark.simulated
@pytest.mark.parametrize("off", ["os.environ['EGM_ALLOC_VLLM'] = '0'", FORGET])
def test_engine_that_is_not_configured_is_vllms_after_one_that_was(vllm: Path, off: str) -> None:
    script = f"""
import os
{SERVE}
del core, caches, queue
{off}
{SERVE}
"""
    done = run_worker(vllm, script, EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["HbmFirstQueue", "128", "split", "Queue", "64", "-"]


@pytest.mark.simulated
def test_scheduler_that_knows_no_boundary_says_so(vllm: Path) -> None:
    script = """
from types import SimpleNamespace
from vllm.v1.core.sched.scheduler import Scheduler
Scheduler(SimpleNamespace(num_blocks=4))
"""
    done = run_worker(vllm, script)
    assert done.returncode == 0, done.stderr
    assert "hands them out in vLLM's order" in done.stderr


@pytest.mark.simulated
def test_only_what_a_loader_makes_is_weights(vllm: Path) -> None:
    script = (
        START
        + CONFIGURE
        + """
from vllm.v1.worker.gpu_worker import Worker
from tests.vllm import fakes
import torch, egm_alloc
runner = fakes.Runner(torch.device("cuda:0"), weight_bytes=32 * fakes.MIB)
worker = Worker(fakes.vllm_config(), runner)
worker.load_model()
print({egm_alloc.info(p.detach()).backing for p in runner.model.parameters()})
print(egm_alloc.info(worker.sampler).tier)
"""
    )
    done = run(vllm, script, EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB="0", **UNTESTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["{'pinned'}", "device"]


@pytest.mark.simulated
def test_source_that_was_not_checked_is_left_alone_and_said_so(vllm: Path) -> None:
    done = run(vllm, RUN, EGM_ALLOC_VLLM_KV_GIB="0.125")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Queue", "64", "-"]
    assert "KV cache in host memory is off: vllm.v1.worker.gpu_worker:Worker." in done.stderr
    assert "is not what vLLM 0.26.0 was checked with" in done.stderr


@pytest.mark.simulated
def test_part_whose_source_lacks_something_is_off_and_the_others_are_on(vllm: Path) -> None:
    (vllm / "vllm/v1/core/block_pool.py").write_text("class BlockPool: pass\n")
    script = (
        RUN
        + """
state = core.worker.egm_alloc_state
print(state.settings.kv_bytes, getattr(core.worker, 'egm_alloc_stock', None))
"""
    )
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
    assert done.returncode == 0, done.stderr
    # Weights leave room for vLLM's own KV cache, and no host memory is taken for another.
    assert done.stdout.split() == ["Queue", "64", "-", "0", "None"]
    assert (
        "KV cache in host memory is off: vllm.v1.core.block_pool:BlockPool.__init__" in done.stderr
    )
    assert "weights in host memory is off" not in done.stderr


@pytest.mark.simulated
def test_part_that_cannot_be_imported_is_off_whole(vllm: Path) -> None:
    (vllm / "vllm/v1/core/sched/scheduler.py").write_text(
        "import no_such_module\nclass Scheduler:\n"
        "    def __init__(self, kv_cache_config):\n"
        "        self.kv_cache_config = kv_cache_config\n"
        "        self.kv_cache_manager = None\n"
    )
    script = (
        START
        + """
from vllm.v1.worker.gpu_worker import Worker
print(hasattr(Worker.determine_available_memory, "egm_alloc_step"))
print(hasattr(Worker, "egm_alloc_extended_kv_bytes"))
worker = Worker()
worker.load_model()
print(worker.egm_alloc_state.settings.kv_bytes, worker.egm_alloc_stock)
"""
    )
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
    assert done.returncode == 0, done.stderr
    # Weights leave room for vLLM's own KV cache, and no host memory is taken for another.
    assert done.stdout.split() == ["False", "False", "0", "None"]
    assert "KV cache in host memory is off: ModuleNotFoundError: No module" in done.stderr


@pytest.mark.simulated
def test_part_whose_source_cannot_be_read_is_off_and_the_others_are_on(vllm: Path) -> None:
    (vllm / "vllm/v1/core/block_pool.py").write_bytes(b"# \xff\n")
    script = (
        START
        + """
from vllm.v1.worker.gpu_worker import Worker
worker = Worker()
worker.load_model()
print(worker.egm_alloc_state.settings.kv_bytes, worker.egm_alloc_stock)
"""
    )
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "None"]
    assert "KV cache in host memory is off: UnicodeDecodeError: " in done.stderr


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"EGM_ALLOC_VLLM_KV_GIB": "-1"}, "KV_GIB is '-1'; allowed: a number"),
        ({"EGM_ALLOC_VLLM_KV_GIB": "much"}, "KV_GIB is 'much'; allowed: a number"),
        ({"EGM_ALLOC_VLLM_KV_GIB": "10000"}, "KV_GIB is 10000 on each of 1 GPUs"),
        ({"EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "all"}, "WEIGHTS_HBM_GIB is 'all'; allowed: a"),
        ({"EGM_ALLOC_VLLM_KV_GIB": "1", "SLEEP": "1"}, "KV_GIB is set together with sleep mode"),
    ],
)
def test_bad_setting_ends_the_start_before_anything_is_loaded(
    vllm: Path, setting: dict[str, str], sentence: str
) -> None:
    done = run(vllm, RUN, **setting, **UNTESTED)
    assert done.returncode == 1
    assert f"ValueError: EGM_ALLOC_VLLM_{sentence}" in done.stderr
    assert "create_engine_config" in done.stderr


def test_plugin_that_fails_is_logged_and_vllm_goes_on(tmp_path: Path) -> None:
    done = run(tmp_path, START + "print('on')", EGM_ALLOC_VLLM="1")  # no vLLM there
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert "vLLM goes on without it" in done.stderr


@pytest.mark.simulated
def test_worker_class_works_with_and_without_the_plugin(vllm: Path) -> None:
    script = """
import egm_alloc, egm_alloc.vllm
from tests.vllm.fakes import MIB, config_of
worker = egm_alloc.vllm.Worker()
worker.load_model(load_dummy_weights=True)
worker.in_hbm = 128 * MIB
available = worker.determine_available_memory()
worker.initialize_from_config(config_of(available // (2 * MIB), MIB))
print(available // MIB, *sorted({egm_alloc.info(c).backing for c in worker.model_runner.kv_caches}))
"""
    for before in ("", START):
        done = run(vllm, before + script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["256", "split"]


@pytest.mark.simulated
def test_worker_class_that_is_switched_off_is_vllms(vllm: Path) -> None:
    script = """
import egm_alloc.vllm
from tests.vllm.fakes import GIB, config_of, MIB
worker = egm_alloc.vllm.Worker()
worker.init_device()
worker.load_model()
assert worker.determine_available_memory() == GIB
worker.initialize_from_config(config_of(64, MIB))
print(worker.egm_alloc_state, egm_alloc.is_enabled())
"""
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", EGM_ALLOC_VLLM="off")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "False"]


def test_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    group = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert group.startswith('egm_alloc = "egm_alloc_vllm:register"\n')
    assert callable(egm_alloc_vllm.register)
