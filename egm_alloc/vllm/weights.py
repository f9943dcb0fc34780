"""Where the weights are: in HBM up to a bound, the others in host memory that the GPU reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import egm_alloc
from egm_alloc import _C
from egm_alloc.placement import MIN_BYTES

_GIB = 1 << 30

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
        torch.empty_like,
        torch.zeros_like,
        torch.ones_like,
        torch.full_like,
        torch.rand_like,
        torch.randn_like,
    )
)
# Calls that may move a tensor to the GPU, and make as large a one there.
_MOVES = frozenset((torch.Tensor.to, torch.Tensor.cuda))


class Placement(TorchFunctionMode):
    """Within the block, tensors are made in HBM while the bound allows it, else on the host.

    Tensors below 1 MiB are made in HBM in any case, as `egm_alloc.place` does. A tensor computed
    from others goes where the last larger one went, and to the host once the bound is reached.

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
        self._over = hbm_bytes == 0
        self.was_entered = False

    def __enter__(self) -> Placement:
        """Begin to place tensors."""
        self.was_entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

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
        over = self._over
        if not torch.compiler.is_compiling():
            size = _size_on_gpu(func, args, kwargs)
            if size is None:  # the room may be used up by now
                over = self._over or self._in_hbm(self._device) >= self._most
            elif size >= MIN_BYTES:
                over = self._over = self._in_hbm(self._device) + size > self._most
        if not over:
            return func(*args, **kwargs)
        with egm_alloc.place(self._backing, tag="weights"):
            return func(*args, **kwargs)


def _size_on_gpu(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    """Return the size in bytes of what a call will make on the GPU; None if it cannot be told."""
    if kwargs.get("out") is not None:
        return None
    like = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if func in _MOVES:
        if like is None or like.device.type != "cpu":
            return None
        to_gpu = func is torch.Tensor.cuda or _device_among(args[1:], kwargs) == "cuda"
        return int(like.nbytes) if to_gpu else None
    if func not in _FACTORIES:
        return None
    device = kwargs.get("device")
    if device is None:
        device = torch.get_default_device() if like is None else like.device
    if torch.device(device).type != "cuda":
        return None
    unpinned = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    try:
        made: torch.Tensor = func(*args, **{**unpinned, "device": "meta"})
    except Exception:  # the call itself will say what is wrong
        return None
    return int(made.nbytes)


def _device_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the type of the device that the arguments of ``Tensor.to`` name, if they name one."""
    for given in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(given, torch.Tensor):
            return given.device.type
        if isinstance(given, str):
            return given.partition(":")[0]
        if isinstance(given, torch.device):
            return given.type
        if isinstance(given, int) and not isinstance(given, bool):
            return "cuda"
    return None


def extended_bytes(device: int) -> int:
    """Return the bytes of weights that are on the host, of all models on a GPU."""
    tags = egm_alloc.stats(device).tags
    return tags["weights"].allocated_bytes if "weights" in tags else 0


def moved_by_vllm(vllm_config: Any) -> bool:
    """Return whether vLLM itself is told to keep weights on the host."""
    offload = getattr(vllm_config, "offload_config", None)
    uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
    return bool(getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0))


def default_hbm_bytes(vllm_config: Any, room: int, extended_kv: bool) -> int:
    """Return the HBM that weights may take if nobody says: what vLLM may use, less what it needs.

    Left out are estimates of the activations of one full step or, if that is more, of sampling for
    a full batch, of the kernels that are loaded when they are first used and of CUDA graphs, and
    room for the KV cache: kv_cache_memory_bytes if that is set, else one sequence of the greatest
    length, or an eighth of all if that is less; a thirty-second beside an extended KV cache. A
    model that leaves this much free is not touched.

    Parameters
    ----------
    vllm_config : VllmConfig
        vLLM's.
    room : int
        The bytes of HBM that vLLM may use (gpu_memory_utilization).
    extended_kv : bool
        Whether the KV cache is on the host too.

    Returns
    -------
    int
        Bytes from 0 up.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    tokens = scheduler.max_num_batched_tokens
    # A layer's inputs, outputs and its wider inner ones, twice.
    activations = tokens * model.get_hidden_size() * 16 * 2
    # Of each token of the vocabulary its logit and probability, in 32 bits, and its rank, in 64.
    sampling = scheduler.max_num_seqs * model.get_vocab_size() * 16
    # Code on the GPU, and workspaces of libraries; with graphs those too. Estimates.
    kernels = _GIB // 2 if getattr(model, "enforce_eager", False) else _GIB
    kv = vllm_config.cache_config.kv_cache_memory_bytes
    if not kv:
        kv = room // (32 if extended_kv else 8)
        if not fits_length_to_cache(vllm_config):
            kv = min(kv, kv_bytes_of_sequence(vllm_config, model.max_model_len))
    return max(0, int(room - max(activations, sampling) - kernels - kv))


def fits_length_to_cache(vllm_config: Any) -> bool:
    """Return whether vLLM takes the length of a sequence from the KV cache that it finds (-1)."""
    return getattr(vllm_config.model_config, "original_max_model_len", None) == -1


def kv_bytes_of_sequence(vllm_config: Any, tokens: int) -> int:
    """Return the bytes that a sequence of so many tokens takes in one GPU's KV cache.

    A layer with a sliding window keeps those within it and those of one step, one with linear
    attention none. Padding to blocks is left out.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    config = getattr(model, "hf_text_config", None)
    types = getattr(config, "layer_types", None) or ["full_attention"]
    in_layer = {"linear_attention": 0}
    window = getattr(config, "sliding_window", None)
    # vLLM may be told, or have to, treat all layers alike.
    if window and not getattr(scheduler, "disable_hybrid_kv_cache_manager", False):
        in_layer["sliding_attention"] = min(tokens, window + scheduler.max_num_batched_tokens)
    kept = sum(in_layer.get(each, tokens) for each in types)
    return kept * _kv_bytes_per_token(vllm_config) // len(types)


def _kv_bytes_per_token(vllm_config: Any) -> int:
    """Return the bytes that a token takes if every layer keeps it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    element = 1 if "fp8" in cache_dtype or "int8" in cache_dtype else model.dtype.itemsize
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    layers = model.get_num_layers(parallel)
    return int(layers * heads * model.get_head_size() * element)
