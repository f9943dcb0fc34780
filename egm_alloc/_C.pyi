"""The extension module; all sizes are in bytes. The package's other modules are its public face."""
# ruff: noqa: N999

from typing import TypedDict

class _TierDict(TypedDict):
    allocated_bytes: int
    reserved_bytes: int

class _BackingDict(TypedDict):
    allocated_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int
    segments: int
    segment_allocs: int
    segment_frees: int
    allocations: int
    frees: int
    prefetches: int
    prefetch_failures: int
    advice_failures: int
    limit_refusals: int
    reserve_refusals: int
    spills: int

class _StatsDict(TypedDict):
    device_tier: _TierDict
    extended: dict[str, _BackingDict]
    tags: dict[int, _TierDict]

class _HostMemoryDict(TypedDict):
    total_bytes: int
    available_bytes: int
    limited_by: str
    reserve_bytes: int

class _HostBookingsDict(TypedDict):
    promised_bytes: int
    others_promised_bytes: int
    others_pending_bytes: int
    others_carveout_bytes: int
    other_processes: int
    problem: str | None

class _SegmentDict(TypedDict):
    device: int
    backing: str
    address: int
    size_bytes: int
    preferred_location: str | None
    accessed_by: tuple[str, ...]
    prefetched: bool
    spilled: bool
    tag: int
    on_device_bytes: int | None
    owner: str

class _ResidencyDict(TypedDict):
    memory_type: str
    host_bytes: int
    device_node_bytes: int
    unmapped_bytes: int

class _TraitsDict(TypedDict):
    managed: bool
    concurrent_managed_access: bool
    pageable_memory_access: bool
    uses_host_page_tables: bool
    integrated: bool
    host_numa_vmm: bool
    registered_host_pointers: bool
    host_numa_node: int
    hbm_numa_node: int
    egm_carveout: bool

class Config:
    def __init__(
        self,
        *,
        threshold_bytes: int,
        devices: list[int] | None,
        mode: str,
        backing: str,
        preferred_location: str | None,
        accessed_by: list[str],
        prefetch: bool,
        limit_bytes: int | None,
        device_fraction: float,
        spill: bool,
        host_reserve_bytes: int | None,
    ) -> None: ...

def configure(config: Config) -> None: ...
def enable(config: Config) -> None: ...
def disable() -> None: ...
def stop_recordings() -> None: ...
def is_enabled() -> bool: ...
def caching_is_enabled() -> bool: ...
def stats(device: int) -> _StatsDict: ...
def host_memory() -> _HostMemoryDict: ...
def host_bookings() -> _HostBookingsDict: ...
def reset_peak_stats(device: int) -> None: ...
def advise(
    address: int,
    size_bytes: int,
    device: int,
    preferred_location: str | None,
    accessed_by: list[str] | None,
    read_mostly: bool | None,
) -> None: ...
def prefetch(
    address: int, size_bytes: int, device: int, location: str, stream: int, stream_device: int
) -> None: ...
def migrate(segment_address: int, on_device_bytes: int, device: int) -> int: ...
def enter_place(
    number: int, backing: str, device_fraction: float, layout: str, tag: int, min_bytes: int
) -> None: ...
def leave_place(number: int) -> None: ...

class HostStock:
    def __init__(self, device: int, size_bytes: int, piece_bytes: int) -> None: ...
    def __enter__(self) -> HostStock: ...
    def __exit__(self, *error: object) -> None: ...
    def close(self) -> None: ...
    @property
    def held_bytes(self) -> int: ...

def segment_of(address: int) -> _SegmentDict | None: ...
def device_traits(device: int) -> _TraitsDict: ...
def choose_backing(device: int) -> tuple[str, str]: ...
def egm_carveout() -> int | None: ...
def read_kernel_file(path: str) -> str | None: ...
def host_total() -> tuple[int, str]: ...
def may_bind_memory() -> bool: ...
def may_ask_for_pages() -> bool: ...
def residency(address: int, size_bytes: int, device: int) -> _ResidencyDict: ...
