"""Each folder of csrc/ includes only those above it; read off the sources, no compiler needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LAYERS = ["core", "cuda", "c_api", "torch", "bindings"]
ALLOWED = {
    "core": {"core"},
    "cuda": {"core", "cuda"},
    "c_api": {"core", "cuda", "c_api"},
    "torch": {"core", "cuda", "c_api", "torch"},
    "bindings": {"core", "cuda", "c_api", "torch", "bindings"},
}
CUDA_HEADERS = re.compile(r"^(cuda|driver_types)[\w.]*\.h$")
TORCH_HEADERS = re.compile(r"^(c10|ATen|torch|pybind11)/")
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp"})


def includes(source: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#\s*include\s+(["<])([^">]+)[">]', source.read_text(), re.MULTILINE)


def test_every_folder_is_a_known_layer() -> None:
    assert sorted(p.name for p in CSRC.iterdir() if p.is_dir()) == sorted(LAYERS)
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_layer_includes_only_those_above_it(source: Path) -> None:
    layer = source.relative_to(CSRC).parts[0]
    for bracket, header in includes(source):
        if bracket == '"':
            assert (CSRC / header).exists(), f"{header} is not a path from csrc/"
            assert header.split("/")[0] in ALLOWED[layer], f"{layer}/ must not include {header}"
        if layer == "core":
            assert not CUDA_HEADERS.match(header), f"core/ must not include {header}"
        if layer in {"core", "cuda", "c_api"}:
            assert not TORCH_HEADERS.match(header), f"{layer}/ must not include {header}"
        if layer != "bindings":
            assert not header.startswith(("pybind11/", "torch/extension"))
            assert header != "Python.h"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_library_neither_exits_nor_prints_nor_reads_the_environment(source: Path) -> None:
    text = re.sub(r"//.*|/\*.*?\*/", "", source.read_text())
    found = set(
        re.findall(
            r"\b(?:std::)?(secure_getenv|getenv|exit|_exit|quick_exit|abort|terminate|f?printf|puts|perror)\s*\(",
            text,
        )
    )
    found |= set(re.findall(r"\bstd::(?:cerr|cout|clog)\b", text))
    if source.relative_to(CSRC).parts[0] == "c_api":
        found.discard("fprintf")  # the exported pair has no Python to warn through
    assert not found
