"""A simulated CUDA device: real PyTorch on a machine without a GPU.

What is simulated, what is not, and how tests use it stands in README.md.
"""

from tests.simulator.calls import Call, CallLog, Fault, Kind, Stall
from tests.simulator.control import Simulator
from tests.simulator.launch import Completed, ScriptError, environment, run_script

sim = Simulator()

__all__ = [
    "Call",
    "CallLog",
    "Completed",
    "Fault",
    "Kind",
    "ScriptError",
    "Simulator",
    "Stall",
    "environment",
    "run_script",
    "sim",
]
