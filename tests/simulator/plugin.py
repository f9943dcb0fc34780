"""Fixtures for tests that run on the simulated machine.

Enable them in a conftest.py by ``pytest_plugins = ["tests.simulator.plugin"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest

from tests.simulator import CallLog, Completed, Simulator, run_script, sim
from tests.simulator.calls import Fault


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """The simulated machine, reset before and after; skips where there is none."""
    if not sim.active:
        pytest.skip("needs the simulated CUDA device: python -m tests.simulator -- ...")
    sim.reset()
    yield sim
    sim.reset()


@pytest.fixture
def call_log(simulator: Simulator) -> Iterator[CallLog]:
    """Every call of the test, growing as it runs; ``call_log.clear()`` forgets the preparation."""
    with simulator.call_log() as log:
        yield log


@pytest.fixture
def fail_call(simulator: Simulator) -> Iterator[Callable[..., Fault]]:
    """``fail_call("cudaMalloc", nth=2)``: a fault armed until the end of the test."""
    with ExitStack() as stack:

        def arm(name: str, **options: object) -> Fault:
            context: AbstractContextManager[Fault] = simulator.fail_call(
                name,
                **options,  # type: ignore[arg-type]
            )
            return stack.enter_context(context)

        yield arm


@pytest.fixture
def fresh_process() -> Callable[..., Completed]:
    """:func:`tests.simulator.run_script`: a script in a process, on a machine, of its own."""
    return run_script
