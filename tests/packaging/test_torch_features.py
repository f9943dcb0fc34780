from __future__ import annotations

import re
from pathlib import Path

import pytest

from build_backend import target_torch, torch_features
from build_backend.stop import BuildStop

_HEADER = "c10/cuda/CUDACachingAllocator.h"


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A copy of the headers of the torch in use, to be changed by a test."""
    torch = target_torch.describe()
    assert torch is not None
    for path in torch_features._CLASSES.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((torch.include / path).read_text())
    return tmp_path


def declare(include: Path, declaration: str) -> None:
    """Add a declaration to the class CUDAAllocator."""
    text = (include / _HEADER).read_text()
    head = "class CUDAAllocator : public DeviceAllocator {\n public:\n"
    assert head in text
    (include / _HEADER).write_text(text.replace(head, head + declaration))


def test_virtuals_are_read_with_what_surrounds_them() -> None:
    text = """
    class Allocator;
    struct C10_API Allocator : public Base<int> {
      virtual ~Allocator() = default;
      // virtual void in_a_comment() = 0;
      virtual std::function<void(int)> with_template(Id id = {0, 0}, bool b = true) = 0;
      virtual void with_body() { if (true) { call("}"); } }
      virtual double qualified() const = 0;
      void inherited() override { virtual_looking(); }
      enum { kNothing };
    };
    struct Other { virtual void elsewhere() = 0; };
    """
    found = torch_features.virtuals(text, "Allocator")
    assert set(found) == {"with_template", "with_body", "qualified"}
    assert torch_features.virtuals(text, "Absent") == {}


def test_features_of_the_torch_in_use_are_those_of_its_version() -> None:
    torch = target_torch.describe()
    assert torch is not None
    assert torch.minor is not None
    since = {
        "ATTACH_OOM_REJECTION_OBSERVER": 12,
        "GET_CONTEXT_FOR_POINTER": 12,
        "MARK_CAPTURE_BEGIN": 13,
        "MARK_CAPTURE_END": 13,
        "ALLOCATE_WITH_ADDRESS": 13,
        "SUPPORTS_USER_METADATA": 14,
        "ANNOTATE_MEMORY": 14,
    }
    since |= {macro: 11 for _, macro in torch_features.CHANGED.values()}
    features, unknown = torch_features.scan(torch.include)
    assert features == {name: torch.minor >= (2, minor) for name, minor in since.items()}
    assert unknown == []


def test_headers_decide_not_the_version(include: Path) -> None:
    before, _ = torch_features.scan(include)
    text = (include / _HEADER).read_text()
    if before["MARK_CAPTURE_END"]:
        text = re.sub(r"virtual void markCaptureEnd\([^)]*\) \{\}", "", text)
        (include / _HEADER).write_text(text)
    else:
        declare(include, "virtual void markCaptureEnd(c10::DeviceIndex /*device*/) {}\n")
    after, _ = torch_features.scan(include)
    assert after == before | {"MARK_CAPTURE_END": not before["MARK_CAPTURE_END"]}


def test_unknown_pure_virtual_ends_the_build(include: Path) -> None:
    declare(include, "virtual int newlyInvented(size_t n) = 0;\n")
    with pytest.raises(BuildStop) as stop:
        torch_features.scan(include)
    assert str(stop.value) == (
        "egm_alloc: this torch declares CUDAAllocator::newlyInvented, which egm_alloc does not "
        "know yet"
    )


def test_unknown_virtual_with_a_default_is_reported(include: Path) -> None:
    declare(include, "virtual int newlyInvented(size_t n) { return 0; }\n")
    assert torch_features.scan(include)[1] == ["CUDAAllocator::newlyInvented"]


def test_missing_virtual_ends_the_build(include: Path) -> None:
    text = (include / _HEADER).read_text()
    (include / _HEADER).write_text(text.replace("virtual std::string name() = 0;", ""))
    with pytest.raises(BuildStop, match="does not declare name, which egm_alloc overrides"):
        torch_features.scan(include)


@pytest.mark.parametrize(
    ("name", "newer", "older"),
    [
        ("snapshot", r",\s*bool \w+ = true", ""),
        ("recordHistory", r",\s*const std::vector<std::string>& \w+", ""),
        ("setUseOnOOM", r",\s*bool \w+", ""),
        ("createOrIncrefPool", r"std::shared_ptr<CUDAAllocator>", "CUDAAllocator*"),
    ],
)
def test_signature_of_an_older_development_version_is_told_apart(
    include: Path, name: str, newer: str, older: str
) -> None:
    before, _ = torch_features.scan(include)
    text = (include / _HEADER).read_text()
    text, changed = re.subn(rf"(virtual \w+ {name}\([^;]*?){newer}", rf"\g<1>{older}", text)
    assert changed == 1
    (include / _HEADER).write_text(text)
    after, unknown = torch_features.scan(include)
    _, macro = torch_features.CHANGED[name]
    assert before[macro]
    assert after == before | {macro: False}
    assert unknown == []


def test_missing_header_ends_the_build(include: Path) -> None:
    (include / _HEADER).unlink()
    with pytest.raises(BuildStop, match=r"this torch has no header .*CUDACachingAllocator.h"):
        torch_features.scan(include)


def test_generated_header_defines_every_macro() -> None:
    text = torch_features.header({"ONE": True, "OTHER": False})
    assert "#define EGM_ALLOC_TORCH_HAS_ONE 1\n" in text
    assert "#define EGM_ALLOC_TORCH_HAS_OTHER 0\n" in text
