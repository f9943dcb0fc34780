"""A few CUDA runtime calls by ctypes, for tests that go below PyTorch.

Only what tests of the simulator and of memory placement need; errors raise CudaError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TYPES = {"none": 0, "device": 1, "host": 2, "host-numa": 3}
ADVICE = {
    "set-read-mostly": 1,
    "unset-read-mostly": 2,
    "set-preferred-location": 3,
    "unset-preferred-location": 4,
    "set-accessed-by": 5,
    "unset-accessed-by": 6,
}
ATTRIBUTES = {
    "read-mostly": 1,
    "preferred-location": 2,
    "accessed-by": 3,
    "last-prefetch-location": 4,
    "preferred-location-type": 5,
    "preferred-location-id": 6,
    "last-prefetch-location-type": 7,
    "last-prefetch-location-id": 8,
}


class CudaError(RuntimeError):
    """A CUDA call failed; ``str()`` of it is the error's name."""


class Location(ctypes.Structure):
    """cudaMemLocation, and the driver's CUmemLocation, which is the same."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class PointerAttributes(ctypes.Structure):
    """cudaPointerAttributes."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    ]


def place(text: str) -> Location:
    """``"device:1"``, ``"host"``, ``"host-numa:0"``."""
    kind, _, number = text.partition(":")
    return Location(_TYPES[kind], int(number or 0))


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def call(name: str, *arguments: object) -> None:
    """Call a function of the runtime; the arguments are ctypes objects."""
    runtime = _runtime()
    result = getattr(runtime, name)(*arguments)
    if result != 0:
        runtime.cudaGetErrorName.restype = ctypes.c_char_p
        raise CudaError(runtime.cudaGetErrorName(result).decode())


def last_error() -> int:
    """The error of cudaGetLastError, which it clears."""
    return int(_runtime().cudaGetLastError())


def malloc(size: int) -> int:
    """Address of new device memory."""
    pointer = ctypes.c_void_p()
    call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
    return pointer.value or 0


def malloc_managed(size: int) -> int:
    """Address of new managed memory, attached globally."""
    pointer = ctypes.c_void_p()
    call("cudaMallocManaged", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(1))
    return pointer.value or 0


def host_alloc(size: int, flags: int = 0) -> int:
    """Address of new pinned memory of the host."""
    pointer = ctypes.c_void_p()
    call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(flags))
    return pointer.value or 0


def free_host(address: int) -> None:
    """Free what :func:`host_alloc` gave."""
    call("cudaFreeHost", ctypes.c_void_p(address))


def register(address: int, size: int, flags: int = 3) -> None:
    """Register memory with cudaHostRegister; by default portable and mapped."""
    call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(flags))


def unregister(address: int) -> None:
    """Undo :func:`register`."""
    call("cudaHostUnregister", ctypes.c_void_p(address))


def device_pointer(address: int, flags: int = 0) -> int:
    """Where devices see pinned or registered memory."""
    pointer = ctypes.c_void_p()
    call(
        "cudaHostGetDevicePointer",
        ctypes.byref(pointer),
        ctypes.c_void_p(address),
        ctypes.c_uint(flags),
    )
    return pointer.value or 0


def free(address: int) -> None:
    """Free device or managed memory."""
    call("cudaFree", ctypes.c_void_p(address))


def memset(address: int, value: int, size: int) -> None:
    """Set bytes, waiting for it."""
    call("cudaMemset", ctypes.c_void_p(address), ctypes.c_int(value), ctypes.c_size_t(size))


def memset_async(address: int, value: int, size: int, stream: int = 0) -> None:
    """Set bytes on a stream."""
    call(
        "cudaMemsetAsync",
        ctypes.c_void_p(address),
        ctypes.c_int(value),
        ctypes.c_size_t(size),
        ctypes.c_void_p(stream),
    )


def copy(target: int, source: int, size: int) -> None:
    """Copy bytes (kind "default"), waiting for it."""
    call(
        "cudaMemcpy",
        ctypes.c_void_p(target),
        ctypes.c_void_p(source),
        ctypes.c_size_t(size),
        ctypes.c_int(4),
    )


def read(address: int, size: int) -> bytes:
    """Bytes as the current device sees them."""
    buffer = ctypes.create_string_buffer(size)
    copy(ctypes.addressof(buffer), address, size)
    return buffer.raw


def copy_async(target: int, source: int, size: int, stream: int = 0) -> None:
    """Copy bytes (kind "default") on a stream."""
    call(
        "cudaMemcpyAsync",
        ctypes.c_void_p(target),
        ctypes.c_void_p(source),
        ctypes.c_size_t(size),
        ctypes.c_int(4),
        ctypes.c_void_p(stream),
    )


def copy_peer_async(  # noqa: PLR0917
    target: int, target_device: int, source: int, source_device: int, size: int, stream: int = 0
) -> None:
    """Copy bytes from one device to another on a stream."""
    call(
        "cudaMemcpyPeerAsync",
        ctypes.c_void_p(target),
        ctypes.c_int(target_device),
        ctypes.c_void_p(source),
        ctypes.c_int(source_device),
        ctypes.c_size_t(size),
        ctypes.c_void_p(stream),
    )


@contextmanager
def managed(size: int) -> Iterator[int]:
    """Managed memory for the length of a ``with`` block."""
    address = malloc_managed(size)
    try:
        yield address
    finally:
        free(address)


_CAPTURE_MODES = {"global": 0, "thread_local": 1, "relaxed": 2}


@contextmanager
def capture_mode(mode: str) -> Iterator[None]:
    """Exchange this thread's capture mode for the length of a ``with`` block."""
    held = ctypes.c_int(_CAPTURE_MODES[mode])
    call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(held))
    try:
        yield
    finally:
        call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(held))


@contextmanager
def capture(stream: int, mode: str = "global") -> Iterator[None]:
    """Capture a stream for the length of a ``with`` block, and drop the graph.

    Unlike torch.cuda.graph it leaves PyTorch alone, which does not recover from a failed capture.
    """
    call("cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_MODES[mode]))
    graph = ctypes.c_void_p()
    try:
        yield
    finally:
        call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
    call("cudaGraphDestroy", graph)


def advise(address: int, size: int, advice: str, location: str = "none") -> None:
    """Advice on managed memory."""
    call(
        "cudaMemAdvise",
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        ctypes.c_int(ADVICE[advice]),
        place(location),
    )


def prefetch(address: int, size: int, location: str, stream: int = 0) -> None:
    """Prefetch managed memory."""
    call(
        "cudaMemPrefetchAsync",
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
        place(location),
        ctypes.c_uint(0),
        ctypes.c_void_p(stream),
    )


def range_attribute(address: int, size: int, attribute: str, count: int = 1) -> list[int]:
    """What cudaMemRangeGetAttribute says."""
    values = (ctypes.c_int * count)()
    call(
        "cudaMemRangeGetAttribute",
        values,
        ctypes.c_size_t(ctypes.sizeof(values)),
        ctypes.c_int(ATTRIBUTES[attribute]),
        ctypes.c_void_p(address),
        ctypes.c_size_t(size),
    )
    return list(values)


def pointer_attributes(address: int) -> PointerAttributes:
    """What cudaPointerGetAttributes says."""
    attributes = PointerAttributes()
    call("cudaPointerGetAttributes", ctypes.byref(attributes), ctypes.c_void_p(address))
    return attributes


def pointer_type(address: int) -> str:
    """ "unregistered", "host", "device" or "managed"."""
    kind = int(pointer_attributes(address).type)
    return ("unregistered", "host", "device", "managed")[kind]


def device_attribute(attribute: int, device: int = 0) -> int:
    """A device attribute by its number (cudaDeviceAttr)."""
    value = ctypes.c_int()
    call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value
