"""The stub of the extension names what the extension has."""

from __future__ import annotations

import ast
from pathlib import Path

import egm_alloc
from egm_alloc import _C

STUB = ast.parse((Path(egm_alloc.__file__).parent / "_C.pyi").read_text("utf-8"))


def names(body: list[ast.stmt]) -> set[str]:
    found = {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    return found | {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def public(owner: object) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


def test_stub_names_what_the_extension_has() -> None:
    assert names(STUB.body) == public(_C)
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert names(node.body) == public(getattr(_C, node.name)), node.name
