"""Measure the kinds of host memory on a GPU: bring-up, reads, split, stalls, moves, pressure.

    python -m benchmarks.memory_kinds

Ratios against what CUDA offers (cudaHostAlloc) and against the link's bound, in one run. Managed
memory stays under half of what the card has free, host memory under 48 GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.utils.dlpack

import egm_alloc
from benchmarks import sweep
from benchmarks.rows import GIB, MIB, batch_of


def tensor_in(
    kind: str, nbytes: int, device_fraction: float | None = None, layout: str | None = None
) -> torch.Tensor:
    """Return a tensor of `nbytes` bytes in one kind of memory."""
    with egm_alloc.place(kind, device_fraction=device_fraction, layout=layout):
        return torch.empty(nbytes // 4, dtype=torch.int32, device="cuda")


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one `work`, the device's part included."""
    return batch_of(work, repeats=1)()


def best_gbs(nbytes: int, work: Callable[[], object], times: int = 5) -> float:
    """Return the bandwidth of `work`, which reads so many bytes, in GB/s, the best of a few."""
    work()
    return nbytes / min(seconds(work) for _ in range(times)) / 1e9


def read_gbs(tensor: torch.Tensor) -> float:
    """Return the bandwidth of a kernel that reads all of a tensor, in GB/s, the best of five."""
    return best_gbs(tensor.nbytes, lambda: sweep.read(tensor))


def swept_gbs(tensor: torch.Tensor, on_host: float) -> float:
    """Return the bandwidth of reading head and tail of a tensor in GB/s, the better of two ways.

    One kernel from the beginning to the end reads HBM and the host in turns; two side by side share
    the GPU's processors from the start.
    """
    head = tensor[: int(tensor.numel() * (1 - on_host))]
    tail = tensor[head.numel() :]
    side = torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(side):
            sweep.read(tail)
        sweep.read(head)

    return max(best_gbs(tensor.nbytes, both, times=8), read_gbs(tensor))


def host_alloc(nbytes: int) -> tuple[float, torch.Tensor]:
    """Return the time of cudaHostAlloc and its memory as a CUDA tensor, which is never freed."""

    class DLTensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device_type", ctypes.c_int32),
            ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
            ("manager", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    runtime = torch.cuda.cudart()
    allocate = ctypes.CDLL("libcudart.so.13").cudaHostAlloc
    assert runtime is not None
    pointer = ctypes.c_void_p()
    start = time.perf_counter()
    status = allocate(ctypes.byref(pointer), ctypes.c_size_t(nbytes), ctypes.c_uint(3))
    took = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"memory_kinds: cudaHostAlloc of {nbytes} bytes failed with {status}")
    shape = (ctypes.c_int64 * 1)(nbytes // 4)
    managed = DLTensor(
        data=pointer, device_type=2, ndim=1, code=0, bits=32, lanes=1, shape=shape, strides=None
    )
    host_alloc.keep = (*getattr(host_alloc, "keep", ()), managed, shape)  # type: ignore[attr-defined]
    capsule_of = ctypes.pythonapi.PyCapsule_New
    capsule_of.restype = ctypes.py_object
    capsule_of.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return took, torch.utils.dlpack.from_dlpack(
        capsule_of(ctypes.addressof(managed), b"dltensor", None)
    )


def bring_up(size_gib: int) -> None:
    """Print how long each kind takes to come up, and at what speed the GPU reads it."""
    nbytes = size_gib * GIB
    # On a virtual machine, host memory that is used for the first time also waits for the
    # hypervisor: once, whoever asks. What is timed uses memory that was used before.
    tensor_in("pinned", 3 * nbytes)
    torch.cuda.empty_cache()
    native, plain = host_alloc(nbytes)
    plain.fill_(1)
    plain_gbs = read_gbs(plain)
    print(f"cudaHostAlloc  {native * 1e3 / size_gib:8.1f} ms/GiB  read {plain_gbs:7.1f} GB/s")
    for kind in ("pinned", "numa", "split", "device", "managed"):
        made: list[torch.Tensor] = []
        took = seconds(lambda kind=kind, made=made: made.append(tensor_in(kind, nbytes)))  # type: ignore[misc]
        (tensor,) = made
        touch = seconds(lambda tensor=tensor: tensor.fill_(1))  # type: ignore[misc]
        write = seconds(lambda tensor=tensor: tensor.fill_(2))  # type: ignore[misc]
        gbs = read_gbs(tensor)
        print(
            f"{kind:13s}  {took * 1e3 / size_gib:8.1f} ms/GiB  read {gbs:7.1f} GB/s  "
            f"write {nbytes / write / 1e9:7.1f} GB/s  first touch {touch * 1e3 / size_gib:7.1f} "
            f"ms/GiB  (x{native / took:.1f} of cudaHostAlloc's speed, read {gbs / plain_gbs:.3f})",
            flush=True,
        )
        del tensor
        made.clear()
        torch.cuda.empty_cache()


def split_sweep(size_gib: int) -> None:
    """Print the read bandwidth of ways to make a split tensor, beside the link's bound."""
    nbytes = size_gib * GIB
    host = tensor_in("pinned", nbytes)
    host.fill_(1)
    link = read_gbs(host)
    del host
    torch.cuda.empty_cache()
    print(f"split, {size_gib} GiB; the link alone: {link:.1f} GB/s")
    for sixteenths in (1, 2, 4, 8):
        on_host = sixteenths / 16
        bound = link / on_host
        found = {}
        for layout in ("spread", "head"):
            mapped = tensor_in("split", nbytes, device_fraction=1 - on_host, layout=layout)
            mapped.fill_(1)
            if layout == "spread":
                found["spread"] = read_gbs(mapped)
                found["spread by torch.max"] = best_gbs(nbytes, mapped.max)
            else:
                found["head"] = swept_gbs(mapped, on_host)
            del mapped
            torch.cuda.empty_cache()
        managed = tensor_in("managed", nbytes)
        head = managed[: int(managed.numel() * (1 - on_host))]
        tail = managed[head.numel() :]
        egm_alloc.advise(tail, preferred_location="host", accessed_by=("device", "host"))
        egm_alloc.prefetch(head, "device")
        egm_alloc.prefetch(tail, "host")
        managed.fill_(1)
        found["managed"] = swept_gbs(managed, on_host)
        print(
            f"{sixteenths:2d}/16 on the host: bound {bound:6.1f} GB/s; "
            + ", ".join(f"{way} {gbs:6.1f} ({gbs / bound:.3f})" for way, gbs in found.items()),
            flush=True,
        )
        del managed, head, tail
        torch.cuda.empty_cache()


class Allocations(threading.Thread):
    """A thread that times small allocations that torch's cache serves, or new segments in HBM."""

    def __init__(self, new_segments: bool) -> None:
        super().__init__()
        self.times_s: list[float] = []
        self._new_segments = new_segments
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Allocate until it is to end."""
        kept: list[torch.Tensor] = []
        while not self._done.is_set():
            start = time.perf_counter()
            if self._new_segments:
                kept.append(torch.empty(22 * MIB, dtype=torch.uint8, device="cuda"))
            else:
                torch.empty(256, dtype=torch.uint8, device="cuda")
            self.times_s.append(time.perf_counter() - start)
            time.sleep(0.03 if self._new_segments else 0.0005)

    def end(self) -> None:
        """End it, and wait."""
        self._done.set()
        self.join()

    def take_longest(self) -> str:
        """Return the longest time, and how many allocations there were, and forget them."""
        times = sorted(self.times_s)
        self.times_s.clear()
        return f"{times[-1] * 1e3:.2f} ms of {len(times)}"


def stalls() -> None:
    """Print how long others' allocations took at most while a thread brings memory up.

    Who needs a new segment waits for the driver, and holds torch's lock meanwhile; so the cached
    requests of a third thread wait too.
    """
    for kind, size_gib in itertools.product(("pinned", "numa", "split"), (1, 8, 32)):
        cached, new = Allocations(new_segments=False), Allocations(new_segments=True)
        time.sleep(0.3)  # what they do first takes longer
        for thread in (cached, new):
            thread.take_longest()
        time.sleep(1.5)
        alone = f"cached {cached.take_longest()}, new segments {new.take_longest()}"
        start = time.perf_counter()
        tensor = tensor_in(kind, size_gib * GIB)
        took = time.perf_counter() - start
        time.sleep(0.05)  # at least one of each
        cached.end()
        new.end()
        print(
            f"{kind:6s} {size_gib:2d} GiB up in {took:6.2f} s; longest beside it: cached "
            f"{cached.take_longest()}, new segments {new.take_longest()}; alone: {alone}",
            flush=True,
        )
        del tensor
        torch.cuda.empty_cache()


def moves() -> None:
    """Print how fast the boundary of a split tensor moves, and that contents stay."""
    tensor = tensor_in("split", 2 * GIB, device_fraction=0.5)
    tensor.copy_(torch.arange(tensor.numel(), dtype=torch.int32, device="cuda"))
    check = tensor.sum(dtype=torch.int64)
    for fraction in (1.0, 0.0, 0.75):
        start = time.perf_counter()
        moved = egm_alloc.migrate(tensor, device_fraction=fraction)
        took = time.perf_counter() - start
        assert torch.equal(tensor.sum(dtype=torch.int64), check)
        print(
            f"migrate to {fraction}: {moved / MIB:.0f} MiB, {took / (moved / GIB) * 1e3:.1f} ms/GiB"
        )
    del tensor
    torch.cuda.empty_cache()


def products() -> None:
    """Print whether products of split tensors are those of plain ones, bit for bit."""
    torch.manual_seed(0)
    with egm_alloc.place("split", device_fraction=0.5):
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    plain = a.clone() @ b.clone()
    assert egm_alloc.info(a).backing == "split"
    print("product of split tensors bit-equal to plain ones:", bool(torch.equal(a @ b, plain)))


def pressure() -> None:
    """Print what each kind does when 8 GiB of HBM are free, and how requests are spilled then."""
    egm_alloc.enable(threshold_gib=64)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * GIB:
        print(f"pressure: needs 12 GiB of free HBM, and there are {free / GIB:.1f}")
        return
    with egm_alloc.place("device"):
        ballast = torch.empty(free - 8 * GIB, dtype=torch.uint8, device="cuda")
    for kind in ("device", "managed", "managed kept on the host", "pinned", "numa", "split"):
        tensor = tensor_in(kind.split()[0], 2 * GIB)
        if kind == "managed kept on the host":
            egm_alloc.advise(tensor, preferred_location="host", accessed_by=("device", "host"))
            egm_alloc.prefetch(tensor, "host")
        tensor.fill_(1)
        print(f"{kind}: read {read_gbs(tensor):.1f} GB/s", flush=True)
        del tensor
        torch.cuda.empty_cache()
    pieces, made_s = [], []
    for _ in range(10):
        start = time.perf_counter()
        pieces.append(torch.empty(GIB // 4, dtype=torch.int32, device="cuda"))
        made_s.append(time.perf_counter() - start)
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    kinds = [egm_alloc.info(piece).backing or "HBM" for piece in pieces]
    print("ten of 1 GiB:", ", ".join(kinds))
    slowest = max(s for s, kind in zip(made_s, kinds, strict=True) if kind != "HBM")
    print(f"spilled: {slowest * 1e3:.1f} ms/GiB at most, read {read_gbs(pieces[-1]):.1f} GB/s")
    figures = torch.cuda.memory_stats()["num_ooms"], egm_alloc.stats().extended["pinned"].spills
    print("num_ooms {}, spills {}".format(*figures))
    assert all(bool((piece == index).all()) for index, piece in enumerate(pieces))
    del pieces, piece, ballast
    torch.cuda.empty_cache()
    print("afterwards:", egm_alloc.info(torch.empty(GIB, dtype=torch.uint8, device="cuda")).tier)


PARTS: dict[str, Callable[[], None]] = {
    "bring-up": lambda: bring_up(8),
    "split": lambda: split_sweep(4),
    "products": products,
    "moves": moves,
    "stalls": stalls,
    "pressure": pressure,
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_kinds", description=__doc__)
    parser.add_argument("--only", default="", metavar="PART", help=f"one of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    if arguments.only and arguments.only not in PARTS:
        parser.error(f"--only is {arguments.only!r}; allowed: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit("memory_kinds: no GPU here")
    egm_alloc.enable(threshold_gib=64)
    torch.empty(1, device="cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    for name, part in PARTS.items():
        if arguments.only in {"", name}:
            part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
