"""The entry point and the patches, without vLLM: with a package of its name made by the tests."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import egm_alloc_vllm
from egm_alloc.vllm import contract, source
from egm_alloc.vllm.plugin import KV_CACHE, WEIGHTS
from tests.simulator import Completed, run_script

ROOT = Path(__file__).resolve().parents[2]

# What the plugin patches, with the names that it needs; shaped as in vLLM 0.26.
SOURCES = {
    "vllm/__init__.py": "",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": """
        class EngineArgs:
            def create_engine_config(self, usage_context=None, headless=False):
                import os
                from tests.vllm.fakes import vllm_config
                return vllm_config(model__enable_sleep_mode="SLEEP" in os.environ)
        """,
    "vllm/v1/__init__.py": "",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/model_loader/__init__.py": "",
    "vllm/model_executor/model_loader/base_loader.py": """
        class BaseModelLoader:
            def load_model(self, vllm_config, model_config, prefix=""):
                initialize_model = model_config.load_model
                initialize_model()
                return self.load_weights(model_config)
            def load_weights(self, model):
                return model
        """,
    "vllm/v1/kv_cache_interface.py": """
        class KVCacheTensor:
            size: int
        class KVCacheConfig:
            num_blocks: int
            kv_cache_tensors: list
        """,
    "vllm/v1/worker/__init__.py": "",
    "vllm/v1/worker/gpu_worker.py": """
        from tests.vllm import fakes
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        class Worker(fakes.Worker):
            takes_steps_itself = False
            def init_device(self):
                init_worker_distributed_environment(self.vllm_config, 0)
                self.requested_memory, self.device
                if self.cache_config.gpu_memory_utilization > 1:
                    raise ValueError("less HBM is free than is asked for")
            def load_model(self, *, load_dummy_weights=False):
                BaseModelLoader().load_model(self.vllm_config, self.model_runner)
                self.sampler = self.model_runner.make_sampler()
            def determine_available_memory(self):
                self.cache_config.kv_cache_memory_bytes = self.requested_memory
                return self.in_hbm
            def initialize_from_config(self, kv_cache_config):
                self.model_runner.initialize_kv_cache(kv_cache_config)
        def init_worker_distributed_environment(vllm_config, rank):
            pass
        """,
    "vllm/v1/worker/gpu_model_runner.py": """
        class GPUModelRunner:
            def __init__(self):
                self.kv_caches = []
            def _allocate_kv_cache_tensors(self, kv_cache_config):
                torch.zeros(tensor.size, dtype=torch.int8)
        """,
    "vllm/v1/worker/gpu/__init__.py": "",
    "vllm/v1/worker/gpu/model_runner.py": """
        class GPUModelRunner:
            def initialize_kv_cache(self):
                self.kv_caches = []
        """,
    "vllm/v1/worker/gpu/attn_utils.py": """
        def _allocate_kv_cache(kv_cache_config):
            torch.zeros(tensor.size, dtype=torch.int8)
        """,
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/core.py": """
        from types import SimpleNamespace
        from egm_alloc_vllm import register as load_general_plugins
        from tests.vllm.fakes import MIB, config_of
        class EngineCore:
            def __init__(self, vllm_config):
                load_general_plugins()
                from vllm.v1.core.sched.scheduler import Scheduler
                from vllm.v1.worker.gpu_worker import Worker
                self.worker = Worker(vllm_config)
                self.worker.init_device()
                self.model_executor = SimpleNamespace(
                    determine_available_memory=lambda: [self.worker.determine_available_memory()],
                    initialize_from_config=lambda all: self.worker.initialize_from_config(all[0]),
                    collective_rpc=lambda name: [getattr(self.worker, name)()],
                )
                kv_cache_config = self._initialize_kv_caches(vllm_config)
                self.scheduler = Scheduler(kv_cache_config=kv_cache_config)
            def _initialize_kv_caches(self, vllm_config):
                self.worker.load_model()
                self.worker.in_hbm = 128 * MIB
                (available,) = self.model_executor.determine_available_memory()
                config = config_of(available // (2 * MIB), MIB)
                self.model_executor.initialize_from_config([config])
                return config
        """,
    "vllm/v1/core/__init__.py": "",
    "vllm/v1/core/sched/__init__.py": "",
    "vllm/v1/core/sched/scheduler.py": """
        from types import SimpleNamespace
        from tests.vllm.test_block_queue import Block, Queue
        class Scheduler:
            def __init__(self, kv_cache_config):
                self.kv_cache_config = kv_cache_config
                blocks = [Block(i) for i in range(kv_cache_config.num_blocks)]
                pool = SimpleNamespace(free_block_queue=Queue(blocks))
                self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        """,
    "vllm/v1/core/kv_cache_manager.py": """
        class KVCacheManager:
            def __init__(self):
                self.block_pool = None
        """,
    "vllm/v1/core/block_pool.py": """
        class BlockPool:
            def __init__(self):
                self.free_block_queue = None
        """,
    "vllm/v1/core/kv_cache_utils.py": """
        class FreeKVCacheBlockQueue:
            def __init__(self, blocks):
                self.num_free_blocks = 0
            def popleft(self): pass
            def popleft_n(self, n): pass
            def remove(self, block): pass
            def append(self, block): pass
            def append_n(self, blocks): pass
            def get_all_free_blocks(self): pass
        """,
}

START = """
import sys
import egm_alloc_vllm
egm_alloc_vllm.register()
egm_alloc_vllm.register()
"""

# As in an engine core's own process, which loads the plugins in the midst of its __init__.
SERVE = """
from vllm.v1.engine.core import EngineCore
from tests.vllm.fakes import vllm_config
core = EngineCore(vllm_config())
import egm_alloc
queue = core.scheduler.kv_cache_manager.block_pool.free_block_queue
print(type(queue).__name__, queue.num_free_blocks)
caches = core.worker.model_runner.kv_caches
print(*sorted({egm_alloc.info(cache).backing or "-" for cache in caches}))
"""

# After it, nothing asks for the plugin.
FORGET = "for name in [n for n in os.environ if n.startswith('EGM_ALLOC_')]: del os.environ[name]"

# As in the front end, with the engine core in the same process.
CONFIGURE = "from vllm.engine.arg_utils import EngineArgs; EngineArgs().create_engine_config()"
RUN = START + CONFIGURE + SERVE


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A folder with a package ``vllm``, version 0.26.0, whose source nobody has checked."""
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    metadata = tmp_path / "vllm-0.26.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    return tmp_path


def run(folder: Path, script: str, **variables: str) -> Completed:
    """Run a script on a simulated machine with a folder on its path; it may fail."""
    return run_script(script, machine="h100", hbm_gib=8, env=variables, path=folder, check=False)


UNTESTED = {"EGM_ALLOC_VLLM_ALLOW_UNTESTED": "1"}


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


HOST_MEMORY = """
from vllm.v1.worker.gpu_worker import Worker
from tests.allocator.conftest import wait_for
from tests.simulator import sim
from tests.vllm.fakes import MIB, vllm_config
before = sim.host_numa()["taken"]
"""


def run_worker(folder: Path, script: str, kv_gib: str = "0.125", **variables: str) -> Completed:
    """Run a script after `START` and `HOST_MEMORY`, with an extended KV cache."""
    variables = {"EGM_ALLOC_VLLM_KV_GIB": kv_gib, **UNTESTED, **variables}
    return run(folder, START + HOST_MEMORY + script, **variables)


@pytest.mark.simulated
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
wait_for(lambda: sim.host_numa()["taken"] == before + ahead)
worker.load_model()
assert worker.egm_alloc_stock.held_bytes == ahead
print(sim.host_numa()["taken"] == before + ahead)
"""
    done = run_worker(vllm, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


@pytest.mark.simulated
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
wait_for(lambda: sim.host_numa()["taken"] == before + 96 * MIB)
print(worker.egm_alloc_stock.held_bytes // MIB)
"""
    done = run_worker(vllm, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["less HBM is free than is asked for", "96"]


@pytest.mark.simulated
@pytest.mark.parametrize("weights_hbm_gib", ["auto", "none"])
def test_host_memory_is_taken_once_with_and_without_a_bound_on_weights(
    vllm: Path, weights_hbm_gib: str
) -> None:
    script = """
worker = Worker(vllm_config())
worker.init_device()
worker.load_model()
worker.determine_available_memory()
wait_for(lambda: sim.host_numa()["taken"] >= before + 96 * MIB)
print((sim.host_numa()["taken"] - before) // MIB, worker.egm_alloc_stock.held_bytes // MIB)
"""
    done = run_worker(vllm, script, EGM_ALLOC_VLLM_WEIGHTS_HBM_GIB=weights_hbm_gib)
    assert (done.returncode, done.stdout) == (0, "96 96\n"), done.stderr


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


@pytest.mark.simulated
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


@pytest.mark.simulated
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


@pytest.mark.simulated
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


@pytest.mark.simulated
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
"""
    )
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **UNTESTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    assert "no_such_module" in done.stderr


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
worker.load_model()
assert worker.determine_available_memory() == GIB
worker.initialize_from_config(config_of(64, MIB))
print(worker.egm_alloc_state, egm_alloc.is_enabled())
"""
    variables = {"EGM_ALLOC_VLLM": "off", "EGM_ALLOC_AUTO_ENABLE": "0"}
    done = run(vllm, script, EGM_ALLOC_VLLM_KV_GIB="0.125", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "False"]


def test_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    group = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert group.startswith('egm_alloc = "egm_alloc_vllm:register"\n')
    assert callable(egm_alloc_vllm.register)


def test_every_version_of_the_table_holds() -> None:
    table = contract.table()
    assert {version.rsplit(".", 1)[0] for version in table} == {f"0.{n}" for n in range(20, 34)}
    problems = [
        (version, target, entry["problem"])
        for version, targets in table.items()
        for target, entry in targets.items()
        if entry["problem"] is not None
    ]
    assert problems == []


def test_every_need_is_in_the_table_and_every_patch_is_a_need() -> None:
    for version, targets in contract.table().items():
        for need in (*contract.CHECKS, *contract.WEIGHTS, *contract.KV_CACHE):
            assert targets[need.target]["sha256"], (version, need.target)
    for part in (WEIGHTS, KV_CACHE):
        assert {patch.target for patch in part.patches} <= {need.target for need in part.needs}


def reader(**modules: str) -> Callable[[str], str | None]:
    """Return what reads modules given as ``a_b="text"`` for ``a.b``."""
    return lambda name: modules.get(name.replace(".", "_"))


def test_version_source_and_names_decide_whether_a_need_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "class C:\n    @decorated\n    def f(self, x): return x.size\n"
    need = contract.Need("m:C.f", ("x",), ("size",))
    found = source.find(text, "C.f")
    assert found is not None
    monkeypatch.setattr(contract, "TABLE", tmp_path / "table.json")
    (tmp_path / "table.json").write_text(
        json.dumps({"1.0": {"m:C.f": {"sha256": found.sha256, "problem": None}}})
    )

    def why_not(module: str, version: str = "1.0", allow_untested: bool = False) -> str | None:
        return contract.why_not((need,), reader(m=module), version, allow_untested)

    assert why_not(text) is None
    assert why_not(text, "1.0+cu130") is None
    assert "vLLM 1.1 was not checked" in str(why_not(text, "1.1"))
    assert why_not(text, "1.1", allow_untested=True) is None
    changed = text.replace("x.size", "2 * x.size")
    assert "is not what vLLM 1.0 was checked with" in str(why_not(changed))
    assert why_not(changed, allow_untested=True) is None
    assert why_not(text.replace("size", "bytes"), allow_untested=True) == "m:C.f has no size"
    assert why_not(text.replace("x", "y"), allow_untested=True) == "m:C.f has no x"
    assert why_not("class C: pass", allow_untested=True) == "m:C.f is not there"


def test_source_of_a_function_is_its_text_with_decorators() -> None:
    text = "def f(): pass\nclass A:\n  @d\n  def f(self, a, /, b=1, *c, e, **g):\n    h.i(j=1)\n"
    found = source.find(text, "A.f")
    assert found is not None
    assert found.parameters == ("self", "a", "b", "*c", "e", "**g")
    assert {"h", "i", "j", "d"} <= found.names
    moved = source.find("\n\n" + text, "A.f")
    assert moved is not None
    assert moved.sha256 == found.sha256
    assert source.find(text, "A.g") is None
    assert source.find(text, "A.f.x") is None
