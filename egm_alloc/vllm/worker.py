"""The plugin as a worker class, for ``--worker-cls egm_alloc.vllm.Worker``: nothing is patched.

It reaches what a worker does. The order in which blocks are handed out is the scheduler's, in
another process, and stays vLLM's own.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker as VllmWorker

import egm_alloc
from egm_alloc.vllm import steps
from egm_alloc_vllm import is_switched_off


class Worker(VllmWorker):  # type: ignore[misc]
    """vLLM's GPU worker, with weights and KV cache beyond HBM; ``EGM_ALLOC_VLLM=0``: as it is."""

    takes_steps_itself = True  # where the plugin has patched the class below, too

    def init_device(self) -> None:
        """Set up the device."""
        if is_switched_off():  # importing the package has switched it on
            egm_alloc.disable()
        self._do(steps.init_device, super().init_device)

    def load_model(self, *rest: Any, **options: Any) -> None:
        """Load the weights, into HBM up to the bound and into host memory beyond it."""
        self._do(steps.load_model, super().load_model, *rest, **options)

    def determine_available_memory(self) -> int:
        """Add the extended memory to what vLLM found for the KV cache in HBM."""
        step = super().determine_available_memory
        return int(self._do(steps.determine_available_memory, step))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache, its first blocks in HBM, and say what it costs."""
        self._do(steps.initialize_from_config, super().initialize_from_config, kv_cache_config)

    def _do(self, ours: steps.Step, theirs: steps.Step, *rest: Any, **options: Any) -> Any:
        if is_switched_off():
            return theirs(*rest, **options)
        return ours(self, theirs, *rest, **options)
