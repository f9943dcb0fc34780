"""``egm-alloc plan``: what serving with weights or a KV cache beyond HBM will cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

import torch

from egm_alloc.cli.measure import check_room, measure, seconds
from egm_alloc.cli.text import wrapped
from egm_alloc.control import enable, is_enabled
from egm_alloc.diagnosis import diagnose_device
from egm_alloc.serving import Forecast, Load, Machine, break_even_link, forecast
from egm_alloc.stats import format_table

_GIB = 1 << 30
_SAMPLE_BYTES = 1 << 30
_LEGEND = (
    "A model of decoding that is bound by memory: each step reads all weights and all KV of the "
    "running sequences. 'wait' lets sequences queue until HBM has room for their KV cache; "
    "'extend' holds them all, the blocks in HBM first."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What went into an estimate and what came out of it."""

    machine: Machine
    load: Load
    wait: Forecast
    extend: Forecast
    break_even_link: float | None
    simulated: bool


def _number(name: str, allowed: str, least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < 1e18:
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; allowed: {allowed}")
        return value

    return parse


def _positive(name: str) -> Callable[[str], float]:
    return _number(name, "a number above 0", 1e-9)


def _from_zero(name: str) -> Callable[[str], float]:
    return _number(name, "a number from 0 up", 0.0)


def _count(name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) < 1 << 40:
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; allowed: a whole number above 0")
        return int(text)

    return parse


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "plan",
        help="estimate what serving beyond HBM costs",
        description="Estimate tokens per second of serving a model on one GPU whose weights or KV "
        "cache are partly on the host, beside letting requests wait. Speeds that are not given "
        "are measured on this machine.",
    )
    required = parser.add_argument_group("the load (required)")
    options: list[tuple[str, Callable[[str], float], str, str]] = [
        ("--weights-gib", _positive("weights_gib"), "GIB", "all weights of one GPU"),
        ("--kv-bytes-per-token", _positive("kv_bytes_per_token"), "N", "all layers together"),
        ("--hbm-kv-gib", _from_zero("hbm_kv_gib"), "GIB", "KV cache that fits in HBM"),
        ("--sequences", _count("sequences"), "N", "sequences to be served at once"),
        ("--prompt", _count("prompt"), "TOKENS", "prompt tokens of each"),
        ("--output", _count("output"), "TOKENS", "output tokens of each"),
    ]
    for name, parse, metavar, text in options:
        required.add_argument(name, type=parse, metavar=metavar, help=text, required=True)
    parser.add_argument(
        "--host-weights-gib",
        type=_from_zero("host_weights_gib"),
        default=0.0,
        metavar="GIB",
        help="weights that are on the host (default: 0)",
    )
    parser.add_argument(
        "--host-kv-gib",
        type=_from_zero("host_kv_gib"),
        metavar="GIB",
        help="KV cache on the host (default: what all sequences need)",
    )
    parser.add_argument(
        "--bytes-per-weight",
        type=_positive("bytes_per_weight"),
        default=2.0,
        metavar="N",
        help="default: 2, for bfloat16",
    )
    for name, unit, text in (
        ("--hbm-gb-s", "GB/S", "speed of reading HBM, in 10**9 bytes per second"),
        ("--link-gb-s", "GB/S", "speed of reading host memory"),
        ("--tflops", "N", "speed of bfloat16 matrix products, in 10**12 operations per second"),
    ):
        field = name[2:].replace("-", "_")
        parser.add_argument(
            name, type=_positive(field), metavar=unit, help=f"{text} (default: measured)"
        )
    for name, default, text in (
        ("--step-overhead-ms", 1.2, "what each step takes besides: scheduling, launches, sampling"),
        ("--sequence-overhead-us", 7.0, "and for each sequence in it"),
    ):
        parser.add_argument(
            name,
            type=_from_zero(name[2:].replace("-", "_")),
            default=default,
            metavar=name[-2:].upper(),
            help=f"{text} (default: {default:g})",
        )
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Estimate and print; return 1 with a sentence on stderr where that is not possible."""
    if options.host_weights_gib > options.weights_gib:
        print(
            f"egm-alloc plan: host_weights_gib is {options.host_weights_gib:g}; allowed: up to "
            f"weights_gib, which is {options.weights_gib:g}",
            file=sys.stderr,
        )
        return 1
    try:
        machine, simulated = _machine(options)
    except (TypeError, ValueError, RuntimeError) as error:
        print(
            f"egm-alloc plan: {error} (nothing is measured if --hbm-gb-s, --link-gb-s and --tflops "
            "are given)",
            file=sys.stderr,
        )
        return 1
    load = Load(
        weights_hbm_bytes=(options.weights_gib - options.host_weights_gib) * _GIB,
        weights_host_bytes=options.host_weights_gib * _GIB,
        bytes_per_weight=options.bytes_per_weight,
        kv_bytes_per_token=options.kv_bytes_per_token,
        sequences=options.sequences,
        prompt_tokens=options.prompt,
        output_tokens=options.output,
    )
    hbm = options.hbm_kv_gib * _GIB
    host = (
        max(0.0, load.kv_bytes - hbm) if options.host_kv_gib is None else options.host_kv_gib * _GIB
    )
    plan = Plan(
        machine,
        load,
        wait=forecast(machine, load, hbm, 0),
        extend=forecast(machine, load, hbm, host),
        break_even_link=break_even_link(machine, load, hbm, host),
        simulated=simulated,
    )
    print(json.dumps(_as_dict(plan), indent=2) if options.json else _in_words(plan))
    return 0


def _machine(options: argparse.Namespace) -> tuple[Machine, bool]:
    hbm, link, tflops = options.hbm_gb_s, options.link_gb_s, options.tflops
    measures = None in (hbm, link, tflops)
    if hbm is None or link is None:
        if not is_enabled():
            enable()
        kinds = ("device", "pinned")
        check_room(_SAMPLE_BYTES, kinds, 0)
        report = measure(_SAMPLE_BYTES, kinds, 0)
        for row in report.rows:
            if row.read_gb_per_s is None:
                raise RuntimeError(f"{row.kind} memory could not be measured: {row.missing}")
        hbm = hbm or report.rows[0].read_gb_per_s
        link = link or report.rows[1].read_gb_per_s
    if tflops is None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no GPU to measure")
        tflops = _measure_tflops()
    step, sequence = options.step_overhead_ms / 1e3, options.sequence_overhead_us / 1e6
    simulated = measures and diagnose_device(0).simulated
    return Machine(hbm * 1e9, link * 1e9, tflops * 1e12, step, sequence), simulated


def _measure_tflops(n: int = 4096, repeats: int = 20) -> float:
    a, b = (torch.ones(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds(lambda: a @ b, 3)
    return 2 * n**3 / seconds(lambda: a @ b, repeats) / 1e12


def _as_dict(plan: Plan) -> dict[str, object]:
    def figures(of: Forecast) -> dict[str, object]:
        known = dataclasses.asdict(of)
        return known if of.at_once else {**known, "step_s": None}

    return {
        "simulated": plan.simulated,
        "machine": dataclasses.asdict(plan.machine),
        "load": dataclasses.asdict(plan.load),
        "wait": figures(plan.wait),
        "extend": figures(plan.extend),
        "break_even_link_bytes_per_s": plan.break_even_link,
    }


def _in_words(plan: Plan) -> str:
    machine = plan.machine
    header = ["", "sequences at once", "KV on the host GiB", "step ms", "tokens/s"]
    rows = [
        [
            name,
            str(of.at_once),
            f"{of.kv_host_bytes / _GIB:.2f}",
            f"{of.step_s * 1e3:.2f}" if of.at_once else "-",
            f"{of.tokens_per_s:.0f}",
        ]
        for name, of in (("wait", plan.wait), ("extend", plan.extend))
    ]
    lines = [
        f"HBM {machine.hbm_bytes_per_s / 1e9:.0f} GB/s, link "
        f"{machine.link_bytes_per_s / 1e9:.1f} GB/s, "
        f"{machine.operations_per_s / 1e12:.0f} TFLOP/s",
        *(["SIMULATED device: these speeds mean nothing."] if plan.simulated else []),
        "",
        format_table(header, rows),
        "",
        wrapped(_LEGEND),
        "",
        wrapped(_advice(plan)),
    ]
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    wait, extend, link = plan.wait, plan.extend, plan.break_even_link
    if extend.at_once == 0:
        return "One sequence needs more KV cache than HBM and the host have together."
    if wait.at_once == 0:
        return "HBM alone cannot hold one sequence: extending is the only way to serve it."
    if wait.at_once == plan.load.sequences:
        return "HBM holds all sequences: nothing is to be extended."
    if wait.at_once == extend.at_once:
        return "The KV cache on the host is too small to hold one more sequence."
    better = "extending" if extend.tokens_per_s > wait.tokens_per_s else "waiting"
    text = f"For throughput {better} is faster here."
    if link is not None:
        text += f" The two are alike at a link of {link / 1e9:.0f} GB/s."
    return text
