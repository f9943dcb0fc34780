"""Putting the plugin's steps in the place of vLLM's, in one process."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from egm_alloc.vllm import contract, steps
from egm_alloc.vllm.settings import from_environment
from egm_alloc_vllm import is_configured

logger = logging.getLogger("vllm.egm_alloc")


@dataclass(frozen=True)
class Patch:
    """A method or function of vLLM's and the step that takes its place.

    Parameters
    ----------
    target : str
        Module and path, such as ``"vllm.v1.worker.gpu_worker:Worker.load_model"``.
    step : callable
        Called with the object (of a function: its first argument), the method as it was, bound to
        it, and the other arguments.
    """

    target: str
    step: Callable[..., Any]

    def find(self) -> tuple[Any, str, Callable[..., Any]]:
        """Return the owner of the method, its name and itself; imports the module."""
        module, path = self.target.split(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        return owner, name, getattr(owner, name)

    def apply(self) -> None:
        """Put the step in the method's place; once, however often it is called."""
        owner, name, method = self.find()
        if hasattr(method, "egm_alloc_step"):
            return

        step, parameters = self.step, inspect.signature(method).parameters

        @functools.wraps(method)
        def replaced(*arguments: Any, **options: Any) -> Any:
            # A function's first argument may be given by its name.
            first, *rest = arguments or [options.pop(next(iter(parameters)))]
            bound = functools.partial(method, first)
            # Another engine of this process may do without the plugin.
            if getattr(first, "takes_steps_itself", False) or not is_configured():
                return bound(*rest, **options)
            return step(first, bound, *rest, **options)

        replaced.egm_alloc_step = step  # type: ignore[attr-defined]
        setattr(owner, name, replaced)


@dataclass(frozen=True)
class Part:
    """A part of the plugin: all of its patches are made, or none."""

    name: str
    needs: tuple[contract.Need, ...]
    patches: tuple[Patch, ...]


CHECKS = Part(
    "the check of settings at start-up",
    contract.CHECKS,
    (Patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", steps.create_engine_config),),
)
_ALLOCATE = Patch(
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config", steps.initialize_from_config
)
WEIGHTS = Part(
    "weights in host memory",
    contract.WEIGHTS,
    (
        Patch("vllm.v1.worker.gpu_worker:Worker.load_model", steps.load_model),
        Patch(
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
            steps.load_one_model,
        ),
        _ALLOCATE,
    ),
)
KV_CACHE = Part(
    "KV cache in host memory",
    contract.KV_CACHE,
    (
        Patch("vllm.v1.worker.gpu_worker:Worker.init_device", steps.init_device),
        Patch("vllm.v1.worker.gpu_worker:init_worker_distributed_environment", steps.join_workers),
        Patch(
            "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
            steps.determine_available_memory,
        ),
        _ALLOCATE,
        # EngineCore loads the plugins from its __init__, so only what that calls can be replaced.
        Patch("vllm.v1.engine.core:EngineCore._initialize_kv_caches", steps.initialize_kv_caches),
        Patch("vllm.v1.core.sched.scheduler:Scheduler.__init__", steps.initialize_scheduler),
    ),
)


def install() -> None:
    """Patch vLLM in this process, as far as its version was checked and the settings ask for it.

    Bad settings are not raised here, where vLLM would end with a trace of its own loading:
    `EngineArgs.create_engine_config` raises them, before anything is loaded.
    """
    version = importlib.metadata.version("vllm")
    try:
        settings = from_environment()
    except ValueError as error:
        if not _install_part(CHECKS, version, allow_untested=True):
            logger.error("egm_alloc: the plugin is off: %s", error)
        return
    parts = [CHECKS]
    if settings.weights_hbm_bytes is not None:
        parts.append(WEIGHTS)
    if settings.kv_bytes != 0:
        parts.append(KV_CACHE)
    for part in parts:
        _install_part(part, version, settings.allow_untested)


def _install_part(part: Part, version: str, allow_untested: bool) -> bool:
    """Make all patches of a part or, with a line in the log, none."""
    try:
        needs = part.needs
        if part is KV_CACHE:
            needs += contract.allocators(contract.read_installed)
        reason = contract.why_not(needs, contract.read_installed, version, allow_untested)
        for patch in part.patches if reason is None else ():
            patch.find()
    except Exception as error:  # it cannot be read or imported; nothing is changed yet
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.warning("egm_alloc: %s is off: %s", part.name, reason)
        if part is KV_CACHE:
            steps.forgo_kv_cache()
        return False
    for patch in part.patches:
        patch.apply()
    if part is KV_CACHE:
        worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
        worker.egm_alloc_extended_kv_bytes = steps.extended_kv_bytes
    return True
