"""Reads off torch's headers which virtual functions its CUDA allocator has, and what they take.

A vendor's torch need not declare what the release of the same number does, so the headers decide,
not the version. `scan` yields the macros that ``csrc/torch/delegating_allocator.h`` asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from build_backend.stop import BuildStop

HEADER_NAME = "egm_alloc_torch_features.h"

# The classes from which the allocator inherits, and where torch declares them.
_CLASSES = {
    "Allocator": "c10/core/Allocator.h",
    "DeviceAllocator": "c10/core/CachingDeviceAllocator.h",
    "CUDAAllocator": "c10/cuda/CUDACachingAllocator.h",
}

# Virtuals that every supported torch declares (read off 2.11.0 to 2.15.0).
_ALWAYS = frozenset(
    re.findall(
        r"\w+",
        """
        allocate is_simple_data_ptr raw_deleter copy_data
        initialized emptyCache recordStream getDeviceStats resetAccumulatedStats resetPeakStats
        getMemoryInfo
        raw_alloc raw_alloc_with_stream raw_delete init getMemoryFraction setMemoryFraction
        getExpandableSegmentSizes enable isEnabled cacheInfo getBaseAllocation snapshot
        beginAllocateToPool endAllocateToPool releasePool getPoolUseCount createOrIncrefPool
        setUseOnOOM setNoSplit checkPoolLiveAllocations shareIpcHandle getIpcDevPtr
        isHistoryEnabled recordHistory recordAnnotation pushCompileContext popCompileContext
        setUserMetadata getUserMetadata attachOutOfMemoryObserver attachAllocatorTraceTracker
        enablePeerAccess memcpyAsync getCheckpointState setCheckpointPoolState name
        """,
    )
)

# Virtuals that only some declare, and what the macros call them.
OPTIONAL = {
    "attachOomRejectionObserver": "ATTACH_OOM_REJECTION_OBSERVER",  # 2.12
    "getContextForPointer": "GET_CONTEXT_FOR_POINTER",  # 2.12
    "markCaptureBegin": "MARK_CAPTURE_BEGIN",  # 2.13
    "markCaptureEnd": "MARK_CAPTURE_END",  # 2.13
    "allocateWithAddress": "ALLOCATE_WITH_ADDRESS",  # 2.13
    "supportsUserMetadata": "SUPPORTS_USER_METADATA",  # 2.14
    "annotateMemory": "ANNOTATE_MEMORY",  # 2.14
}

# Virtuals that a vendor's development version of 2.11 may still declare as 2.10.0 does: the type
# that only newer declarations name, and what the macros call it.
CHANGED = {
    "snapshot": ("bool", "SNAPSHOT_INCLUDE_TRACES"),
    "recordHistory": ("vector", "RECORD_HISTORY_SKIP_ACTIONS"),
    "setUseOnOOM": ("bool", "SET_USE_ON_OOM_VALUE"),
    "createOrIncrefPool": ("shared_ptr", "SHARED_POOL_ALLOCATORS"),
}


def _without_comments(text: str) -> str:
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', text)
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)


def _declarations(body: str) -> Iterator[str]:
    """Split a class body into declarations, each without the function body that may follow it."""
    start = parentheses = braces = 0
    for at, character in enumerate(body):
        if character in "()":
            parentheses += 1 if character == "(" else -1
        elif parentheses:
            continue  # a default argument may hold braces
        elif character == "{":
            if braces == 0:
                yield body[start:at]
            braces += 1
        elif character == "}":
            if braces == 0:
                return  # the end of the class
            braces -= 1
            start = at + 1
        elif character == ";" and braces == 0:
            yield body[start:at]
            start = at + 1


def _name(declaration: str) -> str | None:
    """Return the name before the parameter list, which templates in the return type may precede."""
    angles = 0
    for at, character in enumerate(declaration):
        angles += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and angles == 0:
            match = re.search(r"(~?\w+)\s*$", declaration[:at])
            return match[1] if match else None
    return None


def virtuals(text: str, class_name: str) -> dict[str, str]:
    """List the virtual functions that a class declares itself.

    Parameters
    ----------
    text : str
        The header.
    class_name : str
        The class. Destructors and overrides without the word virtual are left out.

    Returns
    -------
    dict of str to str
        For each name, its declaration. Empty if the header does not define the class.
    """
    text = _without_comments(text)
    head = re.search(rf"\b(?:class|struct)\s+(?:\w+\s+)?{class_name}\s*(?::[^{{;]*)?\{{", text)
    found: dict[str, str] = {}
    for declaration in _declarations(text[head.end() :]) if head else ():
        name = _name(declaration)
        if re.search(r"\bvirtual\b", declaration) and name and not name.startswith("~"):
            found[name] = declaration
    return found


def scan(include: Path) -> tuple[dict[str, bool], list[str]]:
    """Find out which optional virtuals a torch declares, and how it declares those that changed.

    Parameters
    ----------
    include : Path
        The folder of torch's headers.

    Returns
    -------
    features : dict of str to bool
        For each macro (without prefix), whether the virtual is there or takes what newer ones do.
    unknown : list of str
        Virtuals with a default that egm_alloc does not forward, as ``Class::name``.

    Raises
    ------
    BuildStop
        If a header is missing, if torch lacks a virtual that egm_alloc overrides, or if it has a
        pure one that egm_alloc does not know.
    """
    declared: dict[str, str] = {}
    unknown: list[str] = []
    for class_name, path in _CLASSES.items():
        try:
            text = (include / path).read_text(encoding="utf-8")
        except OSError:
            raise BuildStop(f"this torch has no header {include / path}") from None
        for name, declaration in virtuals(text, class_name).items():
            declared[name] = declaration
            if name in _ALWAYS or name in OPTIONAL:
                continue
            if re.search(r"=\s*0\s*$", declaration):
                raise BuildStop(
                    f"this torch declares {class_name}::{name}, which egm_alloc does not know yet"
                )
            unknown.append(f"{class_name}::{name}")
    missing = sorted(_ALWAYS - declared.keys())
    if missing:
        raise BuildStop(
            f"this torch does not declare {', '.join(missing)}, which egm_alloc overrides"
        )
    features = {macro: name in declared for name, macro in OPTIONAL.items()}
    features |= {macro: kind in declared[name] for name, (kind, macro) in CHANGED.items()}
    return features, unknown


def header(features: dict[str, bool]) -> str:
    """Write features as a C++ header.

    Parameters
    ----------
    features : dict of str to bool
        As from `scan`.

    Returns
    -------
    str
        The header's text.
    """
    lines = ["// Generated from torch's headers when the extension is built.", "#pragma once", ""]
    lines += [f"#define EGM_ALLOC_TORCH_HAS_{name} {int(has)}" for name, has in features.items()]
    return "\n".join(lines) + "\n"
