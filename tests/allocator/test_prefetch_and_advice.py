"""What the driver is asked for each managed segment: advice and prefetch, by configuration."""

from __future__ import annotations

import pytest

import egm_alloc
from tests.allocator.conftest import GIB, MIB, block
from tests.simulator import CallLog, sim

pytestmark = pytest.mark.simulated

PREFERRED, ACCESSED_BY = "set-preferred-location", "set-accessed-by"


def steps(log: CallLog) -> list[tuple[object, ...]]:
    """Return the steps for managed memory, each with what distinguishes it."""
    result: list[tuple[object, ...]] = []
    for call in log:
        if call.name == "cudaMallocManaged":
            result.append((call.name, call.args["size"], call.args["flags"]))
        elif call.name == "cudaMemAdvise":
            result.append((call.name, call.args["advice"], call.args["location"]))
        elif call.name == "cudaMemPrefetchAsync":
            result.append((call.name, call.args["size"], call.args["location"]))
    return result


def test_defaults_in_managed_mode_follow_the_pair_in_order() -> None:
    egm_alloc.enable(mode="managed")
    with sim.call_log() as log:
        block(64 * MIB)
    assert steps(log) == [
        ("cudaMallocManaged", 64 * MIB, 1),
        ("cudaMemAdvise", PREFERRED, "device:0"),
        ("cudaMemAdvise", ACCESSED_BY, "host"),
        ("cudaMemPrefetchAsync", 64 * MIB, "device:0"),
    ]


def test_large_tensor_in_tiered_mode_is_advised_and_not_prefetched() -> None:
    egm_alloc.enable()
    with sim.call_log() as log:
        block(3 * GIB, device=1)
    assert steps(log) == [
        ("cudaMallocManaged", 3 * GIB, 1),
        ("cudaMemAdvise", PREFERRED, "device:1"),
        ("cudaMemAdvise", ACCESSED_BY, "host"),
    ]


@pytest.mark.parametrize(
    ("preferred", "accessed_by", "expected"),
    [
        (None, (), []),
        ("host", (), [(PREFERRED, "host")]),
        (None, ("device",), [(ACCESSED_BY, "device:0")]),
        (
            "host",
            ("device", "host"),
            [(PREFERRED, "host"), (ACCESSED_BY, "device:0"), (ACCESSED_BY, "host")],
        ),
    ],
)
def test_advice_toggles(
    preferred: str | None, accessed_by: tuple[str, ...], expected: list[tuple[str, ...]]
) -> None:
    egm_alloc.enable(preferred_location=preferred, accessed_by=accessed_by)
    with sim.call_log() as log:
        tensor = block(2 * GIB)
    assert [step[1:] for step in steps(log)[1:]] == expected
    info = egm_alloc.info(tensor)
    assert info.preferred_location == preferred
    assert info.accessed_by == tuple(sorted(accessed_by))


def test_prefetch_off_prefetches_nothing() -> None:
    egm_alloc.enable(mode="managed", prefetch=False)
    with sim.call_log() as log:
        block(64 * MIB)
    assert "cudaMemPrefetchAsync" not in [step[0] for step in steps(log)]


def test_prefetch_goes_by_the_request_not_by_its_segment() -> None:
    # torch serves a 5 MiB request from a 20 MiB segment, which is above the threshold here.
    egm_alloc.enable(mode="managed", threshold_gib=16 / 1024)
    with sim.call_log() as log:
        block(5 * MIB)
    assert ("cudaMallocManaged", 20 * MIB, 1) in steps(log)
    assert ("cudaMemPrefetchAsync", 20 * MIB, "device:0") in steps(log)
    with sim.call_log() as log:
        block(16 * MIB)
    assert [step[0] for step in steps(log)] == [
        "cudaMallocManaged",
        "cudaMemAdvise",
        "cudaMemAdvise",
    ]


def test_prefetch_uses_neither_the_legacy_stream_nor_the_users() -> None:
    egm_alloc.enable(mode="managed")
    with sim.call_log() as log:
        block(64 * MIB)
    (prefetch,) = [call for call in log if call.name == "cudaMemPrefetchAsync"]
    assert prefetch.args["stream"] not in (0, 1, 2)


def test_prefetched_memory_is_on_the_device_and_the_rest_nowhere_yet() -> None:
    egm_alloc.enable(mode="managed", threshold_gib=1)
    small, large = block(64 * MIB), block(2 * GIB)
    assert sim.resident_bytes(small.data_ptr(), 64 * MIB) == 64 * MIB
    assert sim.resident_bytes(large.data_ptr(), 2 * GIB) == 0
