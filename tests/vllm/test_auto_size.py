"""KV_GIB=auto, on simulated machines whose GPU reaches the host over a coherent link."""

from __future__ import annotations

import pytest

from tests.simulator import run_script

SCRIPT = """
import torch
from torch import distributed
from tests.vllm.fakes import GIB, Worker, pretend_world_group

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
pretend_world_group(distributed.group.WORLD)
import egm_alloc
from egm_alloc.vllm import host
from egm_alloc.vllm.settings import Settings
egm_alloc.enable(host_reserve_gib=64, threshold_gib=1 << 20)
for gpus in (1, 4):
    distributed.get_world_size = lambda group: gpus
    distributed.all_gather_object = lambda found, mine, group: found.__setitem__(
        slice(None), [mine] * gpus
    )
    worker = Worker()
    print(host.kv_bytes(worker, Settings(kv_bytes="auto")) / GIB)
    print(host.kv_bytes(worker, Settings(kv_bytes="auto", backing="managed")) / GIB)
"""


@pytest.mark.simulated
def test_half_of_what_the_host_can_spare_is_divided_among_its_gpus() -> None:
    # Of 512 GiB 460.8 are available, less a reserve of 64.
    said = run_script(SCRIPT, machine="gh200").stdout.split()
    assert said == ["198.0", "198.0", "49.0", "49.0"]


@pytest.mark.simulated
def test_whether_auto_adds_anything_is_known_before_loading() -> None:
    script = """
from egm_alloc.vllm import host
from egm_alloc.vllm.settings import Settings
print(host.extends_kv(Settings(kv_bytes="auto"), 0))
"""
    assert run_script(script, machine="gh200").stdout == "True\n"
    assert run_script(script, machine="h200").stdout == "False\n"


@pytest.mark.simulated
def test_carve_out_is_what_mapped_memory_has() -> None:
    said = run_script(SCRIPT, machine="gh200-egm").stdout.split()
    assert said[0] == "200.0"  # half of the 400 GiB of the carve-out
    assert said[2] == "50.0"
    assert said[1] != said[0]  # managed memory comes from what the kernel has


@pytest.mark.simulated
def test_over_pcie_nothing_is_added() -> None:
    assert run_script(SCRIPT, machine="h100").stdout.split() == ["0.0"] * 4
