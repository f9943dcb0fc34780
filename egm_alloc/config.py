"""The configuration: its fields, their checks and their units.

Pure: nothing here touches CUDA or changes the allocator (``control.py`` does), nor reads the
environment (``environment.py`` does).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

# One CUDA device, as torch lets it be written.
Device: TypeAlias = int | str | torch.device

_GIB = 1 << 30
_MAX_GIB = float(1 << 33)  # 2**63 bytes, the most that a signed 64-bit size holds
_MAX_DEVICES = 128  # torch's DeviceIndex is an int8_t (c10/core/Device.h)

MODES = ("tiered", "managed")
BACKINGS = ("managed", "device", "pinned", "numa", "split")
BACKING_CHOICES = (*BACKINGS, "auto")
LOCATIONS = ("device", "host")

GIB_ALLOWED = "a number of GiB above 0 and below 2**33 (2**63 bytes)"
FRACTION_ALLOWED = "a number from 0 (all on the host) to 1 (all in HBM)"


def _refusal(name: str, value: object, allowed: str) -> str:
    return f"{name} is {value!r}; allowed: {allowed}"


def _check_number(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(_refusal(name, value, allowed))
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float; allowed: {allowed}") from None


def _check_gib(name: str, value: object, more: str = "") -> float:
    allowed = GIB_ALLOWED + more
    gib = _check_number(name, value, allowed)
    if not 0 < gib < _MAX_GIB:  # NaN fails this comparison too
        raise ValueError(_refusal(name, value, allowed))
    return gib


def _check_threshold(name: str, value: object) -> float:
    return _check_gib(name, value, "; for everything in managed memory use mode 'managed'")


def _check_limit(name: str, value: object) -> float | None:
    return None if value is None else _check_gib(name, value, ", or None for no limit")


def _check_host_reserve(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0:
        return 0.0
    return _check_gib(name, value, ", 0 for none, or None for 5 % of host memory")


def check_choice(name: str, value: object, choices: Sequence[str], allowed: str = "") -> str:
    """Return one of some texts, as a plain one where it is of an enumeration of texts.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : object
        One of `choices`.
    choices : sequence of str
        The texts.
    allowed : str, optional
        What the error says is allowed; by default all choices.

    Returns
    -------
    str

    Raises
    ------
    TypeError
        If `value` is not a text.
    ValueError
        If it is none of `choices`.
    """
    allowed = allowed or ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(_refusal(name, value, allowed))
    if value not in choices:
        raise ValueError(_refusal(name, value, allowed))
    return choices[choices.index(value)]


def _check_mode(name: str, value: object) -> str:
    return check_choice(name, value, MODES)


def _check_backing(name: str, value: object) -> str:
    return check_choice(name, value, BACKING_CHOICES)


def _check_preferred_location(name: str, value: object) -> str | None:
    if value is None:
        return None
    return check_choice(name, value, LOCATIONS, "'device', 'host' or None")


def _check_accessed_by(name: str, value: object) -> tuple[str, ...]:
    allowed = "a tuple or list of 'device' and 'host', each at most once, or () for none"
    if not isinstance(value, (tuple, list)):
        raise TypeError(_refusal(name, value, allowed))
    if not all(isinstance(location, str) for location in value):
        raise TypeError(_refusal(name, value, allowed))
    if len(set(value)) != len(value) or not set(value) <= set(LOCATIONS):
        raise ValueError(_refusal(name, value, allowed))
    return tuple(location for location in LOCATIONS if location in value)


def check_device_fraction(name: str, value: object) -> float:
    """Return the part of a split tensor that is in HBM.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : object
        A number from 0 to 1.

    Returns
    -------
    float

    Raises
    ------
    TypeError
        If `value` is not a number.
    ValueError
        If it is not from 0 to 1.
    """
    fraction = _check_number(name, value, FRACTION_ALLOWED)
    if not 0 <= fraction <= 1:  # NaN fails this comparison too
        raise ValueError(_refusal(name, value, FRACTION_ALLOWED))
    return fraction


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(_refusal(name, value, "True or False"))
    return value


_DEVICES_ALLOWED = (
    "'all', or a CUDA device with its index (1, 'cuda:1' or torch.device('cuda', 1)), "
    "or a sequence of such devices, each once"
)


def check_device_index(name: str, value: object, allowed: str = _DEVICES_ALLOWED) -> int:
    """Return the index of one CUDA device, however it is written.

    Parameters
    ----------
    name : str
        What the error calls it.
    value : object
        An int, a ``torch.device`` or a string such as ``"cuda:1"``.
    allowed : str
        What the error says is allowed.

    Returns
    -------
    int
        The index, from 0 to 127. Whether the machine has that device is not checked here.

    Raises
    ------
    TypeError
        If `value` is of another type.
    ValueError
        If it is not a CUDA device, has no index, or the index is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, str, torch.device)):
        raise TypeError(_refusal(name, value, allowed))
    if isinstance(value, numbers.Integral):
        index = int(value)
    else:
        try:
            device = torch.device(value)
        except RuntimeError:
            raise ValueError(_refusal(name, value, allowed)) from None
        if device.type != "cuda" or device.index is None:
            raise ValueError(_refusal(name, value, allowed))
        index = device.index
    if not 0 <= index < _MAX_DEVICES:
        raise ValueError(_refusal(name, value, allowed))
    return index


def _check_device(name: str, value: object) -> str | tuple[int, ...]:
    if isinstance(value, str) and value == "all":
        return "all"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        indices = [check_device_index(name, device) for device in value]
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(_refusal(name, value, _DEVICES_ALLOWED))
        return tuple(sorted(indices))
    return (check_device_index(name, value),)


@dataclasses.dataclass(frozen=True)
class Config:
    """What leaves the device tier, where it goes and with which advice.

    Every field is checked and brought to one form on construction.

    Parameters
    ----------
    threshold_gib : float
        Requests of at least this many GiB go to the extended tier.
    device : "all", int, str, torch.device or a sequence of them
        The devices whose requests it diverts by size, or spills; `place` acts on all. Kept as
        ``"all"`` or a sorted tuple of indices.
    mode : {"tiered", "managed"}
        ``"tiered"``: small in HBM, large extended. ``"managed"``: everything in managed memory.
    backing : {"managed", "device", "pinned", "numa", "split", "auto"}
        Where the memory of the extended tier comes from. ``"auto"`` is what suits each device;
        `doctor` says what that is, and why. Mode ``"managed"`` needs ``"managed"``.
    preferred_location : {"device", "host"} or None
        Advice on managed memory: where its pages should be.
    accessed_by : tuple or list of {"device", "host"}
        Advice on managed memory: who keeps it mapped. Kept as a sorted tuple.
    prefetch : bool
        Whether managed memory of requests below the threshold (in mode ``"managed"``, in a
        `place` block or a `mem_pool`) is prefetched to the device.
    limit_gib : float or None
        The most GiB of extended memory per device; None for no limit.
    device_fraction : float
        Backing ``"split"``: the part of each tensor that is in HBM, from 0 to 1.
    spill : bool
        Whether requests below the threshold that HBM cannot hold are served from host memory
        (backing ``"pinned"``, or ``"numa"`` if `backing` is or means that) instead of raising.
    host_reserve_gib : float or None
        The GiB of host memory that must stay free, 0 for none; None for 5 % of host memory.

    Raises
    ------
    TypeError
        If a field has the wrong type.
    ValueError
        If a field has a value that is not allowed. Both name the field, the value and what is
        allowed.

    Notes
    -----
    The advice is that of cudaMemAdvise (CUDA C++ Programming Guide, "Data Usage Hints").

    Examples
    --------
    >>> Config(threshold_gib=1, device="cuda:0").device
    (0,)
    """

    threshold_gib: float = 2.0
    device: str | tuple[int, ...] = "all"
    mode: str = "tiered"
    backing: str = "managed"
    preferred_location: str | None = "device"
    accessed_by: tuple[str, ...] = ("host",)
    prefetch: bool = True
    limit_gib: float | None = None
    device_fraction: float = 0.5
    spill: bool = True
    host_reserve_gib: float | None = None

    def __post_init__(self) -> None:
        """Check the fields, one by one and then together."""
        for field, check in _CHECKS.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))
        if self.mode == "managed" and self.backing != "managed":
            raise ValueError(_refusal("backing", self.backing, "'managed' in mode 'managed'"))

    @property
    def threshold_bytes(self) -> int:
        """The threshold in bytes, at least 1."""
        return math.ceil(self.threshold_gib * _GIB)

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes, at least 1, or None."""
        return None if self.limit_gib is None else math.ceil(self.limit_gib * _GIB)

    @property
    def host_reserve_bytes(self) -> int | None:
        """The reserve in bytes, or None for 5 % of host memory."""
        return None if self.host_reserve_gib is None else math.ceil(self.host_reserve_gib * _GIB)

    @property
    def devices(self) -> list[int] | None:
        """The indices of the devices it acts on, or None for all."""
        return None if isinstance(self.device, str) else list(self.device)


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "threshold_gib": _check_threshold,
    "device": _check_device,
    "mode": _check_mode,
    "backing": _check_backing,
    "preferred_location": _check_preferred_location,
    "accessed_by": _check_accessed_by,
    "prefetch": _check_bool,
    "limit_gib": _check_limit,
    "device_fraction": check_device_fraction,
    "spill": _check_bool,
    "host_reserve_gib": _check_host_reserve,
}
FIELDS = tuple(_CHECKS)


def check_field(field: str, value: object, name: str) -> object:
    """Return `value` as ``Config`` keeps it in `field`.

    Parameters
    ----------
    field : str
        One of ``FIELDS``.
    value : object
        The value to check.
    name : str
        What an error calls the field: its own name, or that of an environment variable.

    Returns
    -------
    object
        The value in the field's one form.

    Raises
    ------
    TypeError
        If the value has the wrong type.
    ValueError
        If it is not allowed.
    """
    return _CHECKS[field](name, value)
