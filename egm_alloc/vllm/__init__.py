"""The vLLM plugin: models and KV caches larger than HBM. docs/vllm.md says how to use it."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    # --worker-cls egm_alloc.vllm.Worker; its module needs vLLM, this package does not.
    if name == "Worker":
        from egm_alloc.vllm.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
