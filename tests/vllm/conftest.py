"""What the tests of the plugin share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.fake_package import write_vllm


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A folder with a package ``vllm``."""
    write_vllm(tmp_path)
    return tmp_path
