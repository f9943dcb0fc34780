"""Every virtual of torch's allocator interface is forwarded, by the compiler's own tables."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_backend import cuda_headers, torch_features

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "torch" / "delegating_allocator.h"


def vtable(dump: str, name: str) -> list[str]:
    """Return the entries of a class's vtable from g++ -fdump-lang-class."""
    section = dump.split(f"Vtable for {name}\n", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\d+\s+(?:\(int \(\*\)\(\.\.\.\)\))?(.+)$", section, re.MULTILINE)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("delegation")
    torch_include = Path(torch.__file__).parent / "include"
    features, _ = torch_features.scan(torch_include)
    (folder / torch_features.HEADER_NAME).write_text(torch_features.header(features))
    (folder / "use.cpp").write_text('#include "torch/delegating_allocator.h"\n')
    assert torch.version.cuda is not None
    cuda = cuda_headers.include_folders(
        torch.version.cuda, sys.path, os.environ, platform.machine()
    )
    includes = [f"-I{path}" for path in (ROOT / "csrc", folder, torch_include, *cuda)]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(
        # Compiled, if to nowhere: without code generation there is no vtable to dump.
        [
            "g++",
            "-std=c++20",
            "-w",
            "-O0",
            *includes,
            "-S",
            "-o",
            os.devnull,
            f"-fdump-lang-class={folder / 'classes'}",
            str(folder / "use.cpp"),
        ],
        check=True,
        env=environment,
    )
    return (folder / "classes").read_text()


def test_no_virtual_is_left_to_torchs_default(dump: str) -> None:
    entries = vtable(dump, "egm::DelegatingAllocator")
    functions = [e for e in entries if "::" in e and "~" not in e and "typeinfo" not in e]
    assert len(functions) >= 40, torch.__version__
    left = [e for e in functions if not e.startswith("egm::DelegatingAllocator::")]
    assert left == []


def test_every_method_forwards_to_its_own_name() -> None:
    text = re.sub(r"//.*", "", HEADER.read_text())
    methods = re.findall(r"(\w+)\(([^;{}]*?)\)\s*(?:const\s*)?override\s*\{([^}]*)\}", text)
    assert len(methods) >= 45
    for name, _, body in methods:
        assert re.search(rf"target_->{name}\(", body), f"{name} does not forward to {name}"
