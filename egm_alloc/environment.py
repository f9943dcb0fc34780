"""The configuration as it is spelled in the environment, ``EGM_ALLOC_<FIELD>``.

Only the spelling is settled here; what a field may hold is checked in ``config.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from egm_alloc.config import (
    BACKING_CHOICES,
    FIELDS,
    FRACTION_ALLOWED,
    GIB_ALLOWED,
    LOCATIONS,
    MODES,
    Config,
    check_field,
)

PREFIX = "EGM_ALLOC_"
AUTO_ENABLE = PREFIX + "AUTO_ENABLE"
_OF_THE_VLLM_PLUGIN = PREFIX + "VLLM"  # which checks its own (vllm/settings.py)

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
BOOL_WORDS = ", ".join(_TRUE + _FALSE)


def _parse_number(text: str) -> float:
    return float(text)


def _parse_optional_number(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _parse_text(text: str) -> str:
    return text


def _parse_optional_text(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _parse_list(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else tuple(part.strip() for part in text.split(","))


def _parse_devices(text: str) -> str | list[int | str]:
    if text == "all":
        return "all"
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdecimal() else part for part in parts]


def parse_bool(text: str) -> bool:
    """Return the truth value of ``1/true/yes/on`` or ``0/false/no/off``, in any case.

    Parameters
    ----------
    text : str
        The value of an environment variable.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        If it is none of these words.
    """
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError(text)
    return word in _TRUE


# How each field is parsed, and what is said to be allowed where that or its check fails.
_PARSERS: dict[str, tuple[Callable[[str], object], str]] = {
    "threshold_gib": (
        _parse_number,
        f"{GIB_ALLOWED}; for everything in managed memory use mode managed",
    ),
    "device": (_parse_devices, "all, or indices of CUDA devices, each once, such as 1 or 0,1"),
    "mode": (_parse_text, ", ".join(MODES)),
    "backing": (_parse_text, ", ".join(BACKING_CHOICES)),
    "preferred_location": (_parse_optional_text, f"{', '.join(LOCATIONS)} or none"),
    "accessed_by": (_parse_list, f"{', '.join(LOCATIONS)}, both ({','.join(LOCATIONS)}) or none"),
    "prefetch": (parse_bool, BOOL_WORDS),
    "limit_gib": (_parse_optional_number, f"{GIB_ALLOWED}, or none for no limit"),
    "device_fraction": (_parse_number, FRACTION_ALLOWED),
    "spill": (parse_bool, BOOL_WORDS),
    "host_reserve_gib": (
        _parse_optional_number,
        f"{GIB_ALLOWED}, 0 for no reserve, or none for 5 % of host memory",
    ),
}


def variable(field: str) -> str:
    """Return the name of the environment variable of a field of ``Config``."""
    return PREFIX + field.upper()


def values_from_environment(
    environ: Mapping[str, str] = os.environ, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Return the fields that the environment sets, parsed and checked.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.
    skip : collection of str
        Fields to leave alone, because the caller has better values for them.

    Returns
    -------
    dict
        From field name to value; fields that are not set are absent.

    Raises
    ------
    ValueError
        If a value does not parse or is not allowed; names the variable, the value and what is
        allowed.
    """
    values: dict[str, Any] = {}
    for field in FIELDS:
        name = variable(field)
        if field in skip or name not in environ:
            continue
        text = environ[name].strip()
        parse, allowed = _PARSERS[field]
        try:
            values[field] = check_field(field, parse(text), name)
        except ValueError:
            raise ValueError(f"{name} is {text!r}; allowed: {allowed}") from None
    return values


def from_environment(environ: Mapping[str, str] = os.environ) -> Config:
    """Return the configuration that the environment asks for; defaults where it is silent.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        If a variable does not parse, is not allowed, or contradicts another.
    """
    return Config(**values_from_environment(environ))


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that begin with ``EGM_ALLOC_`` and mean nothing to us: likely typos."""
    known = known_variables()
    ours = (n for n in environ if n.startswith(PREFIX) and not n.startswith(_OF_THE_VLLM_PLUGIN))
    return sorted(name for name in ours if name not in known)


def known_variables() -> list[str]:
    """Return the environment variables that are read."""
    return [variable(field) for field in FIELDS] + [AUTO_ENABLE]
