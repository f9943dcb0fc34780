"""What cannot work together is refused before vLLM spends a minute on loading."""

from __future__ import annotations

import logging
import os
from typing import Any

from egm_alloc import _C
from egm_alloc.config import FIELDS
from egm_alloc.environment import values_from_environment
from egm_alloc.vllm.settings import BACKING, KV, WEIGHTS, Settings
from egm_alloc.vllm.weights import moved_by_vllm

logger = logging.getLogger("vllm.egm_alloc")

_GIB = 1 << 30


def check(vllm_config: Any, settings: Settings) -> None:
    """Check the plugin's settings against vLLM's configuration and the host.

    Parameters
    ----------
    vllm_config : VllmConfig
        vLLM's.
    settings : Settings
        The plugin's.

    Raises
    ------
    ValueError
        If they cannot go together; says why and what to do.
    """
    # The only one of egm_alloc's own settings that counts in vLLM's processes.
    values_from_environment(skip=[name for name in FIELDS if name != "host_reserve_gib"])
    wants_kv = settings.kv_bytes != 0
    if wants_kv:
        _check_kv_cache(vllm_config, settings)
    # The default bound is no wish of the user's: see places_weights_itself.
    wants_weights = isinstance(settings.weights_hbm_bytes, int)
    if wants_weights and moved_by_vllm(vllm_config):
        raise ValueError(
            f"{WEIGHTS} is set together with vLLM's own offloading of weights (cpu_offload_gb or "
            "offload_group_size): both would move them. Unset one of them"
        )
    if wants_weights and _flag("VLLM_ENABLE_STARTUP_PLAN"):
        raise ValueError(
            f"{WEIGHTS} is set together with VLLM_ENABLE_STARTUP_PLAN, by which vLLM takes the "
            "size of the KV cache from an earlier start, where another part of the weights may "
            "have been in HBM. Unset one of them"
        )
    hidden = _hidden_by_ray(vllm_config.parallel_config)
    if not (wants_kv or wants_weights):
        if hidden is not None:
            logger.warning("egm_alloc: the plugin is off in the workers: %s", hidden)
        return
    if hidden is not None:
        raise ValueError(hidden)
    if _has_own_pool(vllm_config):
        name = KV if wants_kv else WEIGHTS
        raise ValueError(
            f"{name} is set together with sleep mode (enable_sleep_mode or "
            "enable_cumem_allocator): that keeps weights and KV cache in a memory pool of its "
            f"own, whose tensors egm_alloc must not place. Unset {name}, or turn sleep mode off"
        )


def places_weights_itself(vllm_config: Any) -> bool:
    """Return whether vLLM is told what does not go with a bound on weights.

    One that is set is refused then; the default one steps aside.
    """
    return (
        moved_by_vllm(vllm_config)
        or _has_own_pool(vllm_config)
        or _flag("VLLM_ENABLE_STARTUP_PLAN")
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "0").strip() not in ("", "0")


def _has_own_pool(vllm_config: Any) -> bool:
    model = vllm_config.model_config
    return bool(
        getattr(model, "enable_sleep_mode", False)
        or getattr(model, "enable_cumem_allocator", False)
    )


def _hidden_by_ray(parallel: Any) -> str | None:
    """Return why the workers do not see the settings, and what to do; None if they see them."""
    if parallel.distributed_executor_backend != "ray":
        return None
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    prefixes = tuple(filter(None, map(str.strip, os.environ.get(name, "").split(","))))
    if "EGM_ALLOC_VLLM".startswith(prefixes):
        return None
    return (
        "the executor is Ray, whose workers do not get EGM_ALLOC_ variables: set "
        f"{name}=EGM_ALLOC_, or use distributed_executor_backend='mp'"
    )


def _check_kv_cache(vllm_config: Any, settings: Settings) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if settings.backing == "pinned":
        raise ValueError(
            f"{BACKING} is 'pinned' and {KV} is set: one KV tensor has its head in HBM and its "
            "tail on the host, which pinned memory cannot give it. Choose 'numa', 'managed' or "
            "'auto'"
        )
    if cache.num_gpu_blocks_override is not None:
        raise ValueError(
            f"{KV} is set together with num_gpu_blocks_override "
            f"({cache.num_gpu_blocks_override}): which of that many blocks fit into HBM is not "
            "known. Set kv_cache_memory_bytes or gpu_memory_utilization instead"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"{KV} is set together with pipeline_parallel_size "
            f"{parallel.pipeline_parallel_size}: the stages have blocks of different sizes, so "
            "there is no common number of blocks in HBM. Use tensor_parallel_size"
        )
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        raise ValueError(
            f"{KV} is set together with a KV connector (kv_transfer_config or "
            "kv_offloading_size): connectors register the KV cache as memory of one device, "
            "which an extended one is not. Unset one of them"
        )
    if getattr(parallel, "enable_elastic_ep", False):
        raise ValueError(
            f"{KV} is set together with enable_elastic_ep, which fixes the size of the KV cache "
            "elsewhere. Unset one of them"
        )
    attention = getattr(vllm_config, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None:
        raise ValueError(
            f"{KV} is set together with hisparse_config, which has a pool of host blocks of its "
            "own. Unset one of them"
        )
    ranks = max(1, getattr(parallel, "data_parallel_size_local", 1) or 1)
    if settings.kv_bytes == "auto" and ranks > 1:
        raise ValueError(
            f"{KV} is 'auto' and data_parallel_size_local is {ranks}: each of them would take its "
            "share of the whole host. Give a number of GiB for each GPU"
        )
    if isinstance(settings.kv_bytes, int):
        # Of these vLLM does not know which GPUs share a host; their workers find out.
        elsewhere = parallel.distributed_executor_backend in ("ray", "external_launcher")
        gpus = 1 if elsewhere else ranks * max(1, getattr(parallel, "local_world_size", 1))
        _check_host(settings, settings.kv_bytes, gpus)


def _check_host(settings: Settings, kv_bytes: int, gpus: int) -> None:
    """Refuse what the host does not even have; what can be had now is seen by each worker.

    No CUDA call: this process of vLLM's may still fork.
    """
    has, what = _C.host_total()
    carveout = _C.egm_carveout()
    if carveout is not None and settings.backing in ("auto", "numa"):
        has, what = carveout, "the carve-out of Extended GPU Memory"
    if kv_bytes * gpus > has:
        raise ValueError(
            f"{KV} is {kv_bytes / _GIB:g} on each of {gpus} GPUs, and {what} has "
            f"{has / _GIB:.1f} GiB in all; allowed: up to {has / gpus / _GIB:.1f}"
        )
