"""What the plugin needs of vLLM's source, and in which versions that was found to hold.

``make vllm-contract`` reads the source of every version from its wheel and writes `TABLE`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from egm_alloc.vllm import source

TABLE = Path(__file__).with_name("contract.json")

# The text of a module of vLLM's by its dotted name; None if there is no such module.
Reader = Callable[[str], str | None]


def read_installed(module: str) -> str | None:
    """Return the source of an installed module, without running it; None if there is none."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if found is None or found.origin is None:
        return None
    return Path(found.origin).read_text("utf-8")


@dataclass(frozen=True)
class Need:
    """A function or class that the plugin replaces or relies on.

    Parameters
    ----------
    target : str
        Module and path, such as ``"vllm.v1.worker.gpu_worker:Worker.load_model"``.
    parameters : tuple of str
        Parameters that it must have.
    names : tuple of str
        Names that must occur in it, because the plugin counts on what is done with them.
    """

    target: str
    parameters: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def examine(self, read: Reader) -> tuple[str | None, str | None]:
        """Return the hash of the target's source, and what is wrong with it; None for nothing."""
        module, path = self.target.split(":")
        text = read(module)
        found = None if text is None else source.find(text, path)
        if found is None:
            return None, f"{self.target} is not there"
        lacking = [name for name in self.parameters if name not in found.parameters]
        lacking += [name for name in self.names if name not in found.names]
        return found.sha256, f"{self.target} has no {', '.join(lacking)}" if lacking else None


_INITIALIZE_FROM_CONFIG = Need(
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
    ("self", "kv_cache_config"),
    ("initialize_kv_cache",),
)
_INIT_DEVICE = Need(
    "vllm.v1.worker.gpu_worker:Worker.init_device",
    ("self",),
    ("requested_memory", "device", "init_worker_distributed_environment", "vllm_config"),
)
CHECKS = (Need("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),)
WEIGHTS = (
    Need("vllm.v1.worker.gpu_worker:Worker.load_model", ("self",), ("model_runner", "load_model")),
    Need(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        ("self", "vllm_config", "model_config"),
        ("load_weights",),
    ),
    _INIT_DEVICE,
    _INITIALIZE_FROM_CONFIG,
)
KV_CACHE = (
    _INIT_DEVICE,
    Need("vllm.v1.worker.gpu_worker:init_worker_distributed_environment", ("vllm_config",)),
    Need(
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        ("self",),
        ("kv_cache_memory_bytes", "requested_memory"),
    ),
    Need("vllm.utils.mem_utils:memory_profiling", (), ("non_kv_cache_memory",)),
    Need("vllm.utils.mem_utils:MemoryProfilingResult", (), ("non_torch_increase",)),
    _INITIALIZE_FROM_CONFIG,
    Need(
        "vllm.v1.engine.core:EngineCore.__init__",
        ("self", "vllm_config"),
        ("load_general_plugins", "_initialize_kv_caches", "kv_cache_config"),
    ),
    Need(
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        ("self",),
        ("model_executor", "determine_available_memory", "initialize_from_config"),
    ),
    Need(
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        ("kv_cache_config",),
        ("kv_cache_config", "kv_cache_manager"),
    ),
    Need("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", (), ("block_pool",)),
    Need("vllm.v1.core.block_pool:BlockPool.__init__", (), ("free_block_queue",)),
    Need(
        "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue",
        ("self", "blocks"),
        (
            *("num_free_blocks", "popleft", "popleft_n", "remove", "append", "append_n"),
            "get_all_free_blocks",
        ),
    ),
    Need("vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__", (), ("kv_caches",)),
    Need("vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache", (), ("kv_caches",)),
    Need("vllm.v1.kv_cache_interface:KVCacheTensor", (), ("size",)),
    Need("vllm.v1.kv_cache_interface:KVCacheConfig", (), ("num_blocks", "kv_cache_tensors")),
)


def examine(read: Reader) -> dict[str, dict[str, str | None]]:
    """Return, for every need, the hash of its source and what is wrong with it."""
    result = {}
    for need in (*CHECKS, *WEIGHTS, *KV_CACHE, *allocators(read)):
        sha256, problem = need.examine(read)
        result[need.target] = {"sha256": sha256, "problem": problem}
    return result


def _allocator(target: str) -> Need:
    return Need(target, ("kv_cache_config",), ("zeros", "int8", "size"))


def allocators(read: Reader) -> tuple[Need, ...]:
    """Return what allocates KV tensors: one per layer up to vLLM 0.28, one for all from 0.29."""
    of_all = _allocator("vllm.v1.worker.utils:allocate_kv_cache")
    if of_all.examine(read)[0] is not None:
        return (of_all,)
    return (
        _allocator("vllm.v1.worker.gpu_model_runner:GPUModelRunner._allocate_kv_cache_tensors"),
        _allocator("vllm.v1.worker.gpu.attn_utils:_allocate_kv_cache"),
    )


def takes_reserved_off(read: Reader) -> bool:
    """Return whether vLLM takes what torch has reserved off what is in use on the GPU.

    Since 0.27 it goes by what the driver says is free, in which host memory has no part.
    """
    by_driver = Need("vllm.utils.mem_utils:MemoryProfilingResult", names=("total_consumed",))
    return by_driver.examine(read)[1] is not None


def table() -> dict[str, dict[str, dict[str, str | None]]]:
    """Return what was found in each version: from version to target to its hash and problem."""
    loaded: dict[str, dict[str, dict[str, str | None]]] = json.loads(TABLE.read_text("utf-8"))
    return loaded


def why_not(
    needs: tuple[Need, ...], read: Reader, version: str, allow_untested: bool
) -> str | None:
    """Return why the source at hand may not be patched, or None if it may.

    Parameters
    ----------
    needs : tuple of Need
        What a part of the plugin needs.
    read : callable
        Reads the source at hand.
    version : str
        Its version; what follows a ``+`` does not count.
    allow_untested : bool
        Whether a source that no one has looked at will do, if it has what is needed.
    """
    known = table().get(version.split("+", maxsplit=1)[0])
    for need in needs:
        sha256, problem = need.examine(read)
        if problem is not None:
            return problem
        if allow_untested:
            continue
        if known is None:
            return f"vLLM {version} was not checked (EGM_ALLOC_VLLM_ALLOW_UNTESTED=1 to try)"
        if known.get(need.target, {}).get("sha256") != sha256:
            return (
                f"{need.target} is not what vLLM {version} was checked with "
                "(EGM_ALLOC_VLLM_ALLOW_UNTESTED=1 to try)"
            )
    return None
