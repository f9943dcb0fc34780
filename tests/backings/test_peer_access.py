"""Mapped memory that other devices are allowed to use, on the simulated device.

Torch enables access once per pair of devices, hence a process for each test.
"""

from __future__ import annotations

import pytest

from tests.simulator import run_script

pytestmark = pytest.mark.simulated

PREPARATION = """
import contextlib
import torch, egm_alloc
from tests.allocator.conftest import MIB, Background, block
from tests.backings.conftest import counters, held_by_device, make
from tests.simulator import sim, vmm

egm_alloc.enable(threshold_gib=1 << 20, spill=False)
plain = [block(MIB, device) for device in (0, 1)]
for tensor in plain:
    tensor.cpu()

def let_0_use_memory_of_1():
    plain[1].copy_(plain[0])
"""


def test_access_that_one_range_cannot_be_given_is_given_to_the_others_and_later_ones() -> None:
    # Torch asks once per pair, takes access for given whatever comes of it, and uses it in kernels.
    script = """
ranges = [make(12 * MIB, backing, device=1) for backing in ("numa", "numa", "split")]
ranges.sort(key=torch.Tensor.data_ptr)
with sim.fail_call("cuMemSetAccess", error="cudaErrorUnknown", nth=2) as fault:
    try:
        let_0_use_memory_of_1()
    except RuntimeError as error:
        assert "cuMemSetAccess" in str(error), error
    else:
        raise AssertionError("the failure was swallowed")
assert fault.fired == 1
ranges.append(make(14 * MIB, "numa", device=1))
let_0_use_memory_of_1()
print([vmm.access(tensor.data_ptr(), "device:0") for tensor in ranges])
"""
    ran = run_script(PREPARATION + script, devices=2)
    assert ran.stdout.splitlines()[-1] == str(["read-write", "none", "read-write", "read-write"])


def test_range_that_cannot_be_opened_to_a_peer_is_given_back() -> None:
    # The peer is allowed while the range is being made, so that it is let in as a second step.
    script = """
before = held_by_device(1)
with sim.call_log() as log, sim.fail_call("cuMemSetAccess", error="cudaErrorUnknown", nth=2):
    with sim.stall_call("cuMemSetAccess") as stall:
        making = Background(lambda: make(12 * MIB, "numa", device=1))
        stall.wait_until_reached()
        let_0_use_memory_of_1()
    tensor = making.finish()
results = [call.result for call in log.of("cuMemSetAccess")]
assert results == ["cudaSuccess", "cudaErrorUnknown", "cudaSuccess"], results
assert vmm.access(tensor.data_ptr(), "device:0") == "read-write"
assert counters("numa", 1).segments == 1
del tensor, making
torch.cuda.empty_cache()
assert counters("numa", 1).segments == 0
assert held_by_device(1) == before, (held_by_device(1), before)
print("done")
"""
    assert "done" in run_script(PREPARATION + script, devices=2).stdout


def test_range_whose_addresses_the_driver_keeps_is_in_no_peers_way() -> None:
    script = """
make(12 * MIB, "numa", device=1)
with sim.fail_call("cuMemAddressFree", error="cudaErrorUnknown") as fault:
    torch.cuda.empty_cache()
assert fault.fired == 1
kept = make(12 * MIB, "numa", device=1)
let_0_use_memory_of_1()
print(vmm.access(kept.data_ptr(), "device:0"))
"""
    ran = run_script(PREPARATION + script, devices=2)
    assert ran.stdout.splitlines()[-1] == "read-write"


def test_access_that_torch_enabled_before_is_taken_over() -> None:
    script = """
import torch
plain = [torch.ones(4, device=f"cuda:{device}") for device in (0, 1)]
plain[1].copy_(plain[0])
import egm_alloc
from tests.allocator.conftest import MIB
from tests.backings.conftest import make
from tests.simulator import vmm
egm_alloc.enable(threshold_gib=1 << 20, spill=False)
ranges = [make(12 * MIB, backing, device=1) for backing in ("numa", "split")]
print([vmm.access(tensor.data_ptr(), "device:0") for tensor in ranges])
"""
    ran = run_script(script, devices=2, env={"EGM_ALLOC_AUTO_ENABLE": "0"})
    assert ran.stdout.splitlines()[-1] == str(["read-write"] * 2)
