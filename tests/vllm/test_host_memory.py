"""When the plugin begins with host memory, and when it gives it back; without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.fake_package import CONFIGURE, run_worker

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("kind", ["vllm.v1.worker.gpu_worker", "egm_alloc.vllm"])
@pytest.mark.parametrize("configure", [CONFIGURE, ""], ids=["in process", "process of its own"])
def test_host_memory_begins_before_the_model_is_loaded(
    vllm: Path, configure: str, kind: str
) -> None:
    script = f"""
{configure}
from {kind} import Worker
worker = Worker(vllm_config())
worker.init_device()
ahead = (128 - 16 * 2) * MIB  # but for a piece of each layer
wait_for(lambda: worker.egm_alloc_stock.held_bytes == ahead)
worker.load_model()
assert worker.egm_alloc_stock.held_bytes == ahead
print(sim.host_numa()["taken"] == before + ahead)
"""
    done = run_worker(vllm, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize("kind", ["vllm.v1.worker.gpu_worker", "egm_alloc.vllm"])
def test_device_that_cannot_be_set_up_gives_host_memory_back(vllm: Path, kind: str) -> None:
    script = f"""
from {kind} import Worker
worker = Worker(vllm_config(cache__gpu_memory_utilization=2))
try:
    worker.init_device()
except ValueError as error:
    print(error)
assert sim.host_numa()["taken"] == before
# What was never loaded goes when the next one sets up the device.
for _ in range(2):
    worker = Worker(vllm_config())
    worker.init_device()
worker.load_model()
wait_for(lambda: worker.egm_alloc_stock.held_bytes == 96 * MIB)
print((sim.host_numa()["taken"] - before) // MIB)
"""
    done = run_worker(vllm, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["less HBM is free than is asked for", "96"]


@pytest.mark.parametrize("weights_hbm_gib", ["auto", "none"])
def test_host_memory_is_taken_once_with_and_without_a_bound_on_weights(
    vllm: Path, weights_hbm_gib: str
) -> None:
    script = """
worker = Worker(vllm_config())
worker.init_device()
worker.load_model()
worker.determine_available_memory()
wait_for(lambda: worker.egm_alloc_stock.held_bytes == 96 * MIB)
print((sim.host_numa()["taken"] - before) // MIB, worker.egm_alloc_stock.held_bytes // MIB)
"""
    done = run_worker(vllm, script, EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB=weights_hbm_gib)
    assert (done.returncode, done.stdout) == (0, "96 96\n"), done.stderr


@pytest.mark.parametrize("step", ["init_device", "load_model"])
def test_host_nodes_that_the_driver_cannot_map_are_refused_by_the_settings_name(
    vllm: Path, step: str
) -> None:
    script = f"Worker(vllm_config()).{step}()"
    size = "1" if step == "init_device" else "0"
    variables = {"EGM_ALLOC_VLLM_BACKING": "numa", "EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB": "0"}
    done = run_worker(vllm, script, size, EGM_SIM_HOST_NUMA_VMM="0", **variables)
    assert done.returncode == 1
    assert "ValueError: EGM_ALLOC_VLLM_BACKING is 'numa'" in done.stderr


def test_engine_asks_for_room_when_the_one_before_has_gone(vllm: Path) -> None:
    script = """
import gc
from egm_alloc.vllm import host
from vllm.v1.engine.core import EngineCore
held, check_room = [], host.check_room
def look(*arguments):
    held.append(sim.host_numa()["taken"] - before)
    check_room(*arguments)
host.check_room = look
gc.disable()
for _ in range(2):
    core = EngineCore(vllm_config())
    core.itself = core  # only the collector finds it
    del core
assert sim.host_numa()["taken"] > before
print(held)
"""
    done = run_worker(vllm, script)
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n"), done.stderr


def test_load_that_fails_at_once_gives_back_what_was_begun(vllm: Path) -> None:
    script = """
import egm_alloc
def enable(**fields):
    raise RuntimeError("as enable() fails")
worker = Worker(vllm_config())
worker.init_device()
egm_alloc.enable = enable
try:
    worker.load_model()
except RuntimeError as error:
    print(error)
assert sim.host_numa()["taken"] == before
"""
    done = run_worker(vllm, script)
    assert (done.returncode, done.stdout) == (0, "as enable() fails\n"), done.stderr


def test_replaced_function_takes_its_arguments_by_name(vllm: Path) -> None:
    script = """
from functools import partial
from egm_alloc.vllm import steps
from vllm.v1.worker import gpu_worker
worker = Worker(vllm_config())
join = gpu_worker.init_worker_distributed_environment
steps.init_device(worker, partial(join, rank=0, vllm_config=vllm_config()))
wait_for(lambda: sim.host_numa()["taken"] > before)
print("begun")
"""
    done = run_worker(vllm, script)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr


def test_what_the_host_cannot_give_is_refused_while_the_device_is_set_up(
    vllm: Path, tmp_path: Path
) -> None:
    script = f"""
from pathlib import Path
from tests.simulator.host import write_host
sim.set_host_root(write_host(Path({str(tmp_path)!r}), 64, 10))
Worker(vllm_config()).init_device()
"""
    done = run_worker(vllm, script, "20", EGM_ALLOC_HOST_RESERVE_GIB="2")
    assert "KV_GIB is 20.00, and the host has room for 8.00 GiB" in done.stderr
