"""Tests on a real GPU. They hold little managed memory: an over-committed GPU can hang."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import egm_alloc
from tests.backings.conftest import backing, skip_beyond_budget

__all__ = ["backing"]

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def budget() -> Callable[[int], None]:
    """Skip a test whose managed memory would be more than half of what the card has free."""
    return skip_beyond_budget


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Start switched on with a low threshold and defaults; end with nothing extended left."""
    import dataclasses

    fields = {**dataclasses.asdict(egm_alloc.Config()), "threshold_gib": 0.25}
    egm_alloc.enable(**fields)
    yield
    egm_alloc.disable()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert egm_alloc.stats().extended_tier.reserved_bytes == 0, "a test left an extended segment"


def run_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh Python process and require that it succeeds in silence."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result
