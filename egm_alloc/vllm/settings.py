"""What the vLLM plugin is told: ``EGM_ALLOC_VLLM`` and the settings that begin with it.

Pure: read from a mapping, checked, and nothing else.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from egm_alloc.environment import BOOL_WORDS, parse_bool

PREFIX = "EGM_ALLOC_VLLM"
BACKINGS = ("auto", "pinned", "numa", "managed")

_GIB = 1 << 30
_MAX_GIB = 1 << 33  # 2**63 bytes

Auto = Literal["auto"]


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Parameters
    ----------
    kv_bytes : int or "auto"
        Extended memory that each GPU's KV cache gets on top of what vLLM finds in HBM; 0 for none.
    weights_hbm_bytes : int, "auto" or None
        The HBM that the weights of each GPU may take before the rest goes to host memory; None for
        no bound.
    backing : {"auto", "pinned", "numa", "managed"}
        The host memory that is used.
    allow_untested : bool
        Whether versions of vLLM that nobody has checked are patched all the same.
    """

    kv_bytes: int | Auto = 0
    weights_hbm_bytes: int | Auto | None = "auto"
    backing: str = "auto"
    allow_untested: bool = False


KV = PREFIX + "_KV_GIB"
WEIGHTS = PREFIX + "_WEIGHTS_HBM_GIB"
BACKING = PREFIX + "_BACKING"
ALLOW_UNTESTED = PREFIX + "_ALLOW_UNTESTED"
VARIABLES = (PREFIX, KV, WEIGHTS, BACKING, ALLOW_UNTESTED)


def _refusal(name: str, text: str, allowed: str) -> ValueError:
    return ValueError(f"{name} is {text!r}; allowed: {allowed}")


def _bytes_of(name: str, text: str, allowed: str) -> int:
    try:
        gib = float(text)
    except ValueError:
        raise _refusal(name, text, allowed) from None
    if not (math.isfinite(gib) and 0 <= gib < _MAX_GIB):
        raise _refusal(name, text, allowed)
    return int(gib * _GIB)


def _kv_bytes(text: str) -> int | Auto:
    if text.lower() == "auto":
        return "auto"
    return _bytes_of(KV, text, "a number of GiB from 0 up, or 'auto'")


def _weights_hbm_bytes(text: str) -> int | Auto | None:
    if text.lower() == "auto":
        return "auto"
    if text.lower() == "none":
        return None
    return _bytes_of(WEIGHTS, text, "a number of GiB from 0 up, 'auto', or 'none' for no bound")


def _backing(text: str) -> str:
    if text not in BACKINGS:
        raise _refusal(BACKING, text, ", ".join(BACKINGS))
    return text


def _bool(name: str, text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise _refusal(name, text, BOOL_WORDS) from None


# From the variable to its field and how that is parsed.
_PARSERS: dict[str, tuple[str, Callable[[str], object]]] = {
    KV: ("kv_bytes", _kv_bytes),
    WEIGHTS: ("weights_hbm_bytes", _weights_hbm_bytes),
    BACKING: ("backing", _backing),
    ALLOW_UNTESTED: ("allow_untested", functools.partial(_bool, ALLOW_UNTESTED)),
}


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings that the environment makes; an empty value counts as not set.

    Parameters
    ----------
    environ : mapping of str to str
        The environment.

    Returns
    -------
    Settings

    Raises
    ------
    ValueError
        If a value is not allowed or a variable unknown; names the variable, the value and what is
        allowed.
    """
    unknown = sorted(n for n in environ if n.startswith(PREFIX + "_") and n not in VARIABLES)
    if unknown:
        raise ValueError(f"{unknown[0]} is unknown; allowed: {', '.join(VARIABLES)}")
    given = {name: text for name in VARIABLES if (text := environ.get(name, "").strip())}
    if PREFIX in given:
        _bool(PREFIX, given[PREFIX])
    values: dict[str, Any] = {
        field: parse(given[name]) for name, (field, parse) in _PARSERS.items() if name in given
    }
    return Settings(**values)
