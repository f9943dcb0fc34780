"""Who waits for whom: what is slow for one request holds up nobody else's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import egm_alloc
from egm_alloc import _C
from tests.allocator.conftest import MIB, Background, block
from tests.simulator import run_script, sim
from tests.simulator.host import write_host

pytestmark = pytest.mark.simulated

KINDS = ("managed", "pinned", "numa", "split")


def make(kind: str, mib: int) -> torch.Tensor:
    with egm_alloc.place(kind):
        return block(mib * MIB)


@pytest.fixture
def small_host(tmp_path: Path) -> None:
    """A host with 100 MiB free, whatever is taken: its files do not change."""
    sim.set_host_root(write_host(tmp_path / "host", 1, 100 / 1024))
    egm_alloc.enable(threshold_gib=64, preferred_location="host", host_reserve_gib=0, spill=False)
    block(512)


@pytest.mark.usefixtures("small_host")
def test_wait_for_host_memory_holds_up_no_other_thread() -> None:
    with sim.stall_call("cudaHostRegister") as stall:
        under_way = Background(lambda: make("pinned", 60))
        stall.wait_until_reached()
        waiting = Background(lambda: make("managed", 60))
        waiting.join(0.2)
        for _ in range(20):
            block(512)
        assert under_way.is_alive()
        assert waiting.is_alive()
    for thread in (under_way, waiting):
        tensor = thread.finish()
        assert isinstance(tensor, torch.Tensor)
        assert tensor.numel() == 60 * MIB
        thread.result = None


def make_in_pool(mib: int) -> torch.Tensor:
    with torch.cuda.use_mem_pool(egm_alloc.mem_pool()):
        return block(mib * MIB)


@pytest.mark.usefixtures("small_host")
def test_pool_of_the_pair_waits_for_no_host_memory() -> None:
    # torch asks it for a segment with its lock held.
    with sim.stall_call("cudaHostRegister") as stall:
        under_way = Background(lambda: make("pinned", 60))
        stall.wait_until_reached()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            Background(lambda: make_in_pool(60)).finish(30)
        assert under_way.is_alive()
    under_way.finish()
    under_way.result = None


@pytest.mark.usefixtures("small_host")
def test_pair_as_torchs_whole_allocator_waits_for_host_memory() -> None:
    library = ctypes.CDLL(_C.__file__)
    malloc = library.egm_alloc_pluggable_malloc
    malloc.restype = ctypes.c_void_p
    with sim.stall_call("cudaHostRegister") as stall:
        under_way = Background(lambda: make("pinned", 60))
        stall.wait_until_reached()
        waiting = Background(lambda: malloc(ctypes.c_size_t(60 * MIB), 0, None))
        waiting.join(0.2)
        assert waiting.is_alive()
    under_way.finish()
    under_way.result = None
    pointer = waiting.finish()
    assert isinstance(pointer, int)
    library.managed_free(ctypes.c_void_p(pointer), ctypes.c_size_t(60 * MIB), 0, None)


@pytest.mark.usefixtures("small_host")
@pytest.mark.parametrize("kind", KINDS)
def test_what_never_fits_waits_for_nobody(kind: str) -> None:
    with sim.stall_call("cudaHostRegister") as stall:
        under_way = Background(lambda: make("pinned", 60))
        stall.wait_until_reached()
        with pytest.raises(torch.cuda.OutOfMemoryError, match="would cut into the reserve"):
            make(kind, 300)
        assert under_way.is_alive()
    under_way.finish()
    under_way.result = None


@pytest.mark.usefixtures("small_host")
@pytest.mark.parametrize("kind", KINDS)
def test_request_that_the_reserve_refuses_counts_once(kind: str) -> None:
    before = egm_alloc.stats().extended[kind]
    failures = torch.cuda.memory_stats()["num_ooms"]
    with pytest.raises(torch.cuda.OutOfMemoryError, match="would cut into the reserve") as caught:
        make(kind, 300)
    message = str(caught.value)
    assert message.startswith("CUDA out of memory. ")
    assert "device tier" in message
    assert "extended tier" in message
    assert torch.cuda.memory_stats()["num_ooms"] == failures
    after = egm_alloc.stats().extended[kind]
    assert after.reserve_refusals == before.reserve_refusals + 1
    assert after.limit_refusals == before.limit_refusals


@pytest.mark.usefixtures("small_host")
def test_managed_memory_cached_on_another_device_makes_room() -> None:
    for device in (1, 0, 1):
        with egm_alloc.place("managed"):
            assert egm_alloc.info(block(60 * MIB, device)).backing == "managed"


@pytest.mark.usefixtures("small_host")
@pytest.mark.parametrize("moved", [False, True])
def test_hbm_given_back_for_a_request_leaves_managed_memory_no_promise(moved: bool) -> None:
    egm_alloc.enable(preferred_location="device")
    with egm_alloc.place("split" if moved else "device", device_fraction=1 if moved else None):
        in_hbm = block(60 * MIB)
    plain = block(6 << 30)
    managed = make("managed", 2048)
    assert _C.host_bookings()["promised_bytes"] >= 60 * MIB
    del plain  # cached
    if moved:
        egm_alloc.migrate(in_hbm, device_fraction=0)
    else:
        assert make("pinned", 60).numel() == 60 * MIB
    assert _C.host_bookings()["promised_bytes"] == 0
    del managed


# In a process of its own, for torch's own requests may break another thread's capture as well.
REFUSED_BESIDE_A_CAPTURE = """
import pytest, sys, torch
import egm_alloc
from tests.allocator.conftest import MIB, Background, block
egm_alloc.enable(threshold_gib=64, preferred_location="host", host_reserve_gib=0, spill=False)
value = torch.zeros(16, device="cuda:0")
held = [block(30 * MIB, device=1)]

def ask():
    held.clear()  # cached: a capture begins with an empty cache
    with egm_alloc.place(sys.argv[1]):
        block(300 * MIB, device=1)

with torch.cuda.graph(torch.cuda.CUDAGraph()):
    value += 1
    with pytest.raises(torch.cuda.OutOfMemoryError, match="would cut into the reserve"):
        Background(ask).finish()
    value += 1
"""


# Not managed memory: torch 2.15 frees its own cache before it gives up, in the capture's way.
@pytest.mark.parametrize("kind", ["pinned", "numa", "split"])
def test_request_that_the_reserve_refuses_leaves_another_threads_capture_alone(
    tmp_path: Path, kind: str
) -> None:
    root = write_host(tmp_path / "host", 1, 100 / 1024)
    env = {"EGM_SIM_HOST_ROOT": str(root)}
    run_script(REFUSED_BESIDE_A_CAPTURE, kind, devices=2, env=env)


def test_move_of_a_tensor_holds_up_no_release_of_another() -> None:
    egm_alloc.enable(threshold_gib=64, spill=False)
    block(512)
    moved = make("split", 64)
    make("numa", 40)  # cached
    with sim.stall_call("cudaMemcpy") as stall:
        moving = Background(lambda: egm_alloc.migrate(moved, device_fraction=1))
        stall.wait_until_reached()
        torch.cuda.empty_cache()
        assert egm_alloc.stats().extended["numa"].segments == 0
        assert moving.is_alive()
    moving.finish()
    assert egm_alloc.info(moved).on_device_bytes == 64 * MIB


# Blocks of 100 and 64 MiB are cached, and torch splits none of 64 MiB and more.
BRING_UP_BESIDE_LARGE_BLOCKS = """
import egm_alloc
from egm_alloc import _C
from tests.allocator.conftest import Background, block
from tests.allocator.test_waiting import make
from tests.simulator import sim
egm_alloc.enable(threshold_gib=64, spill=False)
block(512)
cached = [make("pinned", 100), make("pinned", 64)]
cached.clear()
with sim.stall_call("cudaHostRegister") as stall:
    coming_up = Background(lambda: make("pinned", 40))
    stall.wait_until_reached()
    block(512)
    assert coming_up.is_alive()
coming_up.finish()
coming_up.result = None
with sim.call_log() as log:
    make("pinned", 40), make("pinned", 64), make("pinned", 98)
assert not log.of("cudaHostRegister")
print("done")
"""


def test_bring_up_beside_cached_blocks_that_torch_will_not_split() -> None:
    split = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert "done" in run_script(BRING_UP_BESIDE_LARGE_BLOCKS, env=split).stdout


SEGMENT_BESIDE_A_CACHED_BLOCK = """
import egm_alloc
from tests.allocator.conftest import Background, block
from tests.simulator import sim
egm_alloc.enable(threshold_gib=64, spill=False)
block(512)
with sim.stall_call("cudaMalloc") as stall:
    new = Background(lambda: block(64 << 20))
    stall.wait_until_reached()
    cached = Background(lambda: block(512))
    cached.finish()
    assert new.is_alive()
new.finish()
print("done")
"""


def test_cached_request_beside_a_segment_for_which_torch_lets_go_of_its_lock() -> None:
    unlocked = {"PYTORCH_CUDA_ALLOC_CONF": "release_lock_on_cudamalloc:True"}
    assert "done" in run_script(SEGMENT_BESIDE_A_CACHED_BLOCK, env=unlocked).stdout
