"""Every implementation of the scan and of the convolution against every other, in one run.

    python benchmark_mamba_ssm.py                      # scan, convolution, block, network
    python benchmark_mamba_ssm.py --training           # a training step by component
    python benchmark_mamba_ssm.py --quick --json FILE  # 1 s clips, to a file

Speed-up and error are against the sequential scan in float32, or against `nn.Conv1d`. The peer
rows are the authors' wiring: `mamba_ssm.modules.mamba2.Mamba2` on flipped copies.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, training_step
from benchmarks.cases import PEER, Case, Setting
from benchmarks.report import Cell, environment, markdown_table, save
from benchmarks.timing import free_memory, measure, told
from models import BSMamba2Config, InputError
from models.device import TRAINING_KINDS, pick_device
from models.dispatch import ENVIRONMENT_VARIABLE, kernel_errors
from models.errors import run_command
from training.setup import AUTOCAST_TYPES

COLUMNS = (
    "seconds", "what", "backend", "pass", "median ms", "warm-up s", "peak GiB", "frames/s",
    "speed-up", "error",
)  # fmt: skip
PARTS: dict[str, Callable[[Setting, float], Iterable[Case]]] = {
    "scan": cases.scan_cases,
    "conv": cases.conv_cases,
    "block": cases.block_cases,
    "network": cases.network_cases,
}
SIZES = {
    "paper": BSMamba2Config(),
    "small": BSMamba2Config(dim=64, depth=1, d_state=64, headdim=32),
}
FRAMES = "sequences x steps (network: batch x frames x bands) over the time"
QUICK_SECONDS = [1.0]
PAPER_SECONDS = [1.0, 4.0, 8.0]


def time_case(case: Case, setting: Setting, backward: bool) -> dict[str, Cell]:
    """One row: the case's time forward, or forward and backward."""
    wanted = [t.detach().requires_grad_() for t in case.inputs] if backward else list(case.inputs)
    leaves = [*wanted, *case.parameters]

    def run() -> None:
        if not backward:
            with torch.no_grad():
                case.run(*wanted)
            return
        y = case.run(*wanted)
        torch.autograd.grad(y, leaves, y.detach())

    timing = measure(run, setting.device)
    rate = 1e3 * case.frames / timing.median_ms if timing.median_ms else None
    return {
        "what": case.what,
        "backend": case.backend,
        "pass": "forward+backward" if backward else "forward",
        "median ms": timing.median_ms if timing.failure is None else timing.failure,
        "warm-up s": timing.warmup_s,
        "peak GiB": timing.peak_gib,
        "frames/s": rate,
        "repeats": timing.repeats,
    }


def output_of(case: Case, device: torch.device) -> Tensor | None:
    """The case's output in float64 on the CPU; None where it fails, which its timing tells of."""
    try:
        with torch.no_grad():
            return case.run(*case.inputs).cpu().double()
    except kernel_errors():
        return None
    finally:
        free_memory(device)


def compare(rows: list[dict[str, Cell]]) -> None:
    """Add the speed-up of every row over the reference of its kind."""
    references = {_kind(r): r["median ms"] for r in rows if r["backend"] in cases.REFERENCES}
    for row in rows:
        first, mine = references.get(_kind(row)), row["median ms"]
        if isinstance(first, float) and isinstance(mine, float):
            row["speed-up"] = first / mine


def run_part(
    name: str,
    setting: Setting,
    seconds: float,
    quick: bool,
    note: Callable[[list[dict[str, Cell]]], None] = lambda rows: None,
) -> list[dict[str, Cell]]:
    """All rows of one part at one clip length.

    note: called with what is measured so far.
    """
    rows: list[dict[str, Cell]] = []
    expected: dict[str, Tensor | None] = {}
    made = iter(PARTS[name](setting, seconds))
    while True:
        try:
            case = next(made, None)
        except kernel_errors() as failure:  # of the inputs of this case and those after it
            row = dict.fromkeys(COLUMNS) | {"seconds": seconds, "what": name}
            rows.append(row | {"median ms": told(failure)})
            note(rows)
            break
        if case is None:
            break
        if not setting.wants(case.backend):
            continue
        output = output_of(case, setting.device)
        if case.backend in cases.REFERENCES:
            expected[case.what] = output
        reference, error = expected.get(case.what), None
        if reference is not None and output is not None:
            error = ((output - reference).norm() / reference.norm()).item()
        for backward in (False, True) if case.trains else (False,):
            print(f"  {seconds:g} s, {case.what}, {case.backend}", file=sys.stderr, flush=True)
            if quick and backward and case.backend == "sequential" and name == "network":
                continue
            row = time_case(case, setting, backward)
            rows.append({"seconds": seconds, **row, "error": error})
            compare(rows)
            note(rows)
    return rows


def verdict(rows: Sequence[dict[str, Cell]]) -> str:
    """One line: the fastest implementation of the longest clip's last part, and its lead."""
    timed = [row for row in rows if isinstance(row["median ms"], float)]
    kinds = [[r for r in timed if _kind(r) == kind] for kind in dict.fromkeys(map(_kind, timed))]
    compared = [kind for kind in kinds if len(kind) > 1]
    if not compared:
        return "Verdict: no part ran by more than one implementation: nothing to compare."
    longest = max(float(kind[0]["seconds"] or 0) for kind in compared)
    last = [kind for kind in compared if kind[0]["seconds"] == longest][-1]
    own = [row for row in last if row["backend"] != PEER]
    best = min(own, key=lambda row: float(row["median ms"] or 0))
    slowest = max(own, key=lambda row: float(row["median ms"] or 0))
    ratio = float(slowest["median ms"] or 0) / float(best["median ms"] or 1)
    text = (
        f"Verdict: {best['what']}, {best['pass']}, {best['seconds']:g} s: {best['backend']} is the "
        f"fastest with {best['median ms']:.3g} ms, {ratio:.1f} times faster than "
        f"{slowest['backend']}"
    )
    for row in last:
        if row["backend"] == PEER:
            lead = float(row["median ms"] or 0) / float(best["median ms"] or 1)
            text += f" and {lead:.1f} times faster than the authors' wiring"
    return text + "."


def _kind(row: dict[str, Cell]) -> tuple[Cell, ...]:
    return row["seconds"], row["what"], row["pass"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description="Time every implementation of the scan and of the convolution.",
        epilog=f"frames/s: {FRAMES}.",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=AUTOCAST_TYPES, help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--seconds", type=float, nargs="+", help="clip lengths; default 1 4 8")
    parser.add_argument("--batch", type=int, help="clips at once; default 1, training 5")
    parser.add_argument("--size", choices=SIZES, help="default: paper on a GPU, small on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="only these; peer: the peer")
    parser.add_argument("--training", action="store_true", help="time a training step by component")
    parser.add_argument("--quick", action="store_true", help="1 s clips only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    return parser.parse_args(argv)


def make_setting(args: argparse.Namespace) -> Setting:
    """Device, type and sizes.

    Raises:
        InputError: the device is not here, a number is impossible, or the environment names the
            one scan that would run in every row.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE):
        raise InputError(f"{ENVIRONMENT_VARIABLE} is set and would run in every row: unset it")
    device = pick_device(args.device, TRAINING_KINDS, "--device")
    numbers = [*(args.seconds or []), *([] if args.batch is None else [args.batch])]
    if not all(0 < number < math.inf for number in numbers):
        raise InputError("--seconds and --batch must be positive numbers")
    dtype = AUTOCAST_TYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    config = SIZES[args.size or ("paper" if device.type == "cuda" else "small")]
    backends = tuple(PEER if name == "peer" else name for name in args.backends or ())
    setting = Setting(device, dtype, config, args.batch or (5 if args.training else 1), backends)
    for backend in backends:
        if (reason := cases.unavailable(setting, backend)) is not None:
            raise InputError(f"--backends {backend}: {reason}")
    return setting


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    setting = make_setting(args)
    facts = environment(setting.device, precision=str(setting.dtype).removeprefix("torch."))
    facts["network"] = f"dim {setting.config.dim}, depth {setting.config.depth}"
    facts["command"] = "python benchmark_mamba_ssm.py " + shlex.join(argv or sys.argv[1:])
    facts["frames/s"] = FRAMES
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")

    rows: list[dict[str, Any]] = []

    def note(latest: list[dict[str, Any]]) -> None:
        save(args.json, {"environment": facts, "rows": rows + latest})

    note([])  # a file that cannot be written is told of before minutes of work
    columns: Sequence[str] = COLUMNS
    if args.training:
        columns = training_step.COLUMNS
        rows = training_step.rows(
            setting, args.seconds or (QUICK_SECONDS if args.quick else None), note
        )
    else:
        short = args.quick or setting.device.type == "cpu"
        for seconds in args.seconds or (QUICK_SECONDS if short else PAPER_SECONDS):
            for part in args.parts:
                rows += run_part(part, setting, seconds, args.quick, note)
    print(markdown_table(rows, columns), end="\n\n")
    print(training_step.verdict(rows) if args.training else verdict(rows))
    note([])
    return 0


if __name__ == "__main__":
    run_command(main)
