"""How fast a model is served whose weights or KV cache are partly on the host: a simple model.

A step reads all weights and the KV cache of every running sequence once, and the time for that is
what it takes: decoding is bound by memory. The times for HBM and for the link add up, since
kernels that read one tensor from both hide little of the one behind the other
(docs/memory-kinds.md, "Split"). Prompts are bound by arithmetic instead: two operations per weight
and token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """What the memory and the arithmetic of one GPU can do.

    Parameters
    ----------
    hbm_bytes_per_s, link_bytes_per_s : float
        How fast kernels read HBM, and host memory.
    operations_per_s : float
        Of matrix products in the type of the weights.
    step_overhead_s, sequence_overhead_s : float
        What a step takes besides: scheduling, launches, sampling; once, and for each sequence.
    """

    hbm_bytes_per_s: float
    link_bytes_per_s: float
    operations_per_s: float
    step_overhead_s: float
    sequence_overhead_s: float


@dataclass(frozen=True)
class Load:
    """What is served on one GPU.

    Parameters
    ----------
    weights_hbm_bytes, weights_host_bytes : float
        The weights in HBM and on the host.
    bytes_per_weight : float
        2 for bfloat16.
    kv_bytes_per_token : float
        All layers together.
    sequences : int
        How many are to be served at once.
    prompt_tokens, output_tokens : int
        Of each sequence.
    """

    weights_hbm_bytes: float
    weights_host_bytes: float
    bytes_per_weight: float
    kv_bytes_per_token: float
    sequences: int
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> float:
        """The tokens that a sequence has in the KV cache at half of its output."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def kv_bytes(self) -> float:
        """The KV cache of all sequences when they are done."""
        whole = self.prompt_tokens + self.output_tokens
        return self.sequences * whole * self.kv_bytes_per_token


@dataclass(frozen=True)
class Forecast:
    """How a load is served.

    Parameters
    ----------
    at_once : int
        Sequences that run together.
    step_s : float
        The time of a step that decodes one token of each.
    tokens_per_s : float
        Output tokens, prompts included in the time.
    kv_host_bytes : float
        KV cache that is read from the host in such a step.
    """

    at_once: int
    step_s: float
    tokens_per_s: float
    kv_host_bytes: float


def forecast(machine: Machine, load: Load, kv_hbm_bytes: float, kv_host_bytes: float) -> Forecast:
    """Return how a load is served with a KV cache of so many bytes in HBM and on the host.

    Parameters
    ----------
    machine : Machine
        The GPU.
    load : Load
        What is served.
    kv_hbm_bytes, kv_host_bytes : float
        The size of the KV cache. Sequences that it cannot hold wait until others are done.

    Returns
    -------
    Forecast
        With `at_once` 0 and no tokens if it cannot hold one sequence.
    """
    whole = load.kv_bytes / load.sequences
    at_once = min(load.sequences, math.floor((kv_hbm_bytes + kv_host_bytes) / whole))
    if at_once == 0:
        return Forecast(0, math.inf, 0.0, 0.0)
    # HBM's blocks are taken first.
    held = at_once * load.tokens * load.kv_bytes_per_token
    on_host = max(0.0, held - kv_hbm_bytes)
    step = machine.step_overhead_s + at_once * machine.sequence_overhead_s
    step += load.weights_hbm_bytes / machine.hbm_bytes_per_s
    step += load.weights_host_bytes / machine.link_bytes_per_s
    step += (held - on_host) / machine.hbm_bytes_per_s + on_host / machine.link_bytes_per_s
    weights = (load.weights_hbm_bytes + load.weights_host_bytes) / load.bytes_per_weight
    prompts = load.sequences * load.prompt_tokens * 2 * weights / machine.operations_per_s
    # What prompts leave on the host is written there once.
    turns = load.sequences / at_once
    prompts += turns * on_host * load.prompt_tokens / load.tokens / machine.link_bytes_per_s
    seconds = prompts + turns * load.output_tokens * step
    tokens = load.sequences * load.output_tokens
    return Forecast(at_once, step, tokens / seconds, on_host)


def break_even_link(
    machine: Machine, load: Load, kv_hbm_bytes: float, kv_host_bytes: float
) -> float | None:
    """Return the link at which holding more sequences is as fast as letting them wait.

    Parameters
    ----------
    machine : Machine
        The GPU; its own link does not count.
    load : Load
        What is served.
    kv_hbm_bytes, kv_host_bytes : float
        The KV cache in HBM and on the host.

    Returns
    -------
    float or None
        Bytes per second; None if the host's part holds no more sequences than HBM does alone, or
        HBM not a single one, so that there is nothing to compare, or if one of the two is faster
        over any link.
    """
    waiting = forecast(machine, load, kv_hbm_bytes, 0)
    extended = forecast(machine, load, kv_hbm_bytes, kv_host_bytes)
    if waiting.at_once in (0, extended.at_once):
        return None

    def is_faster(link: float) -> bool:
        changed = replace(machine, link_bytes_per_s=link)
        # Weights on the host are read over the same link in both cases.
        return (
            forecast(changed, load, kv_hbm_bytes, kv_host_bytes).tokens_per_s
            >= forecast(changed, load, kv_hbm_bytes, 0).tokens_per_s
        )

    low, high = 1e6, 1e15
    if not is_faster(high) or is_faster(low):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high
