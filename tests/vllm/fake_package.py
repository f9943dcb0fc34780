"""A package ``vllm`` for tests, with what the plugin patches, and scripts that use it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.simulator import Completed, run_script

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
    "vllm/utils/__init__.py": "",
    "vllm/utils/mem_utils.py": """
        class MemoryProfilingResult:
            non_torch_increase: int = 0
        def memory_profiling():
            non_kv_cache_memory = 0
            yield non_kv_cache_memory
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

# As in the front end, with the engine core in the same process.
CONFIGURE = "from vllm.engine.arg_utils import EngineArgs; EngineArgs().create_engine_config()"
RUN = START + CONFIGURE + SERVE


UNTESTED = {"EGM_ALLOC_VLLM_ALLOW_UNTESTED": "1"}


def write_vllm(folder: Path) -> None:
    """Write the package, version 0.26.0, whose source nobody has checked."""
    for name, text in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    metadata = folder / "vllm-0.26.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")


def run(folder: Path, script: str, **variables: str) -> Completed:
    """Run a script on a simulated machine with a folder on its path; it may fail."""
    return run_script(script, machine="h100", hbm_gib=8, env=variables, path=folder, check=False)


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
