"""What is particular to one backing, on the simulated device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import egm_alloc
from tests.allocator.conftest import GIB, MIB, block
from tests.backings.conftest import counters, held_by_device, make, pattern
from tests.simulator import run_script, sim

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("initialised")]


def leave_host_memory(nbytes: int) -> None:
    """Leave `nbytes` on the host's node for cuMemCreate."""
    sim.set_host_numa_gib((sim.host_numa(0)["taken"] + nbytes) / GIB)


@pytest.mark.parametrize(
    ("fraction", "chunks_in_hbm"), [(0, 0), (0.25, 4), (0.3, 4), (0.5, 8), (0.99, 15), (1, 16)]
)
def test_split_head_is_in_hbm_by_its_fraction(fraction: float, chunks_in_hbm: int) -> None:
    before = sim.hbm(0)["taken"]
    with sim.call_log() as log:
        tensor = make(32 * MIB, "split", fraction=fraction)
    places = [call.args["location"] for call in log.of("cuMemCreate")]
    # HBM, the scarcer, first.
    assert places == ["device:0"] * chunks_in_hbm + ["host-numa:0"] * (16 - chunks_in_hbm)
    mapped = [call.args["ptr"] for call in log.of("cuMemMap")]
    assert mapped == [tensor.data_ptr() + 2 * MIB * chunk for chunk in range(16)]
    assert egm_alloc.info(tensor).on_device_bytes == chunks_in_hbm * 2 * MIB
    assert sim.hbm(0)["taken"] - before == chunks_in_hbm * 2 * MIB


def test_split_all_in_hbm_ends_in_hbm_whatever_the_size() -> None:
    # Beyond 2 GiB chunks are larger than torch's rounding of segments, so the last is not full.
    nbytes = 2 * GIB + 2 * MIB
    tensor = make(nbytes, "split", fraction=1)
    found = egm_alloc.info(tensor).on_device_bytes
    assert found is not None
    assert found >= nbytes
    address = tensor.data_ptr()
    del tensor
    with sim.call_log() as log:
        again = make(nbytes, "split", fraction=1)
    assert again.data_ptr() == address
    assert log.names == []  # nothing had moved, so nothing is moved back or waited for


def test_split_needs_no_memory_of_the_host_for_what_is_all_in_hbm() -> None:
    leave_host_memory(0)
    assert egm_alloc.info(make(32 * MIB, "split", fraction=1)).on_device_bytes == 32 * MIB
    with pytest.raises(torch.cuda.OutOfMemoryError, match="cuMemCreate"):
        make(32 * MIB, "split", fraction=0.5)


def test_split_memory_is_reused_for_the_same_size_and_fraction_only() -> None:
    first = make(32 * MIB, "split", fraction=0.5).data_ptr()
    others = [
        make(32 * MIB, "split", fraction=0.25),
        make(28 * MIB, "split", fraction=0.5),
        make(32 * MIB - 1, "split", fraction=0.5),
        make(34 * MIB, "split", fraction=0.5),
    ]
    assert first not in {tensor.data_ptr() for tensor in others}
    assert make(32 * MIB, "split", fraction=0.5).data_ptr() == first


@pytest.mark.parametrize("nbytes", [MIB, 2 * MIB, 10 * MIB - 1])
def test_what_torch_packs_with_others_is_not_split(nbytes: int) -> None:
    assert egm_alloc.info(make(nbytes, "split")).tier == "device"
    egm_alloc.enable(threshold_gib=nbytes / GIB, backing="split")
    assert egm_alloc.info(block(nbytes)).tier == "device"


def test_split_tensors_have_segments_of_their_own() -> None:
    for nbytes in (10 * MIB, 10 * MIB + 1, 19 * MIB):
        first, second = make(nbytes, "split"), make(nbytes, "split")
        before = egm_alloc.info(first)
        assert before.segment_address != egm_alloc.info(second).segment_address
        egm_alloc.migrate(second, device_fraction=1)
        egm_alloc.migrate(second, device_fraction=0)
        assert egm_alloc.info(first) == before


@pytest.mark.parametrize("setting", ["roundup_power2_divisions:4", "large_segment_size_mb:40"])
def test_settings_of_torch_that_round_sizes_bring_up_one_segment(setting: str) -> None:
    script = """
import egm_alloc, torch
egm_alloc.enable(threshold_gib=1 << 20)
for mib in (3, 33, 41):
    with egm_alloc.place("pinned"):
        tensor = torch.empty(mib << 20, dtype=torch.uint8, device="cuda")
    counted = egm_alloc.stats().extended["pinned"]
    print(counted.segment_allocs, counted.segment_frees, egm_alloc.info(tensor).segment_bytes >> 20)
    del tensor
    torch.cuda.empty_cache()
"""
    said = run_script(script, env={"PYTORCH_CUDA_ALLOC_CONF": setting}).stdout.split()
    sizes = {"r": ["20", "40", "48"], "l": ["40", "34", "42"]}[setting[0]]
    assert said == ["1", "0", sizes[0], "2", "1", sizes[1], "3", "2", sizes[2]]


def test_split_fraction_is_the_configurations_unless_given() -> None:
    egm_alloc.enable(device_fraction=0.75)
    assert egm_alloc.info(make(32 * MIB, "split")).on_device_bytes == 24 * MIB
    assert egm_alloc.info(make(32 * MIB, "split", fraction=0.25)).on_device_bytes == 8 * MIB


def test_split_gets_hbm_that_torch_has_cached() -> None:
    sim.set_hbm_gib((sim.hbm(0)["taken"] + 256 * MIB) / GIB, 0)
    cached = block(200 * MIB)
    del cached
    tensor = make(128 * MIB, "split", fraction=1)
    assert egm_alloc.info(tensor).on_device_bytes == 128 * MIB


def test_numa_gets_memory_of_the_host_that_another_device_has_cached() -> None:
    leave_host_memory(64 * MIB)
    cached = make(48 * MIB, "numa", device=1)
    del cached
    assert make(48 * MIB, "numa", device=0).numel() == 48 * MIB


def test_numa_memory_is_on_the_hosts_node_and_takes_no_hbm() -> None:
    before, host = sim.hbm(0)["taken"], sim.host_numa(0)["taken"]
    with sim.call_log() as log:
        tensor = make(33 * MIB, "numa")
    assert {call.args["location"] for call in log.of("cuMemCreate")} == {"host-numa:0"}
    assert sim.hbm(0)["taken"] == before
    assert sim.host_numa(0)["taken"] - host == 34 * MIB
    assert egm_alloc.info(tensor).on_device_bytes == 0


def test_numa_memory_is_next_to_its_device() -> None:
    script = """
import egm_alloc
from tests.backings.conftest import make
from tests.simulator import sim
egm_alloc.enable()
tensor = make(32 << 20, "numa", device=1)
print([sim.host_numa(node)["taken"] >> 20 for node in range(sim.host_nodes)])
"""
    ran = run_script(script, devices=2, env={"EGM_SIM_HOST_NODES": "2"})
    assert ran.stdout.splitlines()[-1] == "[0, 32]"


def test_numa_memory_beyond_the_node_is_torchs_error_and_leaves_nothing() -> None:
    leave_host_memory(32 * MIB)
    before = held_by_device()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="cuMemCreate"):
        make(48 * MIB, "numa")
    assert held_by_device() == before
    assert make(16 * MIB, "numa").numel() == 16 * MIB


def test_pinned_memory_is_populated_registered_for_all_devices_and_takes_no_hbm() -> None:
    before = sim.hbm(0)["taken"]
    with sim.call_log() as log:
        tensor = make(33 * MIB, "pinned")
    (registered,) = log.of("cudaHostRegister")
    portable_and_mapped = 1 | 2
    assert registered.args["flags"] == portable_and_mapped
    assert registered.args["size"] == 34 * MIB
    assert sim.hbm(0)["taken"] == before
    assert egm_alloc.residency(tensor).host_bytes >= 33 * MIB  # though nobody has touched it


def test_pinned_memory_goes_back_to_the_kernel() -> None:
    tensor = make(33 * MIB, "pinned")
    address = tensor.data_ptr()

    def is_mapped() -> bool:
        with open("/proc/self/maps") as maps:
            ranges = [line.split(maxsplit=1)[0].split("-") for line in maps]
        return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)

    assert is_mapped()
    del tensor
    torch.cuda.empty_cache()
    assert not is_mapped()


@pytest.mark.parametrize(
    ("variable", "refused", "served"),
    [
        ("EGM_SIM_HOST_NUMA_VMM", ("numa", "split"), ("managed", "device", "pinned")),
        ("EGM_SIM_REGISTERED_AT_HOST_ADDRESS", ("pinned",), ("managed", "numa", "split")),
    ],
)
def test_backing_that_a_machine_lacks_is_refused_by_name_of_another(
    variable: str, refused: tuple[str, ...], served: tuple[str, ...]
) -> None:
    script = f"""
import torch, egm_alloc
from tests.backings.conftest import make
egm_alloc.enable()
for backing in {refused}:
    try:
        make(32 << 20, backing)
    except torch.cuda.OutOfMemoryError as error:
        assert "use the backing" in str(error), error
    else:
        raise AssertionError(backing)
    assert egm_alloc.stats().extended[backing].reserved_bytes == 0
for backing in {served}:
    make(32 << 20, backing)
if "split" in {refused}:
    assert egm_alloc.info(make(32 << 20, "split", fraction=1)).on_device_bytes == 32 << 20
print("done")
"""
    assert "done" in run_script(script, env={variable: "0"}).stdout


@pytest.mark.parametrize("backing", ["numa", "split"])
def test_mapped_memory_is_copied_within_a_device_too(backing: str) -> None:
    one, other = make(12 * MIB, backing), make(14 * MIB, backing)
    one.copy_(pattern(12 * MIB, 3))
    other[: 12 * MIB].copy_(one)
    assert torch.equal(other[: 12 * MIB].cpu(), pattern(12 * MIB, 3))
    assert counters(backing).segments == 2


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(("here", "there"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_pinned_memory_is_copied_to_pinned_memory_by_the_gpu(
    current: int, here: int, there: int
) -> None:
    """The driver would do it by the CPU. Here no kernel moves bytes: see tests/gpu."""
    one, other = make(12 * MIB, "pinned", here), make(12 * MIB, "pinned", there)
    copies = [(other, one), (other[3:], one[3:]), (other[3:1000], one[:997])]
    stream = torch.cuda.Stream(device=here)
    for target, source in copies:
        with torch.cuda.stream(stream), torch.cuda.device(current):
            with sim.call_log(everything=True) as log:
                target.copy_(source)
            assert torch.cuda.current_device() == current
        names = [name for name in log.names if "Memcpy" in name or "Launch" in name]
        assert names == ["cudaLaunchKernel"]
        (launch,) = log.of("cudaLaunchKernel")
        assert (launch.args["stream"], launch.device) == (stream.cuda_stream, here)
    with sim.fail_call("cudaLaunchKernel", error="cudaErrorLaunchOutOfResources"):
        with pytest.raises(RuntimeError, match="cudaErrorLaunchOutOfResources"):
            other.copy_(one)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_copies_of_pinned_memory_are_unseen_by_autograd_and_modes() -> None:
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    one = make(12 * MIB, "pinned").view(torch.float32).requires_grad_()
    with Names(), egm_alloc.place("pinned"):  # type: ignore[no-untyped-call]
        clone = one.clone()
    assert egm_alloc.info(clone.detach()).backing == "pinned"
    assert seen == ["aten.clone.default"]
    assert type(clone.grad_fn).__name__ == "CloneBackward0"


@pytest.mark.parametrize("kinds", [("pinned", "device"), ("device", "pinned"), ("numa", "pinned")])
def test_other_copies_are_the_drivers(kinds: tuple[str, str]) -> None:
    one, other = (make(12 * MIB, kind) for kind in kinds)
    one.copy_(pattern(12 * MIB, 3))
    with sim.call_log(everything=True) as log:
        other.copy_(one)
    assert "cudaLaunchKernel" not in log.names
    assert torch.equal(other.cpu(), pattern(12 * MIB, 3))
