"""What a configuration may hold, and what it makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egm_alloc import Config
from tests.python.bad_values import BAD_VALUES

GIB = 1 << 30


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Config()) == {
        "threshold_gib": 2.0,
        "device": "all",
        "mode": "tiered",
        "backing": "managed",
        "preferred_location": "device",
        "accessed_by": ("host",),
        "prefetch": True,
        "limit_gib": None,
        "device_fraction": 0.5,
        "spill": True,
        "host_reserve_gib": None,
    }


@pytest.mark.parametrize(("field", "value", "error"), BAD_VALUES)
def test_bad_value_is_refused_by_name(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Config(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert "allowed: " in message
    assert "\n" not in message


@pytest.mark.parametrize(("field", "value", "error"), BAD_VALUES)
def test_message_shows_the_value(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Config(**{field: value})
    if value != 10**400:
        shown = repr(value[-1]) if isinstance(value, list) and value else repr(value)
        assert shown in str(caught.value)


@pytest.mark.parametrize("elements", [1, 2])
def test_zeros_that_are_no_number_are_no_reserve(elements: int) -> None:
    zeros: Any = torch.zeros(elements)
    with pytest.raises(TypeError, match=r"^host_reserve_gib is tensor\(.*; allowed: "):
        Config(host_reserve_gib=zeros)


def test_mode_managed_needs_backing_managed() -> None:
    with pytest.raises(ValueError, match=r"backing is 'device'; allowed: 'managed' in mode"):
        Config(mode="managed", backing="device")
    assert Config(mode="managed").backing == "managed"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("all", "all"),
        (1, (1,)),
        ("cuda:1", (1,)),
        (torch.device("cuda", 1), (1,)),
        ([1, "cuda:0"], (0, 1)),
        (range(3), (0, 1, 2)),
        (torch.device("cuda:127"), (127,)),
    ],
)
def test_device_is_kept_as_indices(value: Any, kept: object) -> None:
    assert Config(device=value).device == kept


def test_devices_lists_indices_or_means_all() -> None:
    assert Config().devices is None
    assert Config(device=(1, 0)).devices == [0, 1]


@pytest.mark.parametrize("value", [(), [], ("host",), ["host", "device"], ("device", "host")])
def test_accessed_by_is_kept_sorted(value: Any) -> None:
    assert Config(accessed_by=value).accessed_by == tuple(sorted(value))


def test_equal_configurations_are_equal() -> None:
    assert Config(device="cuda:1", accessed_by=["host"]) == Config(device=(1,))  # type: ignore[arg-type]


def test_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().mode = "managed"  # type: ignore[misc]


@given(st.floats(min_value=0, max_value=2.0**33, exclude_min=True, exclude_max=True))
def test_every_number_in_range_is_a_threshold_of_whole_bytes(gib: float) -> None:
    config = Config(threshold_gib=gib, limit_gib=gib)
    assert 1 <= config.threshold_bytes <= 2**63
    assert config.threshold_bytes - 1 < Fraction(gib) * GIB <= config.threshold_bytes
    assert config.limit_bytes == config.threshold_bytes


@given(st.integers(min_value=1, max_value=2**33 - 1))
def test_whole_gib_convert_exactly(gib: int) -> None:
    assert Config(threshold_gib=gib).threshold_bytes == gib * GIB


@given(st.floats().filter(lambda x: not 0 < x < 2.0**33))
def test_every_number_out_of_range_is_refused(gib: float) -> None:
    with pytest.raises(ValueError, match=r"^threshold_gib is "):
        Config(threshold_gib=gib)


@given(
    st.one_of(
        st.none(),
        st.text(),
        st.binary(),
        st.complex_numbers(),
        st.lists(st.integers()),
        st.dictionaries(st.text(), st.text()),
    ),
    st.sampled_from([field.name for field in dataclasses.fields(Config)]),
)
def test_no_value_raises_anything_else(value: Any, field: str) -> None:
    # Anything but these errors fails the test.
    with contextlib.suppress(TypeError, ValueError):
        Config(**{field: value})


def test_tiny_threshold_is_one_byte() -> None:
    assert Config(threshold_gib=1e-300).threshold_bytes == 1
    assert math.isfinite(Config(threshold_gib=1e-300).threshold_gib)


def test_enumerations_of_texts_are_kept_as_texts() -> None:
    class Word(str, enum.Enum):
        TIERED = "tiered"
        PINNED = "pinned"
        HOST = "host"

    config = Config(
        mode=Word.TIERED,
        backing=Word.PINNED,
        preferred_location=Word.HOST,
        accessed_by=(Word.HOST,),
    )
    kept = (config.mode, config.backing, config.preferred_location, *config.accessed_by)
    assert kept == ("tiered", "pinned", "host", "host")
    assert {type(word) for word in kept} == {str}
