"""The plugin's settings: how they are spelled, what is refused, what is refused together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from egm_alloc.environment import unknown_variables
from egm_alloc.vllm.checks import check
from egm_alloc.vllm.settings import VARIABLES, Settings, from_environment
from tests.simulator import sim
from tests.simulator.host import write_host
from tests.vllm.fakes import GIB, vllm_config


def of(**values: str) -> Settings:
    """Return the settings of variables given without their prefix."""
    return from_environment({f"EGM_ALLOC_VLLM_{name}": text for name, text in values.items()})


def test_settings_are_the_defaults_unless_given() -> None:
    assert from_environment({"EGM_ALLOC_VLLM": "1", "HOME": "/"}) == Settings(
        0, "auto", "auto", False
    )


def test_settings_are_read_in_gib() -> None:
    assert of(KV_GIB="1.5").kv_bytes == 3 * GIB // 2
    assert of(KV_GIB="auto").kv_bytes == "auto"
    assert of(KV_GIB=" ").kv_bytes == 0
    assert of(WEIGHTS_HBM_GIB="0").weights_hbm_bytes == 0
    assert of(WEIGHTS_HBM_GIB="None").weights_hbm_bytes is None
    assert of(BACKING="numa").backing == "numa"
    assert of(ALLOW_UNTESTED="yes").allow_untested is True


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("KV_GIB", "-1", "a number of GiB from 0 up, or 'auto'"),
        ("KV_GIB", "much", "a number of GiB from 0 up, or 'auto'"),
        ("KV_GIB", "nan", "a number of GiB from 0 up, or 'auto'"),
        ("KV_GIB", "inf", "a number of GiB from 0 up, or 'auto'"),
        ("KV_GIB", "1e30", "a number of GiB from 0 up, or 'auto'"),
        ("WEIGHTS_HBM_GIB", "-0.5", "a number of GiB from 0 up, 'auto', or 'none'"),
        ("WEIGHTS_HBM_GIB", "all", "a number of GiB from 0 up, 'auto', or 'none'"),
        ("BACKING", "split", "auto, pinned, numa, managed"),
        ("ALLOW_UNTESTED", "2", "1, true, yes, on"),
    ],
)
def test_bad_value_is_refused_by_name_value_and_what_is_allowed(
    name: str, text: str, allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed) as refused:
        of(**{name: text})
    assert f"EGM_ALLOC_VLLM_{name} is {text!r}" in str(refused.value)


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(
        ValueError, match="EGM_ALLOC_VLLM_KV_GB is unknown; allowed: EGM_ALLOC_VLLM"
    ):
        of(KV_GB="1")


def test_settings_of_the_plugin_are_no_typos_of_the_package() -> None:
    assert unknown_variables(dict.fromkeys(VARIABLES, "1")) == []


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        (Settings(kv_bytes=GIB), {"model__enable_sleep_mode": True}, "KV_GIB .* sleep mode"),
        (
            Settings(kv_bytes="auto"),
            {"model__enable_cumem_allocator": True},
            "KV_GIB .* sleep mode",
        ),
        (Settings(weights_hbm_bytes=GIB), {"model__enable_sleep_mode": True}, "WEIGHTS_HBM_GIB .*"),
        (Settings(kv_bytes=GIB, backing="pinned"), {}, "BACKING is 'pinned'"),
        (Settings(kv_bytes=GIB), {"cache__num_gpu_blocks_override": 10}, "num_gpu_blocks_override"),
        (Settings(kv_bytes=GIB), {"parallel__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        (Settings(kv_bytes=GIB), {"kv_transfer_config": object()}, "KV connector"),
        (Settings(kv_bytes=GIB), {"parallel__enable_elastic_ep": True}, "enable_elastic_ep"),
        (Settings(kv_bytes=GIB), {"parallel__distributed_executor_backend": "ray"}, "Ray"),
        (Settings(weights_hbm_bytes=0), {"parallel__distributed_executor_backend": "ray"}, "Ray"),
        (Settings(kv_bytes="auto"), {"parallel__data_parallel_size_local": 2}, "KV_GIB is 'auto'"),
        (Settings(kv_bytes=GIB), {"attention__hisparse_config": object()}, "hisparse_config"),
        (
            Settings(weights_hbm_bytes=0),
            {"offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1))},
            "vLLM's own offloading",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(
    settings: Settings, changes: dict[str, Any], sentence: str
) -> None:
    check(vllm_config(), Settings())
    check(vllm_config(**changes), Settings())
    with pytest.raises(ValueError, match=sentence):
        check(vllm_config(**changes), settings)


def test_size_of_the_kv_cache_from_an_earlier_start_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    check(vllm_config(), Settings(kv_bytes=GIB))
    with pytest.raises(ValueError, match=r"WEIGHTS_HBM_GIB .* VLLM_ENABLE_STARTUP_PLAN"):
        check(vllm_config(), Settings(weights_hbm_bytes=GIB))
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "0")
    check(vllm_config(), Settings(weights_hbm_bytes=GIB))


def test_defaults_that_ray_hides_from_the_workers_are_said_to_be_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check(vllm_config(), Settings())
    assert caplog.text == ""
    check(vllm_config(parallel__distributed_executor_backend="ray"), Settings())
    assert "the plugin is off in the workers: the executor is Ray" in caplog.text


@pytest.mark.parametrize("prefixes", ["MY_,EGM_ALLOC_", " EGM_ALLOC_ , MY_", "EGM_"])
def test_ray_that_copies_the_settings_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, prefixes: str
) -> None:
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", prefixes)
    check(vllm_config(parallel__distributed_executor_backend="ray"), Settings(kv_bytes=GIB))


@pytest.mark.simulated
def test_more_than_the_host_has_is_refused_without_a_cuda_call() -> None:
    two = vllm_config(parallel__local_world_size=2)
    ranks = vllm_config(parallel__data_parallel_size_local=2)
    with sim.call_log() as log:
        check(two, Settings(kv_bytes=100 * GIB))
        for config in (two, ranks):
            with pytest.raises(ValueError, match=r"KV_GIB is 300 on each of 2 GPUs, .* up to 25"):
                check(config, Settings(kv_bytes=300 * GIB))
        # On several hosts: vLLM counts all GPUs as this one's.
        several = {"distributed_executor_backend": "external_launcher", "local_world_size": 16}
        config = vllm_config(**{f"parallel__{name}": value for name, value in several.items()})
        check(config, Settings(kv_bytes=100 * GIB))
        with pytest.raises(ValueError, match=r"KV_GIB is 600"):
            check(config, Settings(kv_bytes=600 * GIB))
    assert log.names == []  # whoever checks may fork afterwards


@pytest.mark.simulated
def test_control_group_counts_for_what_the_host_has(tmp_path: Path) -> None:
    root = write_host(tmp_path, 512, 500)
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{64 * GIB}\n")
    (group / "memory.current").write_text("0\n")
    sim.set_host_root(root)
    check(vllm_config(), Settings(kv_bytes=60 * GIB))
    with pytest.raises(ValueError, match=r"KV_GIB is 100 .* has 64.0 GiB in all"):
        check(vllm_config(), Settings(kv_bytes=100 * GIB))


def test_own_setting_of_egm_alloc_that_counts_is_checked_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EGM_ALLOC_BACKING", "of no use in vLLM's processes")
    check(vllm_config(), Settings(kv_bytes=GIB))
    monkeypatch.setenv("EGM_ALLOC_HOST_RESERVE_GIB", "lots")
    with pytest.raises(ValueError, match="EGM_ALLOC_HOST_RESERVE_GIB is 'lots'; allowed"):
        check(vllm_config(), Settings(kv_bytes=GIB))
