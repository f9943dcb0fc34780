"""What the plugin does in each step of a start of vLLM.

Each function takes the object of vLLM's and the step as it was, and does that step in its place.
The patches (``plugin.py``) and the worker class (``worker.py``) call the same functions.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

import egm_alloc
from egm_alloc import _C
from egm_alloc.vllm import contract, host, kv_cache, kv_checks, report, weights
from egm_alloc.vllm.block_queue import HbmFirstQueue
from egm_alloc.vllm.checks import check, places_weights_itself
from egm_alloc.vllm.settings import KV, WEIGHTS, Settings, from_environment

logger = logging.getLogger("vllm.egm_alloc")

_NEVER_GIB = float(1 << 32)  # a threshold that no request reaches

Step = Callable[..., Any]

# Set where vLLM's scheduler and workers could not be patched to know of an extended KV cache.
_kv_cache_is_vllms = False


def forgo_kv_cache() -> None:
    """Leave the KV cache to vLLM in this process, whatever the settings say."""
    global _kv_cache_is_vllms  # noqa: PLW0603
    _kv_cache_is_vllms = True


# Of the worker that is loading: what its loaders make goes where this says.
_placement_of_weights: ContextVar[weights.Placement | None] = ContextVar(
    "_placement_of_weights", default=None
)


# The worker that is setting up its device: what has the workers meet is a function without one.
_setting_up: ContextVar[Any] = ContextVar("_setting_up", default=None)


@dataclass
class _State:
    """What the steps of one worker have found out."""

    settings: Settings
    weights_backing: str
    kv_bytes: int = 0
    bounds_weights: bool = False
    extended_weights_bytes: int = 0


def create_engine_config(args: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Check the settings against vLLM's configuration, before anything is loaded."""
    config = step(*rest, **options)
    check(config, from_environment())
    return config


def init_device(worker: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Set up a worker's device; if that fails, give back what was begun meanwhile."""
    token = _setting_up.set(worker)
    try:
        with _stock_only_if_it_goes_well(worker):
            return step(*rest, **options)
    finally:
        _setting_up.reset(token)


def join_workers(vllm_config: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Have a worker that has chosen its device meet the others; its host memory comes up already.

    The driver takes its time for host memory, one request after the other, so what can be begun
    before the model is loaded is waited for less in the end.
    """
    worker, settings = _setting_up.get(), from_environment()
    check(vllm_config, settings)
    size = settings.kv_bytes
    if worker is None or not isinstance(size, int) or size == 0:
        return step(*rest, **options)
    # An engine that this process had before may not be collected yet, and its memory is cached.
    gc.collect()
    torch.cuda.empty_cache()
    host.check_backing(settings, worker.device.index)
    spare = host.check_room(size, settings)
    _begin_kv_stock(worker, settings, size)
    result = step(*rest, **options)
    if vllm_config.parallel_config.local_world_size > 1:
        host.check_room_of_all(size, spare)
    return result


def load_model(worker: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Load the weights, into HBM up to the bound and into host memory beyond it."""
    with _stock_only_if_it_goes_well(worker):
        state = _state_of(worker)
        size = state.settings.kv_bytes
        if _stock_of(worker) is None and isinstance(size, int):
            host.check_room(size, state.settings)
            _begin_kv_stock(worker, state.settings, size)
        return _load_weights(worker, state, step, *rest, **options)


def _load_weights(worker: Any, state: _State, step: Step, *rest: Any, **options: Any) -> Any:
    bound = state.settings.weights_hbm_bytes
    if bound is None or (bound == "auto" and places_weights_itself(worker.vllm_config)):
        return step(*rest, **options)
    if bound == "auto":
        room = worker.requested_memory
        if worker.cache_config.kv_cache_memory_bytes:  # with it, vLLM heeds no other limit
            room, _ = torch.cuda.mem_get_info(worker.device)
        extends_kv = host.extends_kv(state.settings, worker.device.index)
        bound = weights.default_hbm_bytes(worker.vllm_config, room, extends_kv)
    state.bounds_weights = True
    before = weights.extended_bytes(worker.device.index)
    placement = weights.Placement(bound, state.weights_backing, worker.device.index)
    with contextlib.ExitStack() as stack:
        if getattr(worker, "takes_steps_itself", False):
            stack.enter_context(placement)
        else:
            token = _placement_of_weights.set(placement)
            stack.callback(_placement_of_weights.reset, token)
        result = step(*rest, **options)
    if not placement.was_entered:
        logger.warning(
            "egm_alloc: the loader of these weights does all by itself (no load_model of "
            "BaseModelLoader's), so all of them are in HBM and %s does nothing",
            WEIGHTS,
        )
    state.extended_weights_bytes += weights.extended_bytes(worker.device.index) - before
    return result


def load_one_model(loader: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Load the weights of one model; what the worker makes besides, such as samplers, is not."""
    with _placement_of_weights.get() or contextlib.nullcontext():
        return step(*rest, **options)


def determine_available_memory(worker: Any, step: Step, *rest: Any, **options: Any) -> int:
    """Add the extended memory to what vLLM found for the KV cache in HBM."""
    state = _state_of(worker)
    state.kv_bytes = host.kv_bytes(worker, state.settings)  # all workers meet in it
    _begin_kv_stock(worker, state.settings, state.kv_bytes)
    with _stock_only_if_it_goes_well(worker):
        in_hbm = int(step(*rest, **options))
    given = worker.cache_config.kv_cache_memory_bytes
    if not given and contract.takes_reserved_off(contract.read_installed):
        in_hbm -= kv_cache.idle_bytes(worker.device.index)
    if state.bounds_weights:
        report.warn_of_small_kv_cache(worker, in_hbm, state.kv_bytes, state.extended_weights_bytes)
    if in_hbm <= 0:  # vLLM's own error follows
        _drop_stock(worker)
        return in_hbm
    return in_hbm + state.kv_bytes


def initialize_from_config(
    worker: Any, step: Step, kv_cache_config: Any, *rest: Any, **options: Any
) -> None:
    """Allocate the KV cache, its first blocks in HBM, and say what it costs."""
    state = _state_of(worker)
    boundary = kv_cache.find_boundary(kv_cache_config, state.kv_bytes)
    stock = _take_stock(worker)
    placement, speed = None, None

    def fill(tensors: Sequence[torch.Tensor]) -> None:
        nonlocal speed
        # Now: the link will be busy with the zeros.
        speed = report.read_speed_of_tail(tensors[0], boundary)
        kv_cache.zero(tensors)

    if boundary.extended_blocks > 0:
        make = host.kv_maker(state.settings, worker.device.index)
        placement = kv_cache.Placement(kv_cache_config, boundary, make, fill)
    with stock or contextlib.nullcontext(), placement or contextlib.nullcontext():
        step(kv_cache_config, *rest, **options)
    tensors = placement.tensors if placement is not None else []
    if tensors:
        kv_checks.check_layout(worker.model_runner.kv_caches, tensors, boundary)
        kv_checks.check_heads(tensors, boundary)
    try:
        extended_weights = state.extended_weights_bytes
        report.log_costs(worker, kv_cache_config, boundary, extended_weights, speed)
    except Exception:  # a report must not end a start that went well
        logger.exception("egm_alloc: what this start costs could not be found out")


def _begin_kv_stock(worker: Any, settings: Settings, size: int) -> None:
    """Have host memory for the KV cache brought up while the model is loaded and profiled."""
    device, config = worker.device.index, worker.vllm_config
    if size == 0 or _stock_of(worker) is not None:
        return
    if host.kv_maker(settings, device) is not kv_cache.make_split:
        return  # nothing is mapped
    layers = config.model_config.get_num_layers(config.parallel_config)
    worker.egm_alloc_stock = _C.HostStock(device, *kv_cache.stock_sizes(size, layers))


def _stock_of(worker: Any) -> _C.HostStock | None:
    stock: _C.HostStock | None = getattr(worker, "egm_alloc_stock", None)
    return stock


def _take_stock(worker: Any) -> _C.HostStock | None:
    stock, worker.egm_alloc_stock = _stock_of(worker), None
    return stock


def _drop_stock(worker: Any) -> None:
    stock = _take_stock(worker)
    if stock is not None:
        stock.close()


@contextlib.contextmanager
def _stock_only_if_it_goes_well(worker: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _drop_stock(worker)
        raise


def extended_kv_bytes(worker: Any) -> int:
    """Return what a worker added to the KV cache; the engine core asks each."""
    return _state_of(worker).kv_bytes


def initialize_kv_caches(core: Any, step: Step, *rest: Any, **options: Any) -> Any:
    """Have the workers allocate the KV cache, and note the boundary for the scheduler."""
    config = step(*rest, **options)
    extended = set(core.model_executor.collective_rpc("egm_alloc_extended_kv_bytes"))
    if len(extended) > 1:
        raise RuntimeError(
            f"egm_alloc: the workers extended their KV caches by different sizes "
            f"({sorted(extended)} bytes), so there is no common boundary: set {KV} alike for all"
        )
    config.egm_alloc_boundary = kv_cache.find_boundary(config, max(extended, default=0))
    return config


def initialize_scheduler(scheduler: Any, step: Step, *rest: Any, **options: Any) -> None:
    """Make a scheduler, and have it hand out the blocks in HBM first."""
    step(*rest, **options)
    boundary = getattr(scheduler.kv_cache_config, "egm_alloc_boundary", None)
    if boundary is None:
        logger.warning(
            "egm_alloc: the scheduler was not told how many KV blocks are in HBM, and hands them "
            "out in vLLM's order"
        )
    if boundary is None or boundary.extended_blocks == 0:
        return
    pool = scheduler.kv_cache_manager.block_pool
    pool.free_block_queue = HbmFirstQueue(pool.free_block_queue, boundary.hbm_blocks)


def _state_of(worker: Any) -> _State:
    state = getattr(worker, "egm_alloc_state", None)
    if state is None:
        settings = from_environment()
        if _kv_cache_is_vllms and not getattr(worker, "takes_steps_itself", False):
            settings = replace(settings, kv_bytes=0)
        check(worker.vllm_config, settings)
        host.check_backing(settings, worker.device.index)
        # Phases place tensors, sizes do not; and what HBM cannot hold is vLLM's to know.
        egm_alloc.enable(
            threshold_gib=_NEVER_GIB,
            limit_gib=None,
            device="all",
            mode="tiered",
            backing="managed",
            preferred_location="host",
            accessed_by=("device", "host"),
            prefetch=False,
            spill=False,
        )
        torch.cuda.init()
        state = _State(settings, host.weights_backing(settings, worker.device.index))
        worker.egm_alloc_state = state
    return state
