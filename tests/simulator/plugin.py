"""Fixtures for tests that run on the simulated machine.

Enable them in a conftest.py by ``pytest_plugins = ["tests.simulator.plugin"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import pytest

from tests.simulator import CallLog, Completed, Simulator, cuda, run_script, sim
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
def nothing_left(simulator: Simulator) -> Iterator[None]:
    """Fails a test that leaves memory, addresses or handles behind; starts it on device 0."""

    def books() -> list[object]:
        return [
            *((simulator.live_allocations(i), simulator.hbm(i)) for i in range(simulator.devices)),
            *(simulator.host_numa(node) for node in range(simulator.host_nodes)),
            simulator.reserved_bytes(),
        ]

    cuda.call("cudaSetDevice", 0)
    before = books()
    yield
    cuda.call("cudaSetDevice", 0)
    cuda.last_error()
    simulator.reset()
    assert books() == before


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
def own_process() -> Callable[..., Completed]:
    """:func:`tests.simulator.run_script`: a script in a process, on a machine, of its own."""
    return run_script
