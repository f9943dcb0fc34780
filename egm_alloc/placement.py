"""Where the tensors of a block of code go: `place`."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import numbers
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from egm_alloc import _C
from egm_alloc.config import check_choice, check_device_fraction, check_field
from egm_alloc.control import get_config, is_enabled

MIN_BYTES = 1 << 20  # the smallest that a block places, unless it says otherwise

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The extension knows tags by numbers, which are this process's own; 0 is "no tag".
_number_of_tag: dict[str, int] = {"": 0}
_tag_of_number: dict[int, str] = {0: ""}
_tag_numbers = itertools.count(1)
_block_numbers = itertools.count()


def _number_of(tag: str) -> int:
    # No lock: a signal handler would wait for one that its own thread holds, a forked child for one
    # that nobody holds any more. Who loses a race leaves a number unused.
    number = _number_of_tag.get(tag)
    if number is None:
        number = next(_tag_numbers)
        _tag_of_number[number] = tag
        number = _number_of_tag.setdefault(tag, number)
    return number


def tag_name(number: int) -> str:
    """Return the tag of a number that the extension knows it by."""
    return _tag_of_number[number]


def _why_not_decorated(function: object) -> str | None:
    """Return what keeps a function's work from running within its call, or None."""
    if isinstance(function, type):
        return "a class"
    if isinstance(function, (staticmethod, classmethod)):
        return f"a {type(function).__name__} (put the decorator below that one)"
    if not callable(function):
        return "which is not callable"
    # What it wraps, too: that of contextlib.contextmanager runs when the call is over.
    for called in (function, inspect.unwrap(function), type(function).__call__):
        if inspect.isgeneratorfunction(called):
            return "a generator function"
        if inspect.iscoroutinefunction(called):
            return "a coroutine function"
        if inspect.isasyncgenfunction(called):
            return "an async generator function"
    return None


class place(contextlib.ContextDecorator):  # noqa: N801 - used like a function
    """Place the CUDA tensors that this thread makes in a block of code.

    Parameters
    ----------
    backing : {"managed", "device", "pinned", "numa", "split", "auto"}
        Where their memory comes from; ``"device"`` is HBM whatever the size and the mode, and
        ``"auto"`` what suits the device.
    device_fraction : float, optional
        Backing ``"split"``: the part of each tensor that is in HBM, from 0 to 1, rounded down to
        pieces of 2 MiB and more. Tensors below 10 MiB are in HBM whole. Default: that of the
        configuration.
    layout : {"spread", "head"}, optional
        Backing ``"split"``: where that part is. ``"spread"``: pieces in HBM and on the host by
        turns, so that kernels read both at the same time; ``"head"``: the tensor's first bytes.
        Default: ``"spread"``.
    tag : str, optional
        A name under which `stats` adds up what the block placed. Requests below `min_bytes`, and
        those below 10 MiB with the backing ``"split"``, are not placed and have no tag. A block
        within this one has its own tag, or none.
    min_bytes : int
        Smaller requests are placed as outside of all blocks. 1 MiB by default.

    Raises
    ------
    TypeError, ValueError
        If an argument is not allowed, or it decorates what is not.
    RuntimeError
        On entering, if egm_alloc is off; on leaving, if this thread is not in the block.

    Notes
    -----
    Of the current thread only: what a backward pass makes, in threads of autograd, is placed by
    the configuration. Blocks nest, and the one entered last counts. A block must not span a
    ``yield`` or ``await``: meanwhile it would place what other code of the thread makes. Tensors
    keep their place when the block is left. It acts on every device, also on those that
    `enable` was not given, and ``"device"`` is not spilled. Within a CUDA graph capture, or in a
    ``torch.cuda.MemPool`` of the user's, torch decides. Within a function that ``torch.compile``
    compiles, a block ends the graph, and ``fullgraph=True`` refuses it; around a call of one it
    places what the call makes. May be used as a decorator, but not of generator functions,
    coroutine functions or classes.

    Examples
    --------
    >>> with egm_alloc.place("pinned", tag="optimizer"):
    ...     moments = [torch.zeros_like(p) for p in model.parameters()]
    """

    def __init__(
        self,
        backing: str,
        *,
        device_fraction: float | None = None,
        layout: str | None = None,
        tag: str | None = None,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        self._backing = str(check_field("backing", backing, "backing"))
        if device_fraction is not None:
            device_fraction = check_device_fraction("device_fraction", device_fraction)
            if backing != "split":
                raise ValueError(
                    f"device_fraction is {device_fraction!r}; allowed: only with the backing "
                    "'split'"
                )
        if layout is not None:
            layout = check_choice("layout", layout, ("spread", "head"), "'spread' or 'head'")
            if backing != "split":
                raise ValueError(f"layout is {layout!r}; allowed: only with the backing 'split'")
        if tag is not None and not isinstance(tag, str):
            raise TypeError(f"tag is {tag!r}; allowed: a text, or None")
        if tag == "":
            raise ValueError("tag is ''; allowed: a text that is not empty, or None")
        given: object = min_bytes  # numpy's integers, too, whatever its type says
        if isinstance(given, bool) or not isinstance(given, numbers.Integral):
            raise TypeError(f"min_bytes is {min_bytes!r}; allowed: a number of bytes from 0 up")
        if not 0 <= min_bytes < 1 << 63:
            raise ValueError(f"min_bytes is {min_bytes!r}; allowed: a number of bytes from 0 up")
        self._number = next(_block_numbers)
        self._device_fraction = device_fraction
        self._layout = layout or "spread"
        self._tag = _number_of(tag or "")
        self._min_bytes = int(min_bytes)

    def __call__(self, function: _Function) -> _Function:
        """Return a function each call of which is a block."""
        kind = _why_not_decorated(function)
        if kind is not None:
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"place() decorates {name}, {kind}; allowed: an ordinary function "
                "(within it use with blocks that contain no yield and no await)"
            )
        return super().__call__(function)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, in another process perhaps, is made from."""
        return {**self.__dict__, "_tag": tag_name(self._tag)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy: with the tag's number in this process, and a block of its own."""
        self.__dict__.update(state)
        self._tag = _number_of(state["_tag"])
        self._number = next(_block_numbers)

    def __enter__(self) -> place:
        """Begin to place what this thread makes."""
        if not is_enabled():
            raise RuntimeError("egm_alloc is off, so nothing can be placed: call enable() first")
        fraction = self._device_fraction
        if fraction is None:
            fraction = get_config().device_fraction
        _C.enter_place(
            self._number, self._backing, fraction, self._layout, self._tag, self._min_bytes
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Go back to what was before."""
        _C.leave_place(self._number)
