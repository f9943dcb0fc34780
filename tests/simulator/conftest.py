"""The simulator's own tests use the fixtures that it offers."""

from tests.simulator.plugin import call_log, fail_call, nothing_left, own_process, simulator

__all__ = ["call_log", "fail_call", "nothing_left", "own_process", "simulator"]
