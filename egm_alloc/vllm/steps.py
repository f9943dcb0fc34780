"""What the plugin does in each step of a start of vLLM.

Each function takes the object of vLLM's and the step as it was, and does that step in its place.
The patches (``plugin.py``) and the worker class (``worker.py``) call the same functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import egm_alloc
from egm_alloc.vllm import host, kv_cache, report, weights
from egm_alloc.vllm.block_queue import HbmFirstQueue
from egm_alloc.vllm.checks import check
from egm_alloc.vllm.settings import Settings, from_environment

logger = logging.getLogger("vllm.egm_alloc")

_NEVER_GIB = float(1 << 32)  # a threshold that no request reaches

Step = Callable[..., Any]


@dataclass
class _State:
    """What the steps of one worker have found out."""

    settings: Settings
    weights_backing: str
    kv_bytes: int = 0


def create_engine_config(args: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Check the settings against vLLM's configuration, before anything is loaded."""
    config = step(*rest, **options)
    check(config, from_environment())
    return config


def load_model(worker: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Load the weights, into HBM up to the bound and into host memory beyond it."""
    state = _state_of(worker)
    bound = state.settings.weights_hbm_bytes
    if bound is None:
        return step(*rest, **options)
    if bound == "auto":
        bound = weights.default_hbm_bytes(
            worker.vllm_config, worker.requested_memory, state.settings.kv_bytes != 0
        )
    with weights.Placement(bound, state.weights_backing, worker.device.index):
        return step(*rest, **options)


def determine_available_memory(worker: Any, step: Step) -> int:
    """Add the extended memory to what vLLM found for the KV cache in HBM."""
    state = _state_of(worker)
    in_hbm = int(step())
    if in_hbm < 0:
        return in_hbm  # not even the activations fit: vLLM's own error follows
    state.kv_bytes = host.kv_bytes(worker, state.settings)
    return kv_cache.KVBytes(in_hbm + state.kv_bytes, state.kv_bytes)


def initialize_from_config(worker: Any, step: Step, kv_cache_config: Any) -> None:
    """Allocate the KV cache, its first blocks in HBM, and say what it costs."""
    state = _state_of(worker)
    boundary = kv_cache.find_boundary(kv_cache_config, state.kv_bytes)
    if boundary.extended_blocks == 0:
        step(kv_cache_config)
        tensors = []
    else:
        make = host.kv_maker(state.settings, worker.device.index)
        with kv_cache.Placement(kv_cache_config, boundary, make) as placement:
            step(kv_cache_config)
        tensors = placement.tensors
        kv_cache.check_layout(worker.model_runner.kv_caches, tensors, boundary)
        kv_cache.check_heads(tensors, boundary)
    report.log_costs(worker, boundary, tensors)


def order_blocks(core: Any) -> None:
    """Have the scheduler of an engine core hand out the blocks in HBM first."""
    extended = getattr(core.available_gpu_memory_for_kv_cache, "extended", 0)
    boundary = kv_cache.find_boundary(core.scheduler.kv_cache_config, extended)
    if boundary.extended_blocks == 0:
        return
    pool = core.scheduler.kv_cache_manager.block_pool
    pool.free_block_queue = HbmFirstQueue(
        pool.free_block_queue, boundary.hbm_blocks, boundary.extended_blocks
    )


def initialize_engine_core(core: Any, step: Step, *rest: Any, **options: Any) -> None:
    """Make an engine core, and order its blocks."""
    step(*rest, **options)
    order_blocks(core)


def _state_of(worker: Any) -> _State:
    state = getattr(worker, "egm_alloc_state", None)
    if state is None:
        settings = from_environment()
        check(worker.vllm_config, settings)
        # Phases place tensors, sizes do not; and what HBM cannot hold is vLLM's to know.
        egm_alloc.enable(
            threshold_gib=_NEVER_GIB,
            device="all",
            mode="tiered",
            preferred_location="host",
            accessed_by=("device", "host"),
            prefetch=False,
            spill=False,
        )
        torch.cuda.init()
        state = _State(settings, host.weights_backing(settings, worker.device.index))
        worker.egm_alloc_state = state
    return state
