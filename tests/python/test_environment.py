"""How the configuration is spelled in the environment."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egm_alloc import Config
from egm_alloc.config import FIELDS
from egm_alloc.environment import (
    from_environment,
    known_variables,
    parse_bool,
    unknown_variables,
    values_from_environment,
)


def test_silent_environment_means_the_defaults() -> None:
    assert from_environment({}) == Config()


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("THRESHOLD_GIB", "0.5", Config(threshold_gib=0.5)),
        ("THRESHOLD_GIB", " 3 ", Config(threshold_gib=3)),
        ("DEVICE", "all", Config()),
        ("DEVICE", "1", Config(device=1)),  # type: ignore[arg-type]
        ("DEVICE", "0, 1", Config(device=(0, 1))),
        ("DEVICE", "cuda:1,0", Config(device=(0, 1))),
        ("MODE", "managed", Config(mode="managed")),
        ("BACKING", "device", Config(backing="device")),
        ("PREFERRED_LOCATION", "host", Config(preferred_location="host")),
        ("PREFERRED_LOCATION", "none", Config(preferred_location=None)),
        ("ACCESSED_BY", "none", Config(accessed_by=())),
        ("ACCESSED_BY", "host, device", Config(accessed_by=("device", "host"))),
        ("PREFETCH", "0", Config(prefetch=False)),
        ("PREFETCH", "True", Config()),
        ("LIMIT_GIB", "12.5", Config(limit_gib=12.5)),
        ("HOST_RESERVE_GIB", "0", Config(host_reserve_gib=0)),
        ("HOST_RESERVE_GIB", "none", Config(host_reserve_gib=None)),
        ("LIMIT_GIB", "none", Config()),
        ("DEVICE_FRACTION", "0.25", Config(device_fraction=0.25)),
        ("SPILL", "0", Config(spill=False)),
    ],
)
def test_variable_sets_its_field(variable: str, text: str, expected: Config) -> None:
    assert from_environment({f"EGM_ALLOC_{variable}": text}) == expected


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("THRESHOLD_GIB", ""),
        ("THRESHOLD_GIB", "two"),
        ("THRESHOLD_GIB", "0"),
        ("THRESHOLD_GIB", "-1"),
        ("THRESHOLD_GIB", "nan"),
        ("THRESHOLD_GIB", "1e400"),
        ("THRESHOLD_GIB", "2GiB"),
        ("DEVICE", ""),
        ("DEVICE", "0,0"),
        ("DEVICE", "-1"),
        ("DEVICE", "0,"),
        ("DEVICE", "cpu"),
        ("DEVICE", "all,0"),
        ("MODE", "Managed"),
        ("BACKING", "hbm"),
        ("PREFERRED_LOCATION", "gpu"),
        ("ACCESSED_BY", ""),
        ("ACCESSED_BY", "host,host"),
        ("ACCESSED_BY", "cpu"),
        ("PREFETCH", "2"),
        ("PREFETCH", ""),
        ("LIMIT_GIB", "0"),
        ("LIMIT_GIB", "unlimited"),
        ("HOST_RESERVE_GIB", "-1"),
        ("HOST_RESERVE_GIB", "5%"),
        ("DEVICE_FRACTION", "1.5"),
        ("DEVICE_FRACTION", "half"),
        ("SPILL", "no way"),
    ],
)
def test_bad_variable_is_refused_by_name(variable: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^EGM_ALLOC_{variable} is .*allowed: "):
        from_environment({f"EGM_ALLOC_{variable}": text})


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("THRESHOLD_GIB", "-1", "a number of GiB above 0 and below "),
        ("DEVICE", "0,0", "all, or indices of CUDA devices, each once, such as 1 or 0,1"),
        ("DEVICE", "cpu", "all, or indices of CUDA devices, each once, such as 1 or 0,1"),
        ("MODE", "Managed", "tiered, managed"),
        ("BACKING", "hbm", "managed, device, pinned, numa, split, auto"),
        ("PREFERRED_LOCATION", "gpu", "device, host or none"),
        ("ACCESSED_BY", "", "device, host, both (device,host) or none"),
        ("ACCESSED_BY", "host,host", "device, host, both (device,host) or none"),
        ("HOST_RESERVE_GIB", "-1", "a number of GiB above 0 and below "),
    ],
)
def test_message_shows_the_text_and_the_forms_of_the_environment(
    variable: str, text: str, allowed: str
) -> None:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        from_environment({f"EGM_ALLOC_{variable}": text})
    message = str(caught.value)
    assert message.startswith(f"EGM_ALLOC_{variable} is {text!r}; allowed: {allowed}")
    assert "None" not in message


def test_contradicting_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="backing is 'device'"):
        from_environment({"EGM_ALLOC_MODE": "managed", "EGM_ALLOC_BACKING": "device"})


def test_skipped_field_is_not_even_parsed() -> None:
    environ = {"EGM_ALLOC_THRESHOLD_GIB": "two", "EGM_ALLOC_PREFETCH": "0"}
    assert values_from_environment(environ, skip={"threshold_gib"}) == {"prefetch": False}


def test_every_field_has_a_variable() -> None:
    assert known_variables() == [
        *(f"EGM_ALLOC_{field.upper()}" for field in FIELDS),
        "EGM_ALLOC_AUTO_ENABLE",
    ]


def test_unknown_variables_are_found() -> None:
    environ = dict.fromkeys([*known_variables(), "EGM_ALLOC_TRESHOLD_GIB", "EGM_OTHER"], "1")
    assert unknown_variables(environ) == ["EGM_ALLOC_TRESHOLD_GIB"]


@given(st.text(), st.sampled_from(FIELDS))
def test_no_text_raises_anything_but_a_value_error(text: str, field: str) -> None:
    name = f"EGM_ALLOC_{field.upper()}"
    with contextlib.suppress(ValueError):
        from_environment({name: text})


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_parse_bool_true(text: str) -> None:
    assert parse_bool(text)


@pytest.mark.parametrize("text", ["0", "False", "no", "OFF"])
def test_parse_bool_false(text: str) -> None:
    assert not parse_bool(text)
