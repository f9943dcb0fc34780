"""Every test starts with egm_alloc off, its default configuration and an untouched simulator.

Markers: ``simulated`` needs the simulated device (``make test``), ``gpu`` a real one
(``make test-gpu``), ``any_device`` either. A test that lacks its device is skipped, and the skip
says why.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

import egm_alloc
from egm_alloc import _C, control
from tests.simulator import environment, sim


def pytest_configure() -> None:
    """Give each worker of pytest-xdist a host of its own: it came with that of all."""
    if sim.active and "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["EGM_SIM_HOST_ROOT"] = environment(sim.machine)["EGM_SIM_HOST_ROOT"]
        sim.set_host_root(os.environ["EGM_SIM_HOST_ROOT"])


def pytest_collection_finish() -> None:
    """Keep what is there by now out of each collection below, which walks all of torch else."""
    gc.collect()
    gc.freeze()


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("simulated") and not sim.active:
        return "needs the simulated device: run make test"
    if item.get_closest_marker("gpu"):
        if sim.active:
            return "needs a real GPU, and the device here is simulated: run make test-gpu"
        if not torch.cuda.is_available():
            return "needs a GPU, and there is none here"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests whose device is missing; those of any device are for the one that is there."""
    for item in items:
        if item.get_closest_marker("any_device"):
            item.add_marker(pytest.mark.simulated if sim.active else pytest.mark.gpu)
        reason = _missing(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _free_everything() -> None:
    egm_alloc.disable()
    control._config = None
    # The C pair follows the last configuration also while egm_alloc is off.
    _C.configure(control._compiled(egm_alloc.Config()))
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        # What libraries keep: products their workspaces, sharing what it lent.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset egm_alloc, its environment and the simulator around each test."""
    for name in os.environ:
        if name.startswith("EGM_ALLOC_"):
            monkeypatch.delenv(name)
    _free_everything()
    if sim.active:
        sim.reset()
    yield
    if sim.active:
        sim.reset()
    _free_everything()
