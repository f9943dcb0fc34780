"""``egm-alloc plan``: the model, its agreement with what was measured, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from egm_alloc.cli import main
from egm_alloc.serving import Load, Machine, break_even_link, forecast
from tests.python.processes import run_without_gpu

GIB = 1 << 30
H200 = Machine(4.0e12, 51e9, 500e12, 1.2e-3, 7e-6)
H100 = Machine(3.06e12, 50.3e9, 700e12, 1.2e-3, 7e-6)
# 256 requests of 512 tokens in and 128 out, with a model of 0.85 billion parameters.
LOAD = Load(
    weights_hbm_bytes=1.6 * GIB,
    weights_host_bytes=0,
    bytes_per_weight=2,
    kv_bytes_per_token=32 << 10,
    sequences=256,
    prompt_tokens=512,
    output_tokens=128,
)
GIVEN = ["--hbm-gb-s", "3000", "--link-gb-s", "50", "--tflops", "500"]
WHAT = [
    *("--weights-gib", "1.6", "--kv-bytes-per-token", "32768", "--hbm-kv-gib", "1"),
    *("--sequences", "256", "--prompt", "512", "--output", "128"),
]


@pytest.mark.parametrize(
    ("in_hbm", "on_host", "measured"), [(16, 0, 29206), (1, 0, 14793), (0, 16, 2441)]
)
def test_model_is_in_the_region_of_what_was_measured(
    in_hbm: int, on_host: int, measured: int
) -> None:
    predicted = forecast(H200, LOAD, in_hbm * GIB, on_host * GIB).tokens_per_s
    assert predicted == pytest.approx(measured, rel=0.35)


# vLLM 0.26.0 in one process with CUDA graphs, on an H100; the overheads were fitted to this run.
@pytest.mark.parametrize(
    ("sequences", "in_hbm", "waiting", "extended"),
    [(96, 24705, 17715, 5366), (192, 31768, 16607, 3350), (384, 35262, 16313, 2809)],
)
def test_model_is_near_what_was_measured_with_the_plugin(
    sequences: int, in_hbm: int, waiting: int, extended: int
) -> None:
    load = replace(LOAD, sequences=sequences)
    predicted = [
        forecast(H100, load, hbm * GIB, host * GIB).tokens_per_s
        for hbm, host in ((9, 0), (1, 0), (1, 8))
    ]
    assert predicted == pytest.approx([in_hbm, waiting, extended], rel=0.15)


def test_what_hbm_holds_costs_nothing_more() -> None:
    whole = math.ceil(LOAD.kv_bytes)
    assert forecast(H200, LOAD, whole, 8 * GIB) == forecast(H200, LOAD, whole, 0)
    assert break_even_link(H200, LOAD, whole, GIB) is None


def test_cache_smaller_than_a_sequence_serves_nothing() -> None:
    nothing = forecast(H200, LOAD, 10 << 20, 0)
    assert (nothing.at_once, nothing.tokens_per_s) == (0, 0)
    assert break_even_link(H200, LOAD, 10 << 20, LOAD.kv_bytes) is None


@given(
    in_hbm=st.floats(0.05, 4),
    weights_on_host=st.floats(0, 1.6),
    sequences=st.integers(1, 2000),
    link=st.floats(1e9, 2e12),
)
def test_faster_machines_and_more_hbm_are_never_slower(
    in_hbm: float, weights_on_host: float, sequences: int, link: float
) -> None:
    load = replace(
        LOAD,
        weights_hbm_bytes=(1.6 - weights_on_host) * GIB,
        weights_host_bytes=weights_on_host * GIB,
        sequences=sequences,
    )
    machine = replace(H200, link_bytes_per_s=link)
    base = forecast(machine, load, in_hbm * GIB, 64 * GIB).tokens_per_s
    slack = 1 + 1e-9
    faster_link = replace(machine, link_bytes_per_s=2 * link)
    assert forecast(faster_link, load, in_hbm * GIB, 64 * GIB).tokens_per_s * slack >= base
    assert forecast(machine, load, 2 * in_hbm * GIB, 64 * GIB).tokens_per_s * slack >= base
    in_hbm_only = replace(load, weights_hbm_bytes=1.6 * GIB, weights_host_bytes=0)
    assert forecast(machine, in_hbm_only, in_hbm * GIB, 64 * GIB).tokens_per_s * slack >= base


@pytest.mark.parametrize("host", [0.5 * GIB, LOAD.kv_bytes])
def test_at_the_break_even_link_both_ways_are_alike(host: float) -> None:
    link = break_even_link(H200, LOAD, 1 * GIB, host)
    assert link is not None
    machine = replace(H200, link_bytes_per_s=link)
    extend = forecast(machine, LOAD, 1 * GIB, host)
    wait = forecast(machine, LOAD, 1 * GIB, 0)
    assert extend.tokens_per_s == pytest.approx(wait.tokens_per_s, rel=1e-6)
    assert extend.at_once > wait.at_once > 0


def test_table_names_the_better_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHAT, *GIVEN]) == 0
    said = capsys.readouterr().out
    assert "For throughput waiting is faster here." in said
    assert "HBM 3000 GB/s, link 50.0 GB/s, 500 TFLOP/s" in said
    assert "SIMULATED" not in said
    assert main(["plan", *WHAT, *GIVEN, "--link-gb-s", "900"]) == 0
    assert "For throughput extending is faster here." in capsys.readouterr().out
    assert main(["plan", *WHAT, *GIVEN, "--hbm-kv-gib", "0"]) == 0
    assert "extending is the only way" in capsys.readouterr().out
    assert main(["plan", *WHAT, *GIVEN, "--hbm-kv-gib", "0", "--host-kv-gib", "0"]) == 0
    assert "more KV cache than HBM and the host have" in capsys.readouterr().out
    assert main(["plan", *WHAT, *GIVEN, "--hbm-kv-gib", "100"]) == 0
    assert "nothing is to be extended" in capsys.readouterr().out
    assert main(["plan", *WHAT, *GIVEN, "--host-kv-gib", "0"]) == 0
    assert "too small to hold one more sequence" in capsys.readouterr().out


def test_json_has_what_went_in_and_what_came_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHAT, *GIVEN, "--hbm-kv-gib", "0", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["wait"] == {
        "at_once": 0,
        "step_s": None,
        "tokens_per_s": 0.0,
        "kv_host_bytes": 0.0,
    }
    assert figures["extend"]["at_once"] == 256
    assert figures["machine"]["link_bytes_per_s"] == 50e9
    assert figures["simulated"] is False
    assert figures["break_even_link_bytes_per_s"] is None


@pytest.mark.simulated
def test_speeds_that_are_not_given_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHAT, "--tflops", "500"]) == 0
    assert "SIMULATED device: these speeds mean nothing." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights-gib", "-1"], "weights_gib is '-1'; allowed: a number above 0"),
        (["--link-gb-s", "nan"], "link_gb_s is 'nan'; allowed: a number above 0"),
        (["--hbm-kv-gib", "x"], "hbm_kv_gib is 'x'; allowed: a number from 0 up"),
        (["--sequences", "0"], "sequences is '0'; allowed: a whole number above 0"),
        (["--prompt", "1.5"], "prompt is '1.5'; allowed: a whole number above 0"),
        (["--step-overhead-ms", "inf"], "step_overhead_ms is 'inf'; allowed: a number from 0 up"),
    ],
)
def test_bad_number_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *WHAT, *GIVEN, *arguments])
    assert sentence in capsys.readouterr().err


def test_more_weights_on_the_host_than_there_are_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *WHAT, *GIVEN, "--host-weights-gib", "2"]) == 1
    assert "host_weights_gib is 2; allowed: up to weights_gib, which is 1.6" in (
        capsys.readouterr().err
    )


def test_given_speeds_need_no_gpu_and_missing_ones_do() -> None:
    script = "import sys; from egm_alloc.cli import main; sys.exit(main(['plan', *sys.argv[1:]]))"
    call = f"import sys; sys.argv = ['plan', *{[*WHAT, *GIVEN]!r}]; {script}"
    done = run_without_gpu(call, EGM_ALLOC_AUTO_ENABLE="0")
    assert done.returncode == 0, done.stderr
    call = f"import sys; sys.argv = ['plan', *{WHAT!r}]; {script}"
    done = run_without_gpu(call, EGM_ALLOC_AUTO_ENABLE="0")
    assert done.returncode == 1
    assert done.stderr.startswith("egm-alloc plan: egm_alloc needs a CUDA GPU")
    assert "nothing is measured if --hbm-gb-s, --link-gb-s and --tflops are given" in done.stderr


@pytest.mark.simulated
def test_arithmetic_that_is_simulated_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WHAT, "--hbm-gb-s", "3000", "--link-gb-s", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True


def test_no_link_is_named_where_one_way_is_faster_over_any() -> None:
    load = Load(
        weights_hbm_bytes=0,
        weights_host_bytes=10 * GIB,
        bytes_per_weight=2,
        kv_bytes_per_token=128 << 10,
        sequences=64,
        prompt_tokens=1000,
        output_tokens=500,
    )
    assert break_even_link(H200, load, 5 * GIB, 100 * GIB) is None
