"""What the control interface hands out: calls and their log, faults, stalls, allocations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True)
class Call:
    """One call of the simulated CUDA API.

    Pointers, handles and sizes in ``args`` are ints; locations, advice and kinds of copies are
    texts ("device:0", "host", "set-preferred-location", "host-to-device"), access is a list of them
    ("device:0=read-write"). ``result`` is the name of the error ("cudaSuccess"), in the runtime's
    spelling for driver functions too; ``device`` the calling thread's device after the call.
    """

    name: str
    args: dict[str, Any]
    result: str
    device: int
    thread: int


@dataclass(frozen=True)
class Kind:
    """Live allocations of one kind on one device."""

    count: int
    bytes: int


class CallLog(Sequence[Call]):
    """The calls since the log began; grows while its ``with`` block runs."""

    def __init__(self, take: Callable[[], list[Call]]) -> None:
        self._take = take
        self._calls: list[Call] = []

    def _drain(self) -> list[Call]:
        self._calls += self._take()
        return self._calls

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        return self._drain()[index]

    def __len__(self) -> int:
        return len(self._drain())

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self._drain()))

    def __repr__(self) -> str:
        return "CallLog(\n" + "".join(f"  {call}\n" for call in self) + ")"

    @property
    def names(self) -> list[str]:
        """The names of the calls, in order."""
        return [call.name for call in self]

    def of(self, *names: str) -> list[Call]:
        """The calls of some functions, in order."""
        return [call for call in self if call.name in names]

    def clear(self) -> None:
        """Forget the calls so far."""
        self._drain()
        self._calls.clear()


class Fault:
    """An error that is armed; ``fired`` says how often it has struck."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self._library = library
        self._number = number
        self._final: int | None = None

    @property
    def fired(self) -> int:
        """How many calls have failed by it."""
        if self._final is not None:
            return self._final
        return int(self._library.egm_sim_faults_fired(self._number))

    def disarm(self) -> None:
        """End it; harmless when it has ended."""
        self._final = self.fired
        self._library.egm_sim_disarm_fault(self._number)


class Stall:
    """Calls that are made to wait."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self._library = library
        self._number = number

    def wait_until_reached(self, timeout: float = 60.0) -> None:
        """Wait until a thread is in such a call.

        Raises
        ------
        TimeoutError
            After ``timeout`` seconds.
        """
        if not self._library.egm_sim_wait_until_reached(self._number, timeout):
            raise TimeoutError(f"no thread made the call within {timeout} s")
