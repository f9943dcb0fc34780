"""The control interface: call log, faults, presets, fresh processes, errors, fork."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.simulator import CallLog, Completed, Simulator, cuda
from tests.simulator.calls import Fault

MIB = 1 << 20

pytestmark = pytest.mark.simulated


def test_log_has_calls_in_order_with_arguments(call_log: CallLog) -> None:
    address = cuda.malloc_managed(4 * MIB)
    cuda.advise(address, 4 * MIB, "set-preferred-location", "device:0")
    cuda.prefetch(address, 4 * MIB, "device:1")
    cuda.free(address)
    assert call_log.names == [
        "cudaMallocManaged",
        "cudaMemAdvise",
        "cudaMemPrefetchAsync",
        "cudaFree",
    ]
    allocate, advice, prefetch, free = call_log
    assert allocate.args == {"size": 4 * MIB, "flags": 1, "ptr": address}
    assert advice.args["advice"] == "set-preferred-location"
    assert advice.args["location"] == "device:0"
    assert prefetch.args["location"] == "device:1"
    assert free.args == {"ptr": address}
    assert {call.result for call in call_log} == {"cudaSuccess"}


def test_log_leaves_out_launches_unless_asked(simulator: Simulator) -> None:
    tensor = torch.ones(10, device="cuda")
    with simulator.call_log() as short:
        tensor.add_(1)
    with simulator.call_log(everything=True) as full:
        tensor.add_(1)
    assert "cudaLaunchKernel" not in short.names
    assert "cudaLaunchKernel" in full.names


def test_log_that_overflows_says_so(simulator: Simulator) -> None:
    with simulator.call_log(limit=1) as log:
        for _ in range(2):
            cuda.free(cuda.malloc(1))
        with pytest.raises(RuntimeError, match="overflowed by 3"):
            len(log)


def test_fault_strikes_the_nth_call(fail_call: Callable[..., Fault]) -> None:
    fault = fail_call("cudaMalloc", nth=2)
    first = cuda.malloc(1)
    with pytest.raises(cuda.CudaError, match="cudaErrorMemoryAllocation"):
        cuda.malloc(1)
    cuda.free(cuda.malloc(1))
    cuda.free(first)
    assert fault.fired == 1


def test_every_call_of_a_scenario_can_be_made_to_fail(simulator: Simulator) -> None:
    def scenario() -> None:
        address = cuda.malloc(MIB)
        cuda.memset(address, 0, MIB)
        cuda.free(address)

    before = simulator.live_allocations()
    count = simulator.count_calls(scenario)
    assert count == 3
    for nth in range(1, count + 1):
        with (
            simulator.fail_call("*", error="cudaErrorInvalidValue", nth=nth),
            simulator.call_log() as log,
            pytest.raises(cuda.CudaError),
        ):
            scenario()
        for call in log.of("cudaMalloc"):
            if "ptr" in call.args:
                cuda.free(call.args["ptr"])
    cuda.last_error()
    assert simulator.live_allocations() == before


def test_torch_turns_an_injected_error_into_its_own(simulator: Simulator) -> None:
    torch.cuda.empty_cache()
    with simulator.fail_call("cudaMalloc", times=-1), pytest.raises(torch.OutOfMemoryError):
        torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")


def test_unknown_error_name_is_refused(simulator: Simulator) -> None:
    with (
        pytest.raises(ValueError, match="cudaErrorNonsense"),
        simulator.fail_call("x", "cudaErrorNonsense"),
    ):
        pass


def test_last_error_sticks_until_it_is_taken(simulator: Simulator) -> None:
    with pytest.raises(cuda.CudaError):
        cuda.free(12345)
    assert cuda.last_error() == 1
    assert cuda.last_error() == 0


def test_live_allocations_tell_kinds_apart(simulator: Simulator) -> None:
    before = simulator.live_allocations()
    address = cuda.malloc_managed(3 * MIB)
    kind = simulator.live_allocations()["managed"]
    assert kind.count == before["managed"].count + 1 if "managed" in before else kind.count == 1
    cuda.free(address)
    assert simulator.live_allocations() == before


def test_unsimulated_call_is_loud(own_process: Callable[..., Completed]) -> None:
    done = own_process(
        """
        import ctypes
        print(ctypes.CDLL(None).cudaMallocArray())
        """
    )
    assert done.stdout.strip() == "801"
    assert "cudaMallocArray is not simulated" in done.stderr


@pytest.mark.parametrize(
    ("machine", "name", "pageable", "host_tables", "direct", "numa_config", "integrated"),
    [
        ("h100", "H100", 0, 0, 0, 0, 0),
        ("h200", "H200", 0, 0, 0, 0, 0),
        ("gh200", "GH200", 1, 1, 1, 1, 0),
        ("gh200-driver-managed", "GH200", 1, 1, 1, 0, 0),
        ("gh200-egm", "GH200", 1, 1, 1, 1, 0),
        ("gb200", "GB200", 1, 1, 1, 1, 0),
        ("gb10", "GB10", 1, 1, 1, 0, 1),
    ],
)
def test_preset_has_its_attributes(  # noqa: PLR0917
    own_process: Callable[..., Completed],
    machine: str,
    name: str,
    pageable: int,
    host_tables: int,
    direct: int,
    numa_config: int,
    integrated: int,
) -> None:
    done = own_process(
        """
        from tests.simulator import cuda, sim
        print([cuda.device_attribute(a) for a in (88, 100, 101, 130, 18, 89)])
        print(sim.machine, sim.egm_bytes > 0, sim.host_page_bytes)
        """,
        machine=machine,
    )
    attributes, rest = done.stdout.splitlines()
    assert attributes == str([pageable, host_tables, direct, numa_config, integrated, 1])
    page = 4096 if machine in ("h100", "h200", "gb10") else 65536
    assert rest == f"{machine} {machine == 'gh200-egm'} {page}"


@pytest.mark.parametrize(
    ("machine", "error"),
    [("no-gpu", "No CUDA GPUs|no CUDA-capable"), ("no-driver", "NVIDIA driver")],
)
def test_machine_without_a_device(
    own_process: Callable[..., Completed], machine: str, error: str
) -> None:
    done = own_process(
        """
        import torch
        assert not torch.cuda.is_available()
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            print(error)
        """,
        machine=machine,
    )
    assert any(part in done.stdout for part in error.split("|")), done.stdout


def test_expandable_segments_grow_and_go(own_process: Callable[..., Completed]) -> None:
    done = own_process(
        """
        import torch
        from tests.simulator import sim
        with sim.call_log() as log:
            small = torch.ones(10).cuda()
            large = torch.arange(100 << 20, dtype=torch.uint8).cuda()
            assert torch.equal(large[:5].cpu(), torch.arange(5, dtype=torch.uint8))
        assert {"cuMemAddressReserve", "cuMemCreate", "cuMemMap"} <= set(log.names)
        assert "cudaMalloc" not in log.names
        assert sim.live_allocations()["vmm"].bytes == sim.hbm()["taken"] > 100 << 20
        del small, large
        torch.cuda.empty_cache()
        print(sim.hbm()["taken"], sim.live_allocations())
        """,
        env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )
    assert done.stdout == "0 {}\n"


def test_cuda_malloc_async_backend_works(own_process: Callable[..., Completed]) -> None:
    done = own_process(
        """
        import torch
        from tests.simulator import sim
        tensor = torch.arange(10).cuda()
        print(torch.cuda.get_allocator_backend(), tensor.cpu().tolist()[-1])
        print("async" in sim.live_allocations())
        """,
        env={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
    )
    assert done.stdout.split() == ["cudaMallocAsync", "9", "True"]


def test_fork_before_cuda_works_and_after_does_not(own_process: Callable[..., Completed]) -> None:
    done = own_process(
        """
        import os, torch
        from tests.simulator import cuda
        def in_child(act):
            child = os.fork()
            if child == 0:
                try:
                    act()
                except Exception as error:
                    print(error, flush=True)
                    os._exit(1)
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(in_child(lambda: torch.zeros(4, device="cuda").cpu()), flush=True)
        torch.zeros(1, device="cuda")
        print(in_child(lambda: cuda.malloc(1)), flush=True)
        """
    )
    assert done.stdout.split() == ["0", "cudaErrorInitializationError", "1"]


def test_tensor_is_shared_with_another_process(
    own_process: Callable[..., Completed], tmp_path: Path
) -> None:
    script = tmp_path / "share.py"
    script.write_text(
        "import torch, torch.multiprocessing as mp\n"
        "def child(queue, done):\n"
        "    tensor = queue.get(); print(tensor.cpu().tolist(), flush=True); done.set()\n"
        "if __name__ == '__main__':\n"
        "    context = mp.get_context('spawn')\n"
        "    queue, done = context.Queue(), context.Event()\n"
        "    process = context.Process(target=child, args=(queue, done)); process.start()\n"
        "    tensor = torch.arange(4).cuda(); queue.put(tensor); done.wait(60); process.join()\n"
    )
    assert own_process(script).stdout == "[0, 1, 2, 3]\n"
