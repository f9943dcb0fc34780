"""As much of vLLM's objects as the plugin uses, shaped as in vLLM 0.26."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MIB = 1 << 20
GIB = 1 << 30


@dataclass
class Tensor:
    """vLLM's ``KVCacheTensor``."""

    size: int
    shared_by: list[str] = field(default_factory=list)
    block_stride: int = 0


@dataclass
class Config:
    """vLLM's ``KVCacheConfig``."""

    num_blocks: int
    kv_cache_tensors: list[Tensor]
    kv_cache_groups: list[Any] = field(
        default_factory=lambda: [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))]
    )


def pretend_world_group(cpu_group: Any) -> None:
    """Have ``vllm.distributed.parallel_state`` with a world group, and nothing else of vLLM."""
    names = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state")
    sys.modules.update({name: ModuleType(name) for name in names})
    group = SimpleNamespace(cpu_group=cpu_group)
    sys.modules[names[-1]].get_world_group = lambda: group  # type: ignore[attr-defined]


def config_of(num_blocks: int, page_bytes: int, layers: int = 2) -> Config:
    """Return the configuration of a KV cache with a tensor for each layer."""
    return Config(num_blocks, [Tensor(num_blocks * page_bytes) for _ in range(layers)])


def vllm_config(**changes: Any) -> Any:
    """Return a configuration of one GPU; ``cache__x=1`` changes ``cache_config.x``."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            enable_sleep_mode=False,
            enable_cumem_allocator=False,
            dtype=torch.bfloat16,
            use_mla=False,
            max_model_len=4096,
            get_hidden_size=lambda: 1024,
            get_vocab_size=lambda: 32000,
            get_num_kv_heads=lambda parallel: 4,
            get_num_layers=lambda parallel: 16,
            get_head_size=lambda: 128,
        ),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            cache_dtype="auto",
            kv_cache_memory_bytes=None,
            gpu_memory_utilization=0.9,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            local_world_size=1,
            data_parallel_size_local=1,
            enable_elastic_ep=False,
            distributed_executor_backend="mp",
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=256),
        kv_transfer_config=None,
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
    )
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        if attribute:
            setattr(getattr(config, f"{part}_config"), attribute, value)
        else:
            setattr(config, name, value)
    return config


class Runner:
    """A model runner with one linear layer a layer and blocks-first KV caches."""

    def __init__(self, device: torch.device, weight_bytes: int = 0, layers: int = 2) -> None:
        self.device = device
        self.kv_caches: list[torch.Tensor] = []
        self.model = torch.nn.Module()
        self.weight_bytes, self.layers = weight_bytes, layers
        self.model_memory_usage = 0

    def load_model(self) -> None:
        """Make the weights as vLLM's layers do, within the device's context."""
        before = torch.cuda.memory_allocated()
        with torch.device(self.device):
            for layer in range(self.layers):
                weight = torch.empty(self.weight_bytes // 2, dtype=torch.bfloat16)
                self.model.register_parameter(
                    f"layer{layer}", torch.nn.Parameter(weight, requires_grad=False)
                )
        self.model_memory_usage = torch.cuda.memory_allocated() - before

    def make_sampler(self) -> torch.Tensor:
        """Make what vLLM's runners make for sampling once the model is loaded."""
        return torch.zeros(4 * MIB, dtype=torch.int32, device=self.device)

    def initialize_kv_cache(self, config: Config) -> None:
        """Make the KV tensors as vLLM 0.26 does, and other tensors beside them."""
        for wanted in config.kv_cache_tensors:
            raw = torch.zeros(wanted.size, dtype=torch.int8, device=self.device)
            page = wanted.size // config.num_blocks
            self.kv_caches.append(raw.view(config.num_blocks, page // 64, 64))
        self.block_table = torch.zeros(4 * MIB, dtype=torch.int32, device=self.device)


class Worker:
    """vLLM's GPU worker; there is no loader that could be patched."""

    takes_steps_itself = True

    def __init__(self, config: Any | None = None, runner: Runner | None = None) -> None:
        self.vllm_config = config or vllm_config()
        self.device = torch.device("cuda:0")
        self.parallel_config = self.vllm_config.parallel_config
        self.cache_config = self.vllm_config.cache_config
        self.model_runner = runner or Runner(self.device)
        self.requested_memory = 4 * GIB
        self.in_hbm = GIB
        self.egm_alloc_state: Any = None
        self.egm_alloc_stock: Any = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model."""
        self.model_runner.load_model()

    def determine_available_memory(self) -> int:
        """Return what HBM has left for the KV cache."""
        return self.in_hbm

    def initialize_from_config(self, kv_cache_config: Config) -> None:
        """Allocate the KV cache."""
        self.model_runner.initialize_kv_cache(kv_cache_config)


def bytes_for_kv_cache(worker: Worker) -> int:
    """Return what the plugin makes of what a worker finds for the KV cache."""
    # Here: a process that only has the fakes must not import egm_alloc by that.
    from egm_alloc.vllm import steps

    return steps.determine_available_memory(worker, worker.determine_available_memory)
