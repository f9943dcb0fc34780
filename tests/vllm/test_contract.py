"""What of vLLM's source the plugin relies on, and the table of versions that have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from egm_alloc.vllm import contract, source
from egm_alloc.vllm.plugin import CHECKS, KV_CACHE, WEIGHTS


def test_every_version_of_the_table_holds() -> None:
    table = contract.table()
    assert {version.rsplit(".", 1)[0] for version in table} == {f"0.{n}" for n in range(20, 34)}
    problems = [
        (version, target, entry["problem"])
        for version, targets in table.items()
        for target, entry in targets.items()
        if entry["problem"] is not None
    ]
    assert problems == []


def test_every_need_is_in_the_table_and_every_patch_is_a_need() -> None:
    for version, targets in contract.table().items():
        for need in (*contract.CHECKS, *contract.WEIGHTS, *contract.KV_CACHE):
            assert targets[need.target]["sha256"], (version, need.target)
    for part in (CHECKS, WEIGHTS, KV_CACHE):
        assert {patch.target for patch in part.patches} <= {need.target for need in part.needs}


def reader(**modules: str) -> Callable[[str], str | None]:
    """Return what reads modules given as ``a_b="text"`` for ``a.b``."""
    return lambda name: modules.get(name.replace(".", "_"))


def test_version_source_and_names_decide_whether_a_need_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "class C:\n    @decorated\n    def f(self, x): return x.size\n"
    need = contract.Need("m:C.f", ("x",), ("size",))
    found = source.find(text, "C.f")
    assert found is not None
    monkeypatch.setattr(contract, "TABLE", tmp_path / "table.json")
    (tmp_path / "table.json").write_text(
        json.dumps({"1.0": {"m:C.f": {"sha256": found.sha256, "problem": None}}})
    )

    def why_not(module: str, version: str = "1.0", allow_untested: bool = False) -> str | None:
        return contract.why_not((need,), reader(m=module), version, allow_untested)

    assert why_not(text) is None
    assert why_not(text, "1.0+cu130") is None
    assert "vLLM 1.1 was not checked" in str(why_not(text, "1.1"))
    assert why_not(text, "1.1", allow_untested=True) is None
    changed = text.replace("x.size", "2 * x.size")
    assert "is not what vLLM 1.0 was checked with" in str(why_not(changed))
    assert why_not(changed, allow_untested=True) is None
    assert why_not(text.replace("size", "bytes"), allow_untested=True) == "m:C.f has no size"
    assert why_not(text.replace("x", "y"), allow_untested=True) == "m:C.f has no x"
    assert why_not("class C: pass", allow_untested=True) == "m:C.f is not there"


def test_source_of_a_function_is_its_text_with_decorators() -> None:
    text = "def f(): pass\nclass A:\n  @d\n  def f(self, a, /, b=1, *c, e, **g):\n    h.i(j=1)\n"
    found = source.find(text, "A.f")
    assert found is not None
    assert found.parameters == ("self", "a", "b", "*c", "e", "**g")
    assert {"h", "i", "j", "d"} <= found.names
    moved = source.find("\n\n" + text, "A.f")
    assert moved is not None
    assert moved.sha256 == found.sha256
    assert source.find(text, "A.g") is None
    assert source.find(text, "A.f.x") is None


def test_later_versions_go_by_what_the_driver_says_is_free() -> None:
    older = "class MemoryProfilingResult:\n    non_torch_increase: int = 0\n"
    assert contract.takes_reserved_off(lambda _: older)
    assert not contract.takes_reserved_off(lambda _: older + "    total_consumed: int = 0\n")
