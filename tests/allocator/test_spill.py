"""What HBM cannot hold is served from host memory. It is small here: spilled memory is real."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import egm_alloc
from tests.allocator.conftest import MIB, Background, block
from tests.simulator import run_script, sim

pytestmark = [
    pytest.mark.simulated,
    # Once per process; a test of its own looks at it.
    pytest.mark.filterwarnings("ignore:egm_alloc. the HBM of device:UserWarning"),
]

HBM = 64 * MIB
FITS = 40 * MIB
SPILLS = 32 * MIB  # beside FITS
MANY = 2100  # requests; freed spilled memory is given back after 1024 without a spill


def backing(tensor: torch.Tensor) -> str | None:
    return egm_alloc.info(tensor).backing


@pytest.fixture(autouse=True)
def small_hbm() -> None:
    for device in range(torch.cuda.device_count()):
        sim.set_hbm_gib((sim.hbm(device)["taken"] + HBM) / (1 << 30), device)
    egm_alloc.enable(threshold_gib=1, backing="managed", spill=True)


def spills(kind: str = "pinned") -> int:
    return egm_alloc.stats().extended[kind].spills


def test_request_that_hbm_cannot_hold_is_served_from_pinned_memory() -> None:
    before = spills()
    fits, spilled = block(FITS), block(SPILLS)
    assert (backing(fits), backing(spilled)) == (None, "pinned")
    assert egm_alloc.info(spilled).spilled
    assert egm_alloc.info(spilled).tier == "extended"
    assert spills() == before + 1
    expected = torch.arange(SPILLS // 4, dtype=torch.int32)
    view = spilled.view(torch.int32)
    view.copy_(expected)
    assert torch.equal(view.cpu(), expected)


@pytest.mark.parametrize(
    ("configured", "spilled_to"),
    [("numa", "numa"), ("pinned", "pinned"), ("split", "pinned"), ("device", "pinned")],
)
def test_spill_goes_to_the_configured_kind_of_host_memory(configured: str, spilled_to: str) -> None:
    egm_alloc.enable(backing=configured)
    kept = block(FITS)
    assert backing(block(SPILLS)) == spilled_to
    assert backing(kept) is None


def test_cached_hbm_is_given_back_before_anything_is_spilled() -> None:
    before = spills()
    cached = block(FITS)
    del cached
    assert backing(block(FITS + 8 * MIB)) is None
    with egm_alloc.place("device"):
        ours = block(FITS)
    del ours
    assert backing(block(FITS + 8 * MIB)) is None
    assert spills() == before


@pytest.mark.parametrize("kind", ["split", "numa"])
@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("retired", [True, False])
def test_hbm_of_cached_mapped_memory_is_given_back_before_anything_is_spilled(
    kind: str, spill: bool, retired: bool
) -> None:
    egm_alloc.enable(spill=spill)
    before = spills()
    with egm_alloc.place(kind):
        mapped = block(FITS)
    egm_alloc.migrate(mapped, device_fraction=0.75)
    if retired:
        torch.cuda.empty_cache()
    del mapped
    assert backing(block(FITS + 8 * MIB)) is None
    assert spills() == before
    assert egm_alloc.stats().extended[kind].segments == 0


def test_cached_host_memory_stays_cached_when_hbm_is_full() -> None:
    with egm_alloc.place("numa"):
        address = block(FITS).data_ptr()
    kept = block(FITS)
    assert backing(block(SPILLS)) == "pinned"
    with egm_alloc.place("numa"):
        assert block(FITS).data_ptr() == address
    assert kept.numel() == FITS


def test_spill_is_no_out_of_memory_to_statistics_and_observers() -> None:
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    kept = block(FITS)
    before = torch.cuda.memory_stats()["num_ooms"]
    spilled = [block(SPILLS), block(SPILLS)]
    assert {backing(tensor) for tensor in spilled} == {"pinned"}
    assert torch.cuda.memory_stats()["num_ooms"] == before
    assert announced == []
    egm_alloc.enable(spill=False)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block(SPILLS)
    assert torch.cuda.memory_stats()["num_ooms"] == before + 1
    assert len(announced) == 1
    assert kept.numel() == FITS


@pytest.mark.parametrize("record_stream", [False, True])
def test_small_request_in_full_hbm_is_no_out_of_memory_either(record_stream: bool) -> None:
    # Once a stream was recorded, each diversion first asks torch for some bytes of HBM.
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    if record_stream:
        block(MIB).record_stream(torch.cuda.Stream())
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    kept = block(free)
    before, counted = torch.cuda.memory_stats()["num_ooms"], spills()
    spilled = [block(MIB // 2), block(SPILLS), block(512)]
    assert {backing(tensor) for tensor in spilled} == {"pinned"}
    assert spills() == counted + 3
    assert torch.cuda.memory_stats()["num_ooms"] == before
    assert announced == []
    assert kept.numel() == free


def test_spill_that_fails_is_torchs_own_error_counted_and_announced_once() -> None:
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    kept = block(FITS)
    before, counted = torch.cuda.memory_stats()["num_ooms"], spills()
    with sim.fail_call("cudaHostRegister", times=-1):
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 32.00 MiB") as e:
            block(SPILLS)
    assert "cudaHostRegister" in str(e.value)
    assert torch.cuda.memory_stats()["num_ooms"] == before + 1
    assert len(announced) == 1
    assert spills() == counted
    assert egm_alloc.stats().extended["pinned"].reserved_bytes == 0
    assert backing(block(SPILLS)) == "pinned"
    assert kept.numel() == FITS


def test_limit_binds_spilled_memory() -> None:
    egm_alloc.enable(limit_gib=48 / 1024)
    try:
        kept, spilled = block(FITS), block(SPILLS)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="limit"):
            block(SPILLS)
        assert (backing(kept), backing(spilled)) == (None, "pinned")
    finally:
        egm_alloc.enable(limit_gib=None)


def test_spill_is_warned_of_once_with_what_to_do() -> None:
    script = f"""
import warnings
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
def block(mib):
    return torch.empty(mib << 20, dtype=torch.uint8, device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kept = block({FITS // MIB})
    assert not caught
    spilled = [block({SPILLS // MIB}) for _ in range(3)]
(warning,) = caught
assert egm_alloc.stats().extended["pinned"].spills == 3
print(str(warning.message))
"""
    message = run_script(script, hbm_gib=HBM / (1 << 30)).stdout
    for part in ("device 0", str(SPILLS), "'pinned'", "place()", "spill=False", "spills"):
        assert part in message


def test_freed_spilled_memory_goes_back_to_the_host_and_requests_to_hbm() -> None:
    before = sim.live_allocations(0).get("registered")
    kept, spilled = block(FITS), block(SPILLS)
    del kept
    live = block(SPILLS)
    assert (backing(spilled), backing(live)) == ("pinned", None)
    for _ in range(MANY):
        block(MIB)
    assert egm_alloc.stats().extended["pinned"].segments == 1  # it is still in use
    del spilled
    for _ in range(MANY):
        assert backing(block(MIB)) is None
    assert egm_alloc.stats().extended["pinned"].segments == 0
    assert sim.live_allocations(0).get("registered") == before
    del live
    assert backing(block(FITS)) is None


def test_freed_spilled_memory_serves_the_next_spill() -> None:
    kept = block(FITS)
    address = block(SPILLS).data_ptr()
    segments = egm_alloc.stats().extended["pinned"].segment_allocs
    again = block(SPILLS)
    assert again.data_ptr() == address
    assert egm_alloc.stats().extended["pinned"].segment_allocs == segments
    assert backing(kept) is None


def test_placed_pinned_memory_is_not_given_back_as_spilled() -> None:
    kept, spilled = block(FITS), block(SPILLS)
    assert (backing(kept), backing(spilled)) == (None, "pinned")
    with egm_alloc.place("pinned"):
        address = block(SPILLS).data_ptr()
    assert spilled.data_ptr() != address
    del spilled
    for _ in range(MANY):
        block(MIB)
    assert egm_alloc.stats().extended["pinned"].segments == 1  # and not the spilled one
    with egm_alloc.place("pinned"):
        assert block(SPILLS).data_ptr() == address
    assert kept.numel() == FITS


@pytest.mark.parametrize("diverted_before", [False, True])
def test_switched_off_it_is_torchs_own_error(diverted_before: bool) -> None:
    before = spills()
    if diverted_before:
        with egm_alloc.place("managed"):
            block(MIB)
    egm_alloc.enable(spill=False)
    kept = block(FITS)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 32\.00 MiB"):
        block(SPILLS)
    assert spills() == before
    assert kept.numel() == FITS


def test_nothing_is_spilled_once_egm_alloc_is_off() -> None:
    before = spills()
    kept, spilled = block(FITS), block(SPILLS)
    egm_alloc.disable()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        block(SPILLS)
    assert spills() == before + 1
    assert (backing(kept), backing(spilled)) == (None, "pinned")


def test_device_that_is_not_acted_on_spills_nothing() -> None:
    egm_alloc.enable(device=1)
    try:
        kept = block(FITS)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(SPILLS)
        beside = block(FITS, 1)
        assert backing(block(SPILLS, 1)) == "pinned"
        assert kept.numel() == beside.numel()
    finally:
        egm_alloc.enable(device="all")


def test_hbm_asked_for_by_name_is_not_spilled() -> None:
    before = spills()
    kept = block(FITS)
    with egm_alloc.place("device"):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            block(SPILLS)
    assert spills() == before
    assert backing(block(SPILLS)) == "pinned"
    assert kept.numel() == FITS


def test_request_below_a_blocks_min_bytes_is_spilled_as_outside() -> None:
    kept = block(FITS)
    with egm_alloc.place("device", min_bytes=2 * SPILLS):
        assert backing(block(SPILLS)) == "pinned"
    assert kept.numel() == FITS


def test_users_pool_is_out_of_memory_as_without_egm_alloc() -> None:
    before = spills()
    kept = block(FITS)
    failures = torch.cuda.memory_stats()["num_ooms"]
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 32\.00 MiB"):
            block(SPILLS)
        assert torch.cuda.memory_stats()["num_ooms"] == failures + 1
        beside = Background(lambda: block(SPILLS)).finish()
    assert isinstance(beside, torch.Tensor)
    assert backing(beside) == "pinned"
    assert spills() == before + 1
    assert kept.numel() == FITS
    del beside, pool


@pytest.mark.parametrize("elsewhere", ["device", "thread"])
def test_spill_beside_a_users_pool_elsewhere_is_no_out_of_memory_either(elsewhere: str) -> None:
    announced: list[tuple[int, ...]] = []
    torch._C._cuda_attach_out_of_memory_observer(  # type: ignore[attr-defined]
        lambda *figures: announced.append(figures)
    )
    kept = block(FITS)
    before = torch.cuda.memory_stats()["num_ooms"]
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool, device=1 if elsewhere == "device" else 0):
        if elsewhere == "device":
            spilled: object = block(SPILLS)
        else:
            spilled = Background(lambda: block(SPILLS)).finish()
    assert isinstance(spilled, torch.Tensor)
    assert backing(spilled) == "pinned"
    assert (announced, torch.cuda.memory_stats()["num_ooms"]) == ([], before)
    assert kept.numel() == FITS
    del pool


# PyTorch 2.11 goes on believing in a capture that has failed, hence a process of its own.
IN_A_CAPTURE = f"""
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
static = torch.zeros(16, device="cuda")
kept = torch.empty({FITS - 4 * MIB}, dtype=torch.uint8, device="cuda")
graph = torch.cuda.CUDAGraph()
caught = None
with torch.cuda.graph(graph):
    static.zero_()
    try:
        torch.empty({SPILLS}, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        caught = str(error)
assert caught and "Tried to allocate 32.00 MiB" in caught, caught
assert egm_alloc.stats().extended["pinned"].spills == 0
print("done")
"""


def test_capture_is_out_of_memory_as_without_egm_alloc() -> None:
    assert "done" in run_script(IN_A_CAPTURE, hbm_gib=HBM / (1 << 30)).stdout


def test_threads_spill_and_free_at_the_same_time() -> None:
    def churn() -> None:
        for _ in range(30):
            held = [block(12 * MIB) for _ in range(3)]
            block(MIB)
            del held

    threads = [Background(churn) for _ in range(4)]
    for thread in threads:
        thread.finish()
    torch.cuda.synchronize()
    with contextlib.suppress(torch.cuda.OutOfMemoryError), warnings.catch_warnings():
        for _ in range(MANY):
            block(MIB)
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended["pinned"].segments == 0


WARNING_AS_ERROR = f"""
import warnings
import torch, egm_alloc
egm_alloc.enable(threshold_gib=1)
kept = torch.empty({FITS}, dtype=torch.uint8, device="cuda")
before = torch.cuda.memory_allocated()

def tensor():
    return torch.empty({SPILLS}, dtype=torch.uint8, device="cuda")

def address():
    return torch.cuda.caching_allocator_alloc({SPILLS})

warnings.simplefilter("error")
try:
    NAME()
except UserWarning as warning:
    assert "could not hold" in str(warning)
else:
    raise AssertionError("no warning")
assert torch.cuda.memory_allocated() == before, torch.cuda.memory_allocated()
found = egm_alloc.stats().extended["pinned"]
assert (found.spills, found.allocations, found.frees) == (1, 1, 1), found
assert (found.segments, found.allocated_bytes) == (1, 0), found
held = NAME()
assert egm_alloc.info(tensor()).spilled
found = egm_alloc.stats().extended["pinned"]
assert (found.spills, found.segment_allocs) == (3, 2), found
print("done")
"""


@pytest.mark.parametrize("request_by", ["tensor", "address"])
def test_spill_that_is_given_up_for_its_warning_loses_nothing(request_by: str) -> None:
    script = WARNING_AS_ERROR.replace("NAME", request_by)
    assert "done" in run_script(script, hbm_gib=HBM / (1 << 30)).stdout
