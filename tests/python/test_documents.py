"""The documents say what the code does."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import egm_alloc
from egm_alloc.vllm.settings import VARIABLES, from_environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_lists_every_field_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE)
    documented = {field: ast.literal_eval(default) for field, default in rows}
    assert documented == dataclasses.asdict(egm_alloc.Config())


def test_readme_names_only_what_exists() -> None:
    for name in re.findall(r"egm_alloc\.(\w+)\(", README):
        assert name in egm_alloc.__all__, name


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_public_functions_are_documented() -> None:
    for name in egm_alloc.__all__:
        if not name.startswith("_"):
            assert getattr(egm_alloc, name).__doc__, name


def test_vllm_document_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "docs/vllm.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(EGM_ALLOC_VLLM\w*)` \|([^|]*)\|", text, re.MULTILINE))
    assert list(rows) == list(VARIABLES)
    given = {name: default.strip(" `") for name, default in rows.items() if default.strip()}
    assert from_environment(given) == from_environment({})
