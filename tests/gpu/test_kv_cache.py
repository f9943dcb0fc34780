"""The tensors of vLLM's KV cache on a real GPU, without vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import egm_alloc
from egm_alloc.vllm import kv_cache, kv_checks
from tests.vllm.fakes import MIB, config_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("make", [kv_cache.make_split, kv_cache.make_managed])
def test_kv_tensors_are_zero_when_all_are_there(
    make: kv_cache.Maker, budget: Callable[[int], None]
) -> None:
    budget(128 * MIB)
    egm_alloc.enable(threshold_gib=1 << 30, spill=False)
    config = config_of(num_blocks=64, page_bytes=MIB, layers=2)
    boundary = kv_cache.find_boundary(config, 50 * MIB)
    device = torch.device("cuda:0")
    used = [make(64 * MIB, device, boundary).fill_(7) for _ in range(2)]
    places = {tensor.data_ptr() for tensor in used}
    del used  # the cache has them now, and what was in them
    with kv_cache.Placement(config, boundary, make) as placement:
        first = torch.zeros(64 * MIB, dtype=torch.int8, device=device)
        assert set(first.view(-1, MIB)[:, -1].tolist()) == {7}
        torch.zeros(64 * MIB, dtype=torch.int8, device=device)
        assert [int(tensor.count_nonzero()) for tensor in placement.tensors] == [0, 0]
    assert {tensor.data_ptr() for tensor in placement.tensors} == places
    kv_checks.check_heads(placement.tensors, boundary)
