"""Backing "auto": what it means on each machine, and when that is asked."""

from __future__ import annotations

import json

import pytest

import egm_alloc
from egm_alloc import Config
from egm_alloc.environment import from_environment
from tests.allocator.conftest import MIB, block
from tests.simulator import run_script

pytestmark = pytest.mark.simulated

SCENARIO = """
import json, torch, egm_alloc
egm_alloc.enable(threshold_gib=1 / 64, backing="auto")
tensor = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
print(json.dumps([egm_alloc.info(tensor).backing, *egm_alloc._C.choose_backing(0)]))
"""


@pytest.mark.parametrize(
    ("machine", "backing", "word"),
    [
        ("h100", "pinned", "PCIe"),
        ("h200", "pinned", "PCIe"),
        ("gh200", "managed", "coherent"),
        ("gh200-driver-managed", "managed", "coherent"),
        ("gh200-egm", "numa", "EGM"),
        ("gb200", "managed", "coherent"),
        ("gb10", "managed", "one memory"),
        ("no-managed", "pinned", "cannot use managed memory while the CPU does"),
    ],
)
def test_each_machine_gets_what_suits_it(machine: str, backing: str, word: str) -> None:
    landed, said, reason = json.loads(run_script(SCENARIO, machine=machine).stdout)
    assert (landed, said) == (backing, backing)
    assert word in reason


def test_devices_are_asked_on_first_use_and_once() -> None:
    # Another process, because what was found out once is kept.
    run_script(
        """
import torch, egm_alloc
from tests.simulator import sim
torch.ones(1, device="cuda")
tensors = []
def questions(size, device=0):
    with sim.call_log(everything=True) as log:
        tensors.append(torch.empty(size << 20, dtype=torch.uint8, device=f"cuda:{device}"))
        return len(log.of("cudaDeviceGetAttribute"))
egm_alloc.enable(threshold_gib=1 / 64, backing="auto")
assert questions(1) == 0
first, second, other = questions(32), questions(64), questions(32, device=1)
assert first == other > second, (first, second, other)  # a backing itself asks each time
assert [egm_alloc.info(tensor).backing for tensor in tensors[1:]] == ["pinned"] * 3
""",
        devices=2,
    )


def test_enabling_leaves_cuda_down() -> None:
    result = run_script(
        """
import torch, egm_alloc
from tests.simulator import sim
with sim.call_log(everything=True) as log:
    egm_alloc.enable(backing="auto")
print(log.names, torch.cuda.is_initialized())
"""
    )
    assert result.stdout.strip() == "[] False"


def test_device_that_does_not_answer_is_asked_again() -> None:
    run_script(
        """
import torch, egm_alloc
from tests.simulator import sim
torch.ones(1, device="cuda")
egm_alloc.enable(threshold_gib=1 / 64, backing="auto")
make = lambda: torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
with sim.fail_call("cudaDeviceGetAttribute", error="cudaErrorUnknown", times=-1):
    try:
        make()
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "cudaDeviceGetAttribute failed with cudaErrorUnknown" in str(error)
assert egm_alloc.info(make()).backing == "pinned"
"""
    )


def test_block_may_ask_for_auto() -> None:
    egm_alloc.enable()
    with egm_alloc.place("auto"):
        assert egm_alloc.info(block(2 * MIB)).backing == "pinned"


def test_environment_may_ask_for_auto() -> None:
    assert from_environment({"EGM_ALLOC_BACKING": "auto"}) == Config(backing="auto")


def test_mode_managed_refuses_auto() -> None:
    with pytest.raises(ValueError, match=r"backing is 'auto'; allowed: 'managed' in mode"):
        Config(mode="managed", backing="auto")
