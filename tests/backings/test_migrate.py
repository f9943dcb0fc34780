"""Moving the boundary between HBM and the host in a tensor that lives."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import MIB
from tests.backings.conftest import make, pattern
from tests.simulator import run_script, sim, vmm

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("initialised")]

SIZE = 12 * MIB  # a segment of its own, in 6 chunks
CHUNK = 2 * MIB


@pytest.mark.parametrize("backing", ["numa", "split"])
def test_contents_and_address_stay(backing: str) -> None:
    tensor = make(SIZE, backing)
    tensor.copy_(pattern(SIZE, 1))
    address = tensor.data_ptr()
    for fraction in (1.0, 0.25, 0.0, 0.5, 0.75):
        egm_alloc.migrate(tensor, device_fraction=fraction)
        assert egm_alloc.info(tensor).on_device_bytes == SIZE * fraction // CHUNK * CHUNK
        assert tensor.data_ptr() == address
        assert torch.equal(tensor.cpu(), pattern(SIZE, 1))


def fail_each_call(backing: str) -> None:
    tensor = make(SIZE, backing)
    tensor.copy_(pattern(SIZE, 1))
    expected = tensor.cpu()

    def move() -> None:
        # By two chunks, back and forth.
        to_device = egm_alloc.info(tensor).on_device_bytes != 4 * CHUNK
        egm_alloc.migrate(tensor, device_fraction=4 / 6 if to_device else 2 / 6)

    move()
    failed = set()
    for nth in range(1, sim.count_calls(move) + 1):
        with sim.call_log() as log, sim.fail_call("*", error="cudaErrorUnknown", nth=nth):
            with contextlib.suppress(RuntimeError):
                move()
        failed |= {call.name for call in log if call.result != "cudaSuccess"}
        for chunk in range(0, SIZE, CHUNK):
            access = vmm.access(tensor.data_ptr() + chunk, "device:0")
            assert access == "read-write", (nth, failed)
        assert torch.equal(tensor.cpu(), expected), (nth, failed)
        move()
        assert torch.equal(tensor.cpu(), expected), (nth, failed)
    print(sorted(failed))


@pytest.mark.parametrize("backing", ["numa", "split"])
def test_any_call_may_fail_and_the_tensor_is_whole(backing: str) -> None:
    # What the driver does not take back stays with the process, hence one of its own.
    script = f"""
import egm_alloc
from tests.backings.test_migrate import fail_each_call
egm_alloc.enable(threshold_gib=1 << 20, spill=False)
fail_each_call({backing!r})
"""
    failed = set(re.findall(r"\w+", run_script(script).stdout))
    assert {"cuMemCreate", "cuMemUnmap", "cuMemMap", "cuMemSetAccess", "cudaMemcpy"} <= failed


def test_hbm_that_torch_caches_is_given_back_for_a_move() -> None:
    script = """
import pytest, egm_alloc
from tests.allocator.conftest import MIB, block
from tests.backings.conftest import make
egm_alloc.enable(threshold_gib=1 << 20, spill=False)
tensor = make(64 * MIB, "split", fraction=0.0)
block(96 * MIB)  # of 128
assert egm_alloc.migrate(tensor, device_fraction=1) == 64 * MIB
assert egm_alloc.migrate(tensor, device_fraction=0) == 64 * MIB
held = block(96 * MIB)
with pytest.raises(RuntimeError, match="cuMemCreate.*33554432 bytes. had moved before"):
    egm_alloc.migrate(tensor, device_fraction=1)
assert egm_alloc.info(tensor).on_device_bytes == 32 * MIB
del held
assert egm_alloc.migrate(tensor, device_fraction=1) == 32 * MIB
"""
    run_script(script, devices=1, hbm_gib=0.125)
