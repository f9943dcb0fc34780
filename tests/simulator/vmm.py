"""The driver's virtual memory management by ctypes; errors raise CudaError, as in cuda.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from tests.simulator.cuda import Location, call, place

_ACCESS = {"none": 0, "read": 1, "read-write": 3}
_PINNED = 1


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


def create(size: int, location: str = "device:0") -> int:
    """Handle of new physical memory, at ``"device:0"`` or ``"host-numa:0"``."""
    handle = ctypes.c_ulonglong()
    properties = _Properties(_PINNED, 0, place(location))
    call(
        "cuMemCreate",
        ctypes.byref(handle),
        ctypes.c_size_t(size),
        ctypes.byref(properties),
        ctypes.c_ulonglong(0),
    )
    return handle.value


def release(handle: int) -> None:
    """Give a handle back; mappings keep their memory."""
    call("cuMemRelease", ctypes.c_ulonglong(handle))


def reserve(size: int) -> int:
    """Address of a new range with nothing behind it."""
    address = ctypes.c_ulonglong()
    nothing = ctypes.c_ulonglong(0)
    call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), 0, nothing, nothing)
    return address.value


def free_addresses(address: int, size: int) -> None:
    """Give a range back, once nothing is mapped in it."""
    call("cuMemAddressFree", ctypes.c_ulonglong(address), ctypes.c_size_t(size))


def map_memory(address: int, size: int, handle: int, offset: int = 0) -> None:
    """Put physical memory behind an address, as yet without access."""
    call(
        "cuMemMap",
        ctypes.c_ulonglong(address),
        ctypes.c_size_t(size),
        ctypes.c_size_t(offset),
        ctypes.c_ulonglong(handle),
        ctypes.c_ulonglong(0),
    )


def unmap(address: int, size: int) -> None:
    """Take the memory of whole mappings away."""
    call("cuMemUnmap", ctypes.c_ulonglong(address), ctypes.c_size_t(size))


def set_access(address: int, size: int, *access: str) -> None:
    """Say who may use a range: ``"device:0=read-write"``, ``"host-numa:0=read"``."""
    wanted = (_Access * len(access))()
    for each, text in zip(wanted, access, strict=True):
        location, _, flags = text.partition("=")
        each.location, each.flags = place(location), _ACCESS[flags]
    call(
        "cuMemSetAccess",
        ctypes.c_ulonglong(address),
        ctypes.c_size_t(size),
        wanted,
        ctypes.c_size_t(len(access)),
    )


def access(address: int, location: str) -> str:
    """What a location may do with a mapped address: "none", "read" or "read-write"."""
    flags = ctypes.c_ulonglong()
    where = place(location)
    call("cuMemGetAccess", ctypes.byref(flags), ctypes.byref(where), ctypes.c_ulonglong(address))
    return next(name for name, value in _ACCESS.items() if value == flags.value)


def address_range(address: int) -> tuple[int, int]:
    """Base and size of what contains an address, by cuMemGetAddressRange."""
    base, size = ctypes.c_ulonglong(), ctypes.c_size_t()
    call(
        "cuMemGetAddressRange_v2",
        ctypes.byref(base),
        ctypes.byref(size),
        ctypes.c_ulonglong(address),
    )
    return base.value, size.value


@contextmanager
def mapped(size: int, *parts: str, access: tuple[str, ...] = ()) -> Iterator[int]:
    """A range of ``size`` bytes for each of its parts, such as ``"device:0", "host-numa:0"``.

    Handles are released at once, so that the memory goes with its mappings, when the block ends.
    """
    whole = size * len(parts)
    start = reserve(whole)
    for index, location in enumerate(parts):
        handle = create(size, location)
        map_memory(start + index * size, size, handle)
        release(handle)
    if access:
        set_access(start, whole, *access)
    try:
        yield start
    finally:
        unmap(start, whole)
        free_addresses(start, whole)
