"""Workers of several GPUs, each a process, on a simulated machine with a coherent link."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from egm_alloc.vllm import host, steps
from tests.allocator.conftest import Background, wait_for
from tests.simulator import run_script, sim
from tests.vllm.fakes import GIB, MIB, Worker, vllm_config

SCRIPT = """
import logging, os, socket, sys
import torch
from torch import distributed
from tests.vllm.fakes import GIB, MIB, Runner, Worker, config_of, pretend_world_group, vllm_config

rank = int(os.environ["RANK"])
pretend_world_group(None)
other = (396 if rank else 332) * GIB  # what the other finds

def gather(found, mine, group):
    found[rank], found[1 - rank] = mine, (socket.gethostname(), other)

distributed.get_world_size = lambda group: 2
distributed.all_gather_object = gather
logging.basicConfig(stream=sys.stdout, format="%(message)s", level="INFO")
import egm_alloc
from egm_alloc.vllm import host, steps
from egm_alloc.vllm.settings import Settings

torch.cuda.set_device(rank)
device = torch.device(f"cuda:{rank}")
worker = Worker(vllm_config(parallel__local_world_size=2), Runner(device, weight_bytes=2 * MIB))
worker.device = device
# Of unequal hosts, as their reserves are here, the least holds.
egm_alloc.enable(host_reserve_gib=64 + 64 * rank, threshold_gib=1 << 20)
print("auto", host.kv_bytes(worker, Settings(kv_bytes="auto")) / GIB)

os.environ["EGM_ALLOC_VLLM_KV_GIB"] = "0.125"
worker.in_hbm = 128 * MIB
steps.load_model(worker, worker.load_model)
available = steps.determine_available_memory(worker, worker.determine_available_memory)
config = config_of(available // (2 * MIB), page_bytes=MIB)
steps.initialize_from_config(worker, worker.initialize_from_config, config)
where = {cache.device.index for cache in worker.model_runner.kv_caches}
assert where == {rank}, where
assert {egm_alloc.info(cache).backing for cache in worker.model_runner.kv_caches} == {"split"}
assert steps.extended_kv_bytes(worker) == 128 * MIB
"""


@pytest.mark.simulated
def test_each_worker_has_its_share_and_one_log_block() -> None:
    def run(rank: int) -> str:
        env = {"RANK": str(rank)}
        return run_script(SCRIPT, machine="gh200", devices=2, env=env).stdout

    ranks = [Background(lambda rank=rank: run(rank)) for rank in (0, 1)]  # type: ignore[misc]
    for rank, process in enumerate(ranks):
        said = str(process.finish(90))
        assert "auto 83.0\n" in said  # half of 460.8 - 128 GiB, for two GPUs
        assert said.count("egm_alloc on cuda:") == 1
        assert f"egm_alloc on cuda:{rank} (Simulated" in said


@pytest.mark.parametrize(
    ("second", "third", "refused"),
    [
        # Each has room, and what the second found was left by the first.
        (("here", 6 * GIB, 10 * GIB), ("there", 6 * GIB, 6 * GIB), False),
        (("here", 8 * GIB, 13 * GIB), ("there", 6 * GIB, 6 * GIB), True),
        (("here", 6 * GIB, 9 * GIB), ("here", 1 * GIB, 6 * GIB), True),
    ],
)
def test_workers_of_a_host_want_no_more_together_than_it_has(
    monkeypatch: pytest.MonkeyPatch, second: Any, third: Any, refused: bool
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(host, "_of_all", lambda mine: [mine, second, third])
    if not refused:
        host.check_room_of_all(6 * GIB, 12 * GIB)
        return
    with pytest.raises(RuntimeError, match=r"KV_GIB is 6.00 on each of [23] GPUs, and the host ha"):
        host.check_room_of_all(6 * GIB, 12 * GIB)


@pytest.mark.simulated
def test_workers_that_want_too_much_together_end_before_they_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EGM_ALLOC_VLLM_KV_GIB", "0.125")
    before, joined = sim.host_numa()["taken"], []
    monkeypatch.setattr(host, "_of_all", lambda mine: [mine, (mine[0], mine[2], mine[2])])
    config = vllm_config(parallel__local_world_size=2)

    def join(*_: object) -> None:
        wait_for(lambda: sim.host_numa()["taken"] == before + 96 * MIB)
        joined.append(True)

    with pytest.raises(RuntimeError, match=r"KV_GIB is 0.12 on each of 2 GPUs"):
        steps.init_device(Worker(config), lambda: steps.join_workers(config, join))
    assert joined == [True]
    assert sim.host_numa()["taken"] == before
