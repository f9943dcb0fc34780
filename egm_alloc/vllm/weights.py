"""Where the weights are: in HBM up to a bound, the others in host memory that the GPU reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import egm_alloc
from egm_alloc import _C

# Calls that make a tensor from nothing but arguments, so that its size can be asked beforehand.
_FACTORIES = frozenset(
    (
        torch.empty,
        torch.empty_strided,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.rand,
        torch.randn,
        torch.arange,
    )
)


class Placement(TorchFunctionMode):
    """Within the block, tensors are made in HBM while the bound allows it, else on the host.

    Parameters
    ----------
    hbm_bytes : int
        What tensors made within the block may take of HBM.
    backing : {"pinned", "numa", "managed"}
        The host memory.
    device : int
        The index of the GPU.
    """

    def __init__(self, hbm_bytes: int, backing: str, device: int) -> None:
        super().__init__()
        self._most = self._in_hbm(device) + hbm_bytes
        self._backing = backing
        self._device = device

    @staticmethod
    def _in_hbm(device: int) -> int:
        return _C.stats(device)["device_tier"]["allocated_bytes"]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function with its results where they belong."""
        kwargs = kwargs or {}
        size = 0
        if func in _FACTORIES:
            if torch.device(kwargs.get("device") or "cpu").type != "cuda":
                return func(*args, **kwargs)
            unpinned = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            size = func(*args, **{**unpinned, "device": "meta"}).nbytes
        if self._in_hbm(self._device) + size <= self._most:
            return func(*args, **kwargs)
        with egm_alloc.place(self._backing, tag="weights"):
            return func(*args, **kwargs)


def default_hbm_bytes(vllm_config: Any, requested: int, extended_kv: bool) -> int:
    """Return the HBM that weights may take if nobody says: what vLLM may use, less what it needs.

    Left out are estimates of the activations of one full step, of a tenth for everything else and,
    without an extended KV cache, of the KV cache of one sequence of the greatest length. A model
    that leaves this much free is not touched.

    Parameters
    ----------
    vllm_config : VllmConfig
        vLLM's.
    requested : int
        The bytes of HBM that vLLM may use (gpu_memory_utilization).
    extended_kv : bool
        Whether the KV cache may be on the host too.

    Returns
    -------
    int
        Bytes from 0 up.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    tokens = scheduler.max_num_batched_tokens
    # A layer's inputs, outputs and its wider inner ones, twice; and a step's logits in 32 bits.
    activations = tokens * model.get_hidden_size() * 16 * 2
    logits = scheduler.max_num_seqs * model.get_vocab_size() * 4 * 2
    sequence = 0 if extended_kv else kv_bytes_per_token(vllm_config) * model.max_model_len
    return max(0, int(requested - requested // 10 - activations - logits - sequence))


def kv_bytes_per_token(vllm_config: Any) -> int:
    """Return the bytes that each token takes in one GPU's KV cache, all layers together."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    element = 1 if "fp8" in cache_dtype or "int8" in cache_dtype else model.dtype.itemsize
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    layers = model.get_num_layers(parallel)
    return int(layers * heads * model.get_head_size() * element)
