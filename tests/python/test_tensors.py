"""Where one tensor lives."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

import egm_alloc

MIB, GIB = 1 << 20, 1 << 30


def block(nbytes: int, device: int = 0) -> torch.Tensor:
    """Return an uninitialised tensor of `nbytes` bytes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")


@pytest.mark.simulated
def test_extended_tensor_tells_its_segment_and_advice() -> None:
    egm_alloc.enable(threshold_gib=1, preferred_location="host", accessed_by=["device", "host"])
    tensor = block(2 * GIB, device=1)
    info = egm_alloc.info(tensor)
    assert info == egm_alloc.TensorInfo(
        tier="extended",
        backing="managed",
        device=1,
        segment_address=tensor.data_ptr(),
        segment_bytes=2 * GIB,
        preferred_location="host",
        accessed_by=("device", "host"),
        prefetched=False,
        owner="torch",
    )


@pytest.mark.simulated
def test_advice_is_that_of_the_allocation_not_of_now() -> None:
    egm_alloc.enable(threshold_gib=1, preferred_location=None, accessed_by=())
    tensor = block(2 * GIB)
    egm_alloc.enable(preferred_location="device")
    info = egm_alloc.info(tensor)
    assert info.preferred_location is None
    assert info.accessed_by == ()


@pytest.mark.simulated
def test_device_tensor_has_no_segment_of_ours() -> None:
    egm_alloc.enable(threshold_gib=1)
    info = egm_alloc.info(block(MIB))
    assert (info.tier, info.backing, info.device) == ("device", None, 0)
    assert (info.segment_address, info.segment_bytes, info.owner) == (None, None, None)


@pytest.mark.simulated
def test_view_has_the_placement_of_its_base() -> None:
    egm_alloc.enable(threshold_gib=1)
    tensor = block(2 * GIB)
    for view in (tensor[5:9], tensor[:0], tensor.view(2, GIB).T, tensor[-1], tensor[::7]):
        assert egm_alloc.info(view) == egm_alloc.info(tensor)


@pytest.mark.simulated
def test_tensor_without_bytes_has_no_tier() -> None:
    egm_alloc.enable(threshold_gib=1)
    freed = block(MIB)
    freed.untyped_storage().resize_(0)
    for empty in (block(0), freed):
        assert egm_alloc.info(empty).tier is None
        assert egm_alloc.residency(empty) == egm_alloc.Residency("unregistered", 0, 0, 0)


@pytest.mark.simulated
def test_residency_is_of_the_part_that_a_view_shows() -> None:
    egm_alloc.enable(threshold_gib=1)
    tensor = block(2 * GIB)
    for view, size in [
        (tensor, 2 * GIB),
        (tensor[:MIB], MIB),
        (tensor.view(2, GIB).T, 2 * GIB),
        (tensor[: 4 * MIB : 2], 4 * MIB - 1),
        (tensor[:MIB].expand(3, MIB), MIB),
    ]:
        found = egm_alloc.residency(view)
        assert found.memory_type == "managed"
        total = found.host_bytes + found.device_node_bytes + found.unmapped_bytes
        assert size <= total < size + 2 * mmap.PAGESIZE


@pytest.mark.simulated
def test_residency_of_device_memory() -> None:
    assert egm_alloc.residency(block(MIB)).memory_type == "device"


@pytest.mark.parametrize("function", [egm_alloc.info, egm_alloc.residency])
@pytest.mark.parametrize("value", [None, 3, "cuda", [1.0], b""])
def test_what_is_no_tensor_is_refused(function: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^tensor is a .*; allowed: a torch.Tensor"):
        function(value)


@pytest.mark.parametrize("function", [egm_alloc.info, egm_alloc.residency])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensor_elsewhere_is_refused(function: Any, device: str) -> None:
    with pytest.raises(ValueError, match=rf"^tensor is on {device}; allowed: "):
        function(torch.empty(1, device=device))


@pytest.mark.simulated
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("function", [egm_alloc.info, egm_alloc.residency])
def test_sparse_tensor_is_refused(function: Any) -> None:
    place = torch.zeros(2, 1, dtype=torch.long)
    sparse = torch.sparse_coo_tensor(place, torch.zeros(1), (4, 4), device="cuda")
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo"):
        function(sparse)


@pytest.mark.simulated
@pytest.mark.parametrize("function", [egm_alloc.info, egm_alloc.residency])
def test_tensor_without_memory_of_its_own_is_refused(function: Any) -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(4, device="cuda")
    with pytest.raises(ValueError, match=r"FakeTensor without memory of its own; .*to_local\(\)"):
        function(fake)

    def look(part: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ValueError, match="without memory of its own"):
            function(part)
        return part

    assert torch.vmap(look)(torch.empty(2, 2, device="cuda")).shape == (2, 2)


@pytest.mark.simulated
@pytest.mark.parametrize("kind", ["device", "pinned", "numa", "split"])
def test_memory_that_is_not_managed_has_no_advice(kind: str) -> None:
    egm_alloc.enable(preferred_location="host", accessed_by=("device", "host"))
    with egm_alloc.place(kind):
        info = egm_alloc.info(block(32 * MIB))
    assert info.backing == kind
    assert (info.preferred_location, info.accessed_by) == (None, ())


@pytest.mark.simulated
def test_storage_smaller_than_the_shape_ends_what_is_looked_at() -> None:
    egm_alloc.enable(mode="managed")
    tensor = block(8 * MIB)
    neighbour = tensor[2 * MIB :]  # keeps nothing: the storage below is another
    tensor.untyped_storage().resize_(2 * MIB)
    behind = block(2 * MIB)
    for view, seen in ((tensor, 2 * MIB), (neighbour, 0)):
        residency = egm_alloc.residency(view)
        assert residency.host_bytes + residency.unmapped_bytes == seen
    egm_alloc.prefetch(behind, "device")
    before = egm_alloc.residency(behind)
    egm_alloc.prefetch(tensor, "host")
    assert egm_alloc.residency(behind) == before


@pytest.mark.simulated
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", [egm_alloc.info, egm_alloc.residency])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensor_is_refused(function: Any, layout: torch.layout) -> None:
    parts = [torch.ones(4, device="cuda"), torch.ones(8, device="cuda")]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(ValueError, match=r"^tensor is a nested tensor; allowed: .* unbind\(\)"):
        function(nested)
