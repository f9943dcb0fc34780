"""The simulator's own tests use the fixtures that it offers."""

from tests.simulator.plugin import call_log, fail_call, fresh_process, nothing_left, simulator

__all__ = ["call_log", "fail_call", "fresh_process", "nothing_left", "simulator"]
