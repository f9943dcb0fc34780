"""What the vLLM plugin is told: ``EGM_ALLOC_VLLM`` and the settings that begin with it.

Pure: read from a mapping, checked, and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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


def variable(field: str) -> str:
    """Return the environment variable of a setting, such as ``EGM_ALLOC_VLLM_KV_GIB``."""
    return f"{PREFIX}_{field}"


KV, WEIGHTS, BACKING, ALLOW_UNTESTED = map(
    variable, ("KV_GIB", "WEIGHTS_HBM_GIB", "BACKING", "ALLOW_UNTESTED")
)
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


def _bool(name: str, text: str) -> bool:
    try:
        return parse_bool(text)
    except ValueError:
        raise _refusal(name, text, BOOL_WORDS) from None


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
    given = {name: environ.get(name, "").strip() for name in VARIABLES}
    if given[PREFIX]:
        _bool(PREFIX, given[PREFIX])
    if given[BACKING] and given[BACKING] not in BACKINGS:
        raise _refusal(BACKING, given[BACKING], ", ".join(BACKINGS))
    default = Settings()
    return Settings(
        kv_bytes=_kv_bytes(given[KV]) if given[KV] else default.kv_bytes,
        weights_hbm_bytes=(
            _weights_hbm_bytes(given[WEIGHTS]) if given[WEIGHTS] else default.weights_hbm_bytes
        ),
        backing=given[BACKING] or default.backing,
        allow_untested=(
            _bool(ALLOW_UNTESTED, given[ALLOW_UNTESTED]) if given[ALLOW_UNTESTED] else False
        ),
    )
