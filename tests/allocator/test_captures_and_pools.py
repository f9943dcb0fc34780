"""CUDA graphs and pools of the user's come first, and work as they do without egm_alloc."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import (
    GIB,
    MIB,
    Background,
    block,
    diversion_underway,
    managed_segments,
    tier,
)
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated


def test_large_tensor_made_in_a_graph_capture_stays_in_hbm() -> None:
    egm_alloc.enable(threshold_gib=1)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros(16, device="cuda")
    with torch.cuda.graph(graph):
        static.add_(1)
        inside = block(2 * GIB)
    graph.replay()
    assert tier(inside) == "device"
    assert tier(block(2 * GIB)) == "extended"


def test_request_for_a_stream_that_captures_stays_in_hbm_though_another_is_current() -> None:
    egm_alloc.enable(threshold_gib=1)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros(16, device="cuda")
    captures, current = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=captures, capture_error_mode="relaxed"):
        static.add_(1)
        with torch.cuda.stream(current):
            address = torch.cuda.caching_allocator_alloc(2 * GIB, 0, captures)
        assert managed_segments() == 0
        torch.cuda.caching_allocator_delete(address)
    graph.replay()


COMPILED = """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
table = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
def forward(x):
    return (x + table[:1024].float()).relu()
compiled = torch.compile(forward, backend="cudagraphs")
x = torch.zeros(1024, device="cuda")
with torch.no_grad():
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x)
    large = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
    compiled(x)
print(egm_alloc.info(table).tier, egm_alloc.info(large).tier)
"""


def test_compiled_function_with_cudagraphs_runs_beside_extended_tensors() -> None:
    assert run_script(COMPILED).stdout.split()[-2:] == ["extended", "extended"]


def test_capture_goes_on_while_another_thread_diverts_and_frees() -> None:
    egm_alloc.enable(threshold_gib=1)
    outside = block(2 * GIB)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros(16, device="cuda")

    def divert_and_free() -> str | None:
        nonlocal outside
        del outside
        # A retired pool's segments are returned to the driver in the midst of the capture.
        torch.cuda.empty_cache()
        return tier(block(3 * GIB))

    with torch.cuda.graph(graph):
        static.add_(1)
        assert Background(divert_and_free).finish() == "extended"
        static.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert managed_segments() == 0


def test_release_forbidden_by_a_capture_is_made_up_for_later() -> None:
    # Up to torch 2.12 diversions after a recorded stream take 512 bytes from the device tier for a
    # moment. With this no segment for them is freed below, ahead of the managed one.
    kept = block(512)
    egm_alloc.enable(threshold_gib=1)
    tensor = block(2 * GIB)
    del tensor
    with sim.fail_call("cudaFree", error="cudaErrorStreamCaptureUnsupported", times=1):
        torch.cuda.empty_cache()
    assert managed_segments() == 1  # still booked: the memory is still there
    other = block(GIB)
    assert managed_segments() == 1
    assert other.numel() == GIB
    del kept


def test_user_pool_claims_large_tensors_of_its_thread() -> None:
    egm_alloc.enable(threshold_gib=1)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = block(2 * GIB)
        outside = Background(lambda: block(2 * GIB)).finish()
    assert tier(inside) == "device"
    assert isinstance(outside, torch.Tensor)
    assert tier(outside) == "extended"
    (segment,) = [s for s in pool.snapshot() if s["address"] == inside.data_ptr()]
    assert segment["total_size"] == 2 * GIB
    del inside, outside, pool


def test_pool_begun_before_enable_still_wins() -> None:
    egm_alloc.enable(threshold_gib=1)
    egm_alloc.disable()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        egm_alloc.enable()
        inside = block(2 * GIB)
    assert tier(inside) == "device"
    assert tier(block(2 * GIB)) == "extended"
    del inside, pool


def test_expandable_segments_keep_working_for_the_device_tier() -> None:
    run_script(
        """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
small = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
large = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(small).tier == "device"
assert egm_alloc.info(large).tier == "extended"
segments = {s["address"]: s["is_expandable"] for s in torch.cuda.memory._snapshot()["segments"]}
assert segments[large.data_ptr()] is False
assert any(segments.values())
""",
        env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )


# ~MemPool empties its pool. Up to torch 2.12 that asserts while any pool is recorded to, and an
# exception out of a destructor ends the process; hence a process of its own. It runs with the GIL
# held, and so must not keep it while it waits.
POOL_DESTROYED = """
import threading, torch, egm_alloc
from tests.simulator import sim
egm_alloc.enable(threshold_gib=1)
pool = torch.cuda.MemPool()
with torch.cuda.use_mem_pool(pool):
    inside = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
del inside
made = []
with sim.stall_call("cudaMallocManaged", seconds=1.0) as delay:
    thread = threading.Thread(
        target=lambda: made.append(torch.empty(2 << 30, dtype=torch.uint8, device="cuda"))
    )
    thread.start()
    delay.wait_until_reached()
    del pool
    thread.join(30)
    assert not thread.is_alive()
assert egm_alloc.info(made[0]).tier == "extended"
print("survived")
"""


def test_pool_may_be_destroyed_while_another_thread_diverts() -> None:
    # Without this setting ~MemPool would wait for torch's device lock, and so for the diversion.
    unlocked = {"PYTORCH_CUDA_ALLOC_CONF": "release_lock_on_cudamalloc:True"}
    assert "survived" in run_script(POOL_DESTROYED, env=unlocked).stdout


def test_diversion_beside_a_users_pool_leaves_retired_pools_alone() -> None:
    # Up to torch 2.12 emptying a single pool asserts while any pool is recorded to.
    egm_alloc.enable(threshold_gib=1)
    live = block(GIB)
    torch.cuda.empty_cache()  # retires the pool; the segment stays with its tensor
    del live
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        beside = Background(lambda: block(2 * GIB)).finish()
    assert isinstance(beside, torch.Tensor)
    assert tier(beside) == "extended"
    assert managed_segments() == 2
    after = block(4 * GIB)
    assert managed_segments() == 2  # the retired one's is given back by this miss
    assert tier(after) == "extended"
    del beside, pool


# An observer that was attached before egm_alloc was imported hears of every try.
POOL_DESTROYED_BY_OBSERVER = """
import torch
pools, faults = [], []
torch._C._cuda_attach_out_of_memory_observer(
    lambda *a: (pools.clear(), [fault.disarm() for fault in faults])
)
import egm_alloc
from tests.simulator import sim
egm_alloc.enable(threshold_gib=1)
pools.append(torch.cuda.MemPool())
with torch.cuda.use_mem_pool(pools[0]):
    inside = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
del inside
held = egm_alloc.stats(0).device_tier.reserved_bytes
assert held >= 64 << 20
with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1) as fault:
    faults.append(fault)
    tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
assert not pools
assert egm_alloc.info(tensor).tier == "extended"
assert egm_alloc.stats(0).device_tier.reserved_bytes <= held - (64 << 20)
print("survived")
"""


def test_pool_may_be_destroyed_by_an_out_of_memory_observer() -> None:
    # ~MemPool in the midst of this thread's own diversion; see POOL_DESTROYED.
    assert "survived" in run_script(POOL_DESTROYED_BY_OBSERVER).stdout


def finishes_beside_a_diversion(work: Callable[[], object]) -> tuple[bool, object]:
    """Return whether `work` was done before a diversion underway was over, and its result."""
    egm_alloc.enable(threshold_gib=1)
    torch.cuda.empty_cache()  # the diversion is to miss
    with diversion_underway(sim) as diverting:
        working = Background(work)
        working.join(0.5)
        early = not working.is_alive()
    diverting.finish()
    return early, working.finish()


def test_checkpoints_of_a_graph_pool_wait_for_a_diversion() -> None:
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros(16, device="cuda")
    with torch.cuda.graph(graph):
        static.add_(1)
        inside = block(MIB)
    pool_id = graph.pool()
    early, state = finishes_beside_a_diversion(
        lambda: torch._C._cuda_getCheckpointState(0, pool_id)
    )
    assert not early
    early, _ = finishes_beside_a_diversion(
        lambda: torch._C._cuda_setCheckpointPoolState(0, state, [], [])  # type: ignore[arg-type]
    )
    assert not early
    del inside, graph


def test_recordings_of_a_users_pool_begin_and_end_apart_from_a_diversion() -> None:
    pool = torch.cuda.MemPool()

    def begin() -> None:
        torch._C._cuda_beginAllocateCurrentThreadToPool(0, pool.id)

    def end() -> None:
        torch._C._cuda_endAllocateToPool(0, pool.id)

    early, _ = finishes_beside_a_diversion(begin)
    assert not early
    end()
    begin()  # in this thread: an id of one that has ended may be the next diverting one's
    early, _ = finishes_beside_a_diversion(end)
    assert not early
    for _use in range(2):
        torch._C._cuda_releasePool(0, pool.id)


# What a diversion does afterwards must not run into a recording that another thread has begun.
RECORDINGS_BESIDE_DIVERSIONS = """
import threading, torch, egm_alloc
egm_alloc.enable(threshold_gib=0.25)
done = threading.Event()

def record() -> None:
    pool = torch.cuda.MemPool()
    while not done.is_set():
        with torch.cuda.use_mem_pool(pool):
            torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

thread = threading.Thread(target=record)
thread.start()
try:
    for step in range(400):
        live = torch.empty((256 + step % 4) << 20, dtype=torch.uint8, device="cuda")
        if step % 5 == 0:
            torch.cuda.empty_cache()
        del live
finally:
    done.set()
    thread.join()
print("survived")
"""


def test_pools_begun_and_ended_in_a_thread_do_not_fail_diversions_in_another() -> None:
    assert "survived" in run_script(RECORDINGS_BESIDE_DIVERSIONS).stdout


GIL_HELD_BESIDE_A_DIVERSION = """
import threading, torch
called = []
torch._C._cuda_attach_out_of_memory_observer(lambda *a: called.append(a))
import egm_alloc
from tests.simulator import sim
egm_alloc.enable(threshold_gib=1)
torch.cuda.memory._record_memory_history(context="all", stacks="python")
pool = torch.cuda.MemPool()
failed = []

def divert():
    try:
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        failed.append(error)

# The diversion fails after a second and calls the observer, which needs the GIL, while this
# thread waits for the diversion in ~MemPool, which torch enters with the GIL held.
with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation", times=-1):
    with sim.stall_call("cudaMallocManaged", seconds=1.0) as delay:
        thread = threading.Thread(target=divert)
        thread.start()
        delay.wait_until_reached()
        del pool
        thread.join(30)
        assert not thread.is_alive()
assert failed and called
print("survived")
"""


def test_diversion_with_history_and_observer_while_another_thread_holds_the_gil() -> None:
    assert "survived" in run_script(GIL_HELD_BESIDE_A_DIVERSION, timeout=60).stdout


def test_pair_pool_takes_every_size_and_is_managed() -> None:
    pool = egm_alloc.mem_pool()
    with torch.cuda.use_mem_pool(pool):
        tensor = block(MIB)
    found = egm_alloc.info(tensor)
    assert (found.tier, found.backing, found.owner) == ("extended", "managed", "pair")
    del tensor, pool


OUT_OF_MEMORY_IN_A_CAPTURE = """
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
static = torch.zeros(16, device="cuda")
first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
with torch.cuda.graph(first):
    static.add_(1)
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
del first  # what its pool has cached cannot be freed while another capture is underway
torch.cuda.synchronize()
refused = 0
with torch.cuda.stream(torch.cuda.Stream()):
    second.capture_begin()
    static.add_(1)
    try:
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        refused += 1
    static.add_(1)
    second.capture_end()
second.replay()
torch.cuda.synchronize()
assert refused == 1
"""


def test_out_of_memory_in_a_capture_does_not_break_the_capture() -> None:
    run_script(OUT_OF_MEMORY_IN_A_CAPTURE)
