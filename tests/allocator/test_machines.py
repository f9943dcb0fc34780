"""The allocator on every machine that the simulator knows."""

from __future__ import annotations

import pytest

from tests.simulator import run_script

pytestmark = pytest.mark.simulated

each_machine = pytest.mark.parametrize(
    "machine", ["h100", "gh200", "gh200-driver-managed", "gh200-egm", "gb200", "gb10", "no-managed"]
)

SCENARIO = """
import sys, warnings, torch, egm_alloc
concurrent = sys.argv[1] == "concurrent"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for mode in ("tiered", "managed"):
        egm_alloc.enable(threshold_gib=1, mode=mode)
        sizes = (1 << 20, 1 << 30, 6 << 30)
        tensors = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in sizes]
        assert egm_alloc.info(tensors[-1]).backing == "managed"
        assert egm_alloc.info(tensors[0]).tier == ("device" if mode == "tiered" else "extended")
        tensors[-1][:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
        assert tensors[-1][:3].tolist() == [1, 2, 3]
        assert egm_alloc.residency(tensors[-1]).memory_type == "managed"
        del tensors
        torch.cuda.empty_cache()
        assert egm_alloc.stats().extended_tier.reserved_bytes == 0
ours = [str(w.message) for w in caught if "egm_alloc" in str(w.message)]
stats = egm_alloc.stats().extended["managed"]
if concurrent:
    assert not ours, ours
    assert stats.advice_failures == stats.prefetch_failures == 0
else:
    assert len(ours) == 2, ours
    assert any("cudaMemAdvise" in text for text in ours)
    assert any("cudaMemPrefetchAsync" in text for text in ours)
    assert stats.advice_failures and stats.prefetch_failures
"""


@each_machine
def test_both_modes_on_each_machine(machine: str) -> None:
    run_script(SCENARIO, "alone" if machine == "no-managed" else "concurrent", machine=machine)


KINDS = """
import torch, egm_alloc
for kind in ("pinned", "numa", "split"):
    with egm_alloc.place(kind):
        tensor = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    assert egm_alloc.info(tensor).backing == kind
    for end in (tensor[:3], tensor[-3:]):
        end[:] = torch.tensor([1, 2, 3], dtype=torch.uint8)
        assert end.tolist() == [1, 2, 3]
    assert egm_alloc.residency(tensor[-1:]).memory_type == "host"
    del tensor, end
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended_tier.reserved_bytes == 0
"""


@each_machine
def test_host_resident_kinds_on_each_machine(machine: str) -> None:
    run_script(KINDS, machine=machine)
