"""Switching the allocator on and off.

No call of this file initialises CUDA: all of it works before CUDA is up and before a fork.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from egm_alloc import _C, machine
from egm_alloc.config import Config, Device
from egm_alloc.environment import (
    AUTO_ENABLE,
    BOOL_WORDS,
    from_environment,
    known_variables,
    parse_bool,
    unknown_variables,
    values_from_environment,
    variable,
)


class Keep(enum.Enum):
    """The default of arguments that, when left out, change nothing; None means something else."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "<present value>"


KEEP: Final = Keep.KEEP

# Reentrant: disable() may come from a finaliser in the midst of enable(). Out-of-memory observers
# may want it, under a gate of the allocator: no gate is waited for while it is held.
_lock = threading.RLock()
_config: Config | None = None  # of the last successful enable()


def _forget_who_holds_the_lock() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()


# A child that was forked while another thread had it would wait for that one for good.
os.register_at_fork(after_in_child=_forget_who_holds_the_lock)


def enable(
    *,
    threshold_gib: float | Keep = KEEP,
    device: Device | Sequence[Device] | Keep = KEEP,
    mode: str | Keep = KEEP,
    backing: str | Keep = KEEP,
    preferred_location: str | Keep | None = KEEP,
    accessed_by: Sequence[str] | Keep = KEEP,
    prefetch: bool | Keep = KEEP,
    limit_gib: float | Keep | None = KEEP,
    device_fraction: float | Keep = KEEP,
    spill: bool | Keep = KEEP,
    host_reserve_gib: float | Keep | None = KEEP,
) -> None:
    """Divert large requests to the extended tier, from now on.

    May be called again to change the configuration: live tensors stay where they are. A field that
    is not given keeps its present value, which at first is that of the variable
    ``EGM_ALLOC_<FIELD>``, else the default of `Config`.

    Parameters
    ----------
    threshold_gib : float, optional
        Requests of at least this many GiB leave the device tier.
    device : "all", int, str, torch.device or a sequence of them, optional
        The devices to act on.
    mode : {"tiered", "managed"}, optional
        Whether small requests stay in HBM, or everything is in managed memory.
    backing : {"managed", "device", "pinned", "numa", "split", "auto"}, optional
        Where the memory of the extended tier comes from.
    preferred_location : {"device", "host"} or None, optional
        Advice: where managed pages should be.
    accessed_by : sequence of {"device", "host"}, optional
        Advice: who keeps managed pages mapped.
    prefetch : bool, optional
        Whether managed memory of requests below the threshold is prefetched.
    limit_gib : float or None, optional
        The most GiB of extended memory per device.
    device_fraction : float, optional
        Backing ``"split"``: the part of each tensor that is in HBM.
    spill : bool, optional
        Whether host memory serves what HBM cannot hold.
    host_reserve_gib : float or None, optional
        The GiB of host memory that must stay free.

    Raises
    ------
    TypeError, ValueError
        If a field is not allowed, or names a device that the machine lacks.
    RuntimeError
        If there is no GPU, or torch's current allocator is not the native caching one. After any
        error everything is as it was.

    Notes
    -----
    Makes no CUDA call that initialises CUDA. The allocator is installed once per process; later
    calls only change its configuration.

    Examples
    --------
    >>> import egm_alloc
    >>> egm_alloc.enable(threshold_gib=0.5, preferred_location="host")
    """
    global _config  # noqa: PLW0603
    fields: dict[str, Any] = {
        "threshold_gib": threshold_gib,
        "device": device,
        "mode": mode,
        "backing": backing,
        "preferred_location": preferred_location,
        "accessed_by": accessed_by,
        "prefetch": prefetch,
        "limit_gib": limit_gib,
        "device_fraction": device_fraction,
        "spill": spill,
        "host_reserve_gib": host_reserve_gib,
    }
    given = {field: value for field, value in fields.items() if value is not KEEP}
    with _lock:
        if _config is not None:
            config = dataclasses.replace(_config, **given)
        else:
            config = Config(**{**values_from_environment(skip=given), **given})
        given_before = _config is not None or "device" in given
        _require_machine(config, "device" if given_before else variable("device"))
        _C.enable(_compiled(config))
        _config = config
    _C.stop_recordings()


def _compiled(config: Config) -> _C.Config:
    return _C.Config(
        threshold_bytes=config.threshold_bytes,
        devices=config.devices,
        mode=config.mode,
        backing=config.backing,
        preferred_location=config.preferred_location,
        accessed_by=list(config.accessed_by),
        prefetch=config.prefetch,
        limit_bytes=config.limit_bytes,
        device_fraction=config.device_fraction,
        spill=config.spill,
        host_reserve_bytes=config.host_reserve_bytes,
    )


def disable() -> None:
    """Divert nothing, from now on.

    Live extended tensors stay valid and are freed properly. Harmless where egm_alloc is off.
    """
    with _lock:
        _C.disable()
    _C.stop_recordings()


def is_enabled() -> bool:
    """Return whether large requests are diverted.

    Returns
    -------
    bool
        False also where another allocator replaced ours after it was enabled, or torch's caching is
        off (``torch.cuda.caching_allocator_enable(False)``).
    """
    return _C.is_enabled()


def get_config() -> Config:
    """Return the configuration in force or, while egm_alloc is off, the one `enable` starts from.

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        If nothing was enabled yet and an ``EGM_ALLOC_<FIELD>`` variable is not allowed.
    """
    config = _config
    return from_environment() if config is None else config


def require_caching() -> None:
    """Raise RuntimeError if the environment turns torch's cache off, and its pools with it."""
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        raise RuntimeError(
            "egm_alloc works inside torch's caching allocator, which "
            "PYTORCH_NO_CUDA_MEMORY_CACHING turns off: unset that variable"
        )


def _require_machine(config: Config, device_name: str) -> None:
    require_caching()
    count = machine.device_count()
    if count == 0:
        raise RuntimeError(f"egm_alloc needs a CUDA GPU: {machine.why_no_device()}")
    if count is not None and config.devices is not None and config.devices[-1] >= count:
        raise ValueError(
            f"{device_name} is {config.devices[-1]}; allowed: an index below {count}, "
            "the number of CUDA devices here"
        )


def enable_at_import(environ: Mapping[str, str] = os.environ) -> None:
    """Enable unless ``EGM_ALLOC_AUTO_ENABLE`` says no; a problem is one warning, not an error.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.
    """
    unknown = unknown_variables(environ)
    if unknown:
        known = ", ".join(known_variables())
        _warn(f"egm_alloc does not know {', '.join(unknown)}; it knows {known}")
    given = environ.get(AUTO_ENABLE, "1")
    try:
        wanted = parse_bool(given)
    except ValueError:
        _warn(f"egm_alloc is off: {AUTO_ENABLE} is {given!r}; allowed: {BOOL_WORDS}")
        return
    try:
        # The C pair follows the configuration whether or not the allocator is enabled.
        _C.configure(_compiled(from_environment(environ)))
    except (TypeError, ValueError) as error:
        _warn(f"egm_alloc is off: {error}" if wanted else f"egm_alloc has its defaults: {error}")
        return
    if not wanted:
        return
    try:
        enable()
    except (TypeError, ValueError, RuntimeError) as error:
        _warn(f"egm_alloc is off: {error}")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
