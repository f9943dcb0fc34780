"""The PEP 517 and PEP 660 hooks: setuptools' own, with the torch that is there in view.

pip, isolated or not, builds against the torch of the target environment. torch is never named as
a build requirement, so that no build downloads one or replaces the one that is there.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

from setuptools import build_meta

from build_backend import cuda_headers, target_torch
from build_backend.stop import BuildStop

ConfigSettings: TypeAlias = Mapping[str, Any] | None

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def _target() -> target_torch.TargetTorch:
    if not sys.platform.startswith("linux"):
        raise BuildStop(f"only Linux is supported, and this is {platform.system()}")
    torch = target_torch.find()
    if torch is None:
        raise BuildStop(target_torch.absence())
    problem = target_torch.problem(torch)
    if problem is not None:
        raise BuildStop(problem)
    return torch


def _missing_headers() -> list[str]:
    torch = _target()
    assert torch.cuda is not None  # _target has checked it
    _, missing = cuda_headers.find(
        torch.cuda, [*torch.search_path, *sys.path], os.environ, platform.machine()
    )
    return missing


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Return the headers that neither toolkit nor packages have, and setuptools' requirements."""
    return [*_missing_headers(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """Return the same as for a wheel."""
    return [*_missing_headers(), *build_meta.get_requires_for_build_editable(config_settings)]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    """Write the metadata, if the torch that is there fits: else pip would look for one that does.

    Without isolation this is the first hook that pip calls.
    """
    _target()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    """Do the same as for a wheel."""
    _target()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel for the torch of the target environment."""
    target_torch.expose(_target().search_path)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build in place, for the torch of the target environment."""
    target_torch.expose(_target().search_path)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
