"""The C pair: each step in order, null safety, synchronisation, configuration and counters."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

import egm_alloc
from egm_alloc import _C
from tests.allocator.conftest import GIB, MIB
from tests.allocator.test_prefetch_and_advice import ACCESSED_BY, PREFERRED, steps
from tests.simulator import run_script, sim

pytestmark = pytest.mark.simulated


@pytest.fixture
def pair() -> ctypes.CDLL:
    library = ctypes.CDLL(_C.__file__)
    library.managed_malloc.restype = ctypes.c_void_p
    library.managed_malloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    library.managed_free.restype = None
    library.managed_free.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    torch.cuda.init()
    egm_alloc.enable()
    egm_alloc.disable()
    return library


def test_malloc_takes_every_step_in_order(pair: ctypes.CDLL) -> None:
    with sim.call_log() as log:
        pointer = pair.managed_malloc(64 * MIB, 1, None)
    assert pointer
    names = [call.name for call in log]
    assert names.index("cudaSetDevice") < names.index("cudaMallocManaged")
    assert steps(log) == [
        ("cudaMallocManaged", 64 * MIB, 1),
        ("cudaMemAdvise", PREFERRED, "device:1"),
        ("cudaMemAdvise", ACCESSED_BY, "host"),
        ("cudaMemPrefetchAsync", 64 * MIB, "device:1"),
    ]
    assert torch.cuda.current_device() == 0
    pair.managed_free(pointer, 64 * MIB, 1, None)


@pytest.mark.parametrize(("configured_gib", "threshold"), [(None, 2 * GIB), (1 / 16, 64 * MIB)])
def test_malloc_prefetches_strictly_below_the_threshold(
    pair: ctypes.CDLL, configured_gib: float | None, threshold: int
) -> None:
    if configured_gib is not None:
        egm_alloc.enable(threshold_gib=configured_gib)
    for size, prefetched in ((threshold - 1, True), (threshold, False)):
        with sim.call_log() as log:
            pointer = pair.managed_malloc(size, 0, None)
        assert ("cudaMemPrefetchAsync" in [step[0] for step in steps(log)]) is prefetched
        pair.managed_free(pointer, size, 0, None)


@pytest.mark.parametrize(
    ("call", "counter"),
    [("cudaMemAdvise", "advice_failures"), ("cudaMemPrefetchAsync", "prefetch_failures")],
)
def test_hints_of_the_pair_that_fail_count(
    pair: ctypes.CDLL, call: str, counter: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = getattr(egm_alloc.stats(0).extended["managed"], counter)
    with sim.fail_call(call, error="cudaErrorInvalidDevice", times=1):
        pointer = pair.managed_malloc(64 * MIB, 0, None)
    assert getattr(egm_alloc.stats(0).extended["managed"], counter) == before + 1
    pair.managed_free(pointer, 64 * MIB, 0, None)


def test_malloc_follows_the_configuration(pair: ctypes.CDLL) -> None:
    egm_alloc.enable(
        threshold_gib=1, preferred_location="host", accessed_by=("device",), prefetch=False
    )
    egm_alloc.disable()
    with sim.call_log() as log:
        pointer = pair.managed_malloc(64 * MIB, 0, None)
    assert [step[1:] for step in steps(log)[1:]] == [(PREFERRED, "host"), (ACCESSED_BY, "device:0")]
    pair.managed_free(pointer, 64 * MIB, 0, None)


def test_pair_counts_in_the_stats(pair: ctypes.CDLL) -> None:
    before = egm_alloc.stats(0).extended["managed"]
    pointer = pair.managed_malloc(64 * MIB, 0, None)
    during = egm_alloc.stats(0).extended["managed"]
    assert during.allocated_bytes == 64 * MIB
    assert during.reserved_bytes == 64 * MIB
    assert during.allocations - before.allocations == 1
    assert during.prefetches - before.prefetches == 1
    pair.managed_free(pointer, 64 * MIB, 0, None)
    after = egm_alloc.stats(0).extended["managed"]
    assert (after.allocated_bytes, after.segments) == (0, 0)
    assert after.frees - before.frees == 1


def test_free_is_null_safe_and_ignores_strangers(
    pair: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    with sim.call_log() as log:
        pair.managed_free(None, 0, 0, None)
    assert not [call for call in log if call.name in ("cudaFree", "cudaStreamSynchronize")]
    assert capfd.readouterr().err == ""
    pair.managed_free(0x1234, 0, 0, None)
    assert "not a pointer from managed_malloc" in capfd.readouterr().err


def test_free_synchronises_a_stream_that_is_not_null(pair: ctypes.CDLL) -> None:
    stream = torch.cuda.Stream()
    for handle, waits in ((stream.cuda_stream, True), (None, False)):
        pointer = pair.managed_malloc(MIB, 0, handle)
        with sim.call_log() as log:
            pair.managed_free(pointer, MIB, 0, handle)
        names = [call.name for call in log]
        assert ("cudaStreamSynchronize" in names) is waits
        assert "cudaFree" in names
        if waits:
            assert names.index("cudaStreamSynchronize") < names.index("cudaFree")


def test_size_zero_is_null_without_a_call(
    pair: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    with sim.call_log() as log:
        assert pair.managed_malloc(0, 0, None) is None
    assert steps(log) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("device", [-1, 2, 1000])
def test_bad_device_is_null_with_a_line(
    pair: ctypes.CDLL, capfd: pytest.CaptureFixture[str], device: int
) -> None:
    assert pair.managed_malloc(MIB, device, None) is None
    assert "[managed_alloc] cudaSetDevice" in capfd.readouterr().err
    assert torch.cuda.current_device() == 0
    assert egm_alloc.stats(0).extended["managed"].reserved_bytes == 0


def test_failed_malloc_is_null_with_a_line_and_no_leak(
    pair: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation"):
        assert pair.managed_malloc(MIB, 0, None) is None
    line = capfd.readouterr().err
    assert "[managed_alloc] cudaMallocManaged failed" in line
    assert str(MIB) in line
    assert egm_alloc.stats(0).extended["managed"].reserved_bytes == 0
    pointer = pair.managed_malloc(MIB, 0, None)
    assert pointer
    pair.managed_free(pointer, MIB, 0, None)


@pytest.mark.parametrize("call", ["cudaMemAdvise", "cudaMemPrefetchAsync"])
def test_failed_hint_is_a_line_and_the_memory_is_returned(
    pair: ctypes.CDLL, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    with sim.fail_call(call, error="cudaErrorInvalidDevice", times=10):
        pointer = pair.managed_malloc(MIB, 0, None)
    assert pointer
    assert f"[managed_alloc] {call}" in capfd.readouterr().err
    pair.managed_free(pointer, MIB, 0, None)


def test_pair_as_torchs_whole_allocator() -> None:
    run_script(
        """
import torch, egm_alloc
torch.cuda.memory.change_current_allocator(egm_alloc.pluggable_allocator())
tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
assert egm_alloc.info(tensor).owner == "pair"
assert not egm_alloc.is_enabled()
del tensor
stats = egm_alloc.stats(0).extended["managed"]
assert (stats.allocations, stats.frees) == (1, 1), stats
""",
        env={"EGM_ALLOC_AUTO_ENABLE": "0"},
    )


def test_public_header_is_plain_c(tmp_path: Path) -> None:
    header = Path(egm_alloc.get_include()) / "egm_alloc.h"
    if not header.exists():
        header = Path(__file__).parents[2] / "csrc" / "c_api" / "egm_alloc.h"
    (tmp_path / "cuda_runtime_api.h").write_text("typedef struct CUstream_st* cudaStream_t;\n")
    source = tmp_path / "use.c"
    source.write_text(
        '#include "egm_alloc.h"\n'
        "void* use(cudaStream_t s) { managed_free(0, 0, 0, s); return managed_malloc(1, 0, s); }\n"
    )
    subprocess.run(
        [
            "gcc",
            "-std=c99",
            "-Wall",
            "-Werror",
            "-fsyntax-only",
            f"-I{tmp_path}",
            f"-I{header.parent}",
            str(source),
        ],
        check=True,
    )


def test_pair_follows_the_environment_without_enable() -> None:
    run_script(
        """
import torch, egm_alloc
from tests.simulator import sim
pool = egm_alloc.mem_pool()
with sim.call_log() as log:
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
assert [call.args["advice"] for call in log.of("cudaMemAdvise")] == ["set-preferred-location"]
assert not log.of("cudaMemPrefetchAsync")
del tensor
""",
        env={
            "EGM_ALLOC_AUTO_ENABLE": "0",
            "EGM_ALLOC_PREFETCH": "0",
            "EGM_ALLOC_ACCESSED_BY": "none",
        },
    )


def last_cuda_error() -> int:
    return int(ctypes.CDLL(None).cudaPeekAtLastError())


def test_failed_pair_leaves_no_cuda_error_behind(pair: ctypes.CDLL) -> None:
    # torch checks the last error before its next allocation and after its next kernel.
    assert last_cuda_error() == 0
    with sim.fail_call("cudaMallocManaged", error="cudaErrorMemoryAllocation"):
        assert pair.managed_malloc(MIB, 0, None) is None
    assert last_cuda_error() == 0
    assert pair.managed_malloc(MIB, 2, None) is None
    assert last_cuda_error() == 0


def test_limit_is_the_pairs_too(pair: ctypes.CDLL) -> None:
    egm_alloc.enable(limit_gib=0.25)
    before = egm_alloc.stats().extended["managed"].limit_refusals
    assert pair.managed_malloc(512 * MIB, 0, None) is None
    assert egm_alloc.stats().extended["managed"].limit_refusals == before + 1
    pointer = pair.managed_malloc(64 * MIB, 0, None)
    assert pointer
    pair.managed_free(pointer, 64 * MIB, 0, None)
    egm_alloc.enable(limit_gib=None)
