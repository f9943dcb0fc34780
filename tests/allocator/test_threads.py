"""Many threads at once: no deadlock, no loss, and switching on and off beside them."""

from __future__ import annotations

import functools
import random
import threading

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import GIB, MIB, Background, block, managed_segments
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated


def churn(seed: int, steps: int) -> None:
    """Allocate, check that no block is handed out twice, record streams, free."""
    choose = random.Random(seed)
    stream = torch.cuda.Stream()
    live: list[torch.Tensor] = []
    for _ in range(steps):
        action = choose.random()
        if action < 0.5 or not live:
            live.append(block(choose.choice([512, 4096, MIB, 5 * MIB, 64 * MIB, GIB])))
        elif action < 0.6:
            choose.choice(live).record_stream(stream)
        else:
            live.pop(choose.randrange(len(live)))
        del live[:-8]


@pytest.mark.parametrize("mode", ["tiered", "managed"])
def test_threads_allocate_and_free_while_another_reconfigures(mode: str) -> None:
    sim.set_hbm_gib(256)  # while egm_alloc is off, all of it is to fit in HBM
    egm_alloc.enable(threshold_gib=32 / 1024, mode=mode)
    done = threading.Event()

    def reconfigure() -> None:
        while not done.is_set():
            egm_alloc.disable()
            egm_alloc.enable(threshold_gib=32 / 1024)
            egm_alloc.enable(threshold_gib=1)
            egm_alloc.stats()

    def empty() -> None:
        while not done.wait(0.01):
            torch.cuda.empty_cache()

    helpers = [Background(reconfigure), Background(empty)]
    workers = [Background(functools.partial(churn, seed, 300)) for seed in range(6)]
    try:
        for worker in workers:
            worker.finish(120)
    finally:
        done.set()
        for helper in helpers:
            helper.finish()
    egm_alloc.enable(mode="tiered", threshold_gib=1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert managed_segments() == 0
    assert not sim.live_allocations(0).get("managed")


def twenty(device: int) -> list[torch.Tensor]:
    return [block(GIB, device) for _ in range(20)]


def test_two_devices_divert_at_the_same_time() -> None:
    egm_alloc.enable(threshold_gib=1)
    threads = [Background(functools.partial(twenty, device)) for device in (0, 1) for _ in range(2)]
    results = [thread.finish() for thread in threads]
    assert [managed_segments(device) for device in (0, 1)] == [40, 40]
    del results
    for thread in threads:
        thread.result = None


# The observer runs in the midst of a diversion, and the other thread waits for the end of that.
OBSERVER_BESIDE_A_SWITCH = """
import torch, egm_alloc
from tests.allocator.conftest import GIB, Background, block
egm_alloc.enable(threshold_gib=1, backing="device", spill=False)
threads, answers = [], []

def observer(*figures):
    threads.append(Background(lambda: egm_alloc.{switch}()))
    threads[-1].join(0.2)
    answers.append({question})

torch._C._cuda_attach_out_of_memory_observer(observer)
try:
    block(100 * GIB)
except torch.cuda.OutOfMemoryError:
    (thread,) = threads
    thread.finish()
    print("done", len(answers))
"""


@pytest.mark.parametrize("switch", ["enable", "disable"])
@pytest.mark.parametrize(
    "question",
    [
        "egm_alloc.memory_summary()",
        "egm_alloc.get_config()",
        "egm_alloc.enable(threshold_gib=2)",
        "egm_alloc.disable()",
    ],
)
def test_observer_may_ask_and_switch_while_another_thread_switches(
    switch: str, question: str
) -> None:
    script = OBSERVER_BESIDE_A_SWITCH.format(switch=switch, question=question)
    assert "done 1" in run_script(script, timeout=30).stdout
