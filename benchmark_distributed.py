"""Training on several processes: scaling, equality with one process, and the loss of a rank.

    python benchmark_distributed.py                       # all GPUs of this machine
    python benchmark_distributed.py --device cpu          # Gloo processes, a small network
    python benchmark_distributed.py --json docs/benchmarks/scaling.json

Every run is `torchrun -m training.train` on a synthetic data set made for the purpose.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling
from benchmarks.report import environment, markdown_table, save
from benchmarks.runs import Launch
from models.device import TRAINING_KINDS, pick_device
from models.errors import InputError, run_command
from training.data import synthetic

CONFIGS = {"cuda": "bsmamba2.yaml", "cpu": "demo.yaml"}
BATCH = {"cuda": 5, "cpu": 1}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", *TRAINING_KINDS), default="auto")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1 2 4 8, up to the GPUs")
    parser.add_argument("--steps", type=int, default=60, help="steps of a timed run")
    parser.add_argument("--curve-steps", type=int, default=50, help="steps of a compared run")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a run may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs")
    return parser.parse_intermixed_args(argv)


def counts_of(args: argparse.Namespace, device: str) -> list[int]:
    """Numbers of processes to measure, from one up.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 2
    counts = sorted(args.processes or [n for n in (1, 2, 4, 8) if n <= gpus])
    if device == "cuda" and counts[-1] > gpus:
        raise InputError(f"--processes {counts[-1]}: this machine has {gpus} GPUs")
    if counts[0] != 1 or any(counts[-1] % n for n in counts):
        raise InputError("--processes: give 1 and divisors of the largest, such as 1 2 4")
    return counts


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    device = pick_device(args.device, TRAINING_KINDS, "--device").type
    counts = counts_of(args, device)
    facts = environment(torch.device(device), processes=" ".join(map(str, counts)))
    facts["command"] = "python benchmark_distributed.py " + shlex.join(argv or sys.argv[1:])
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    results: dict[str, Any] = {"environment": facts}
    save(args.json, results)  # a file that cannot be written is told of before minutes of work
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.main([str(folder / "data"), "--tracks", "12", "--seconds", "30"])
        words = [f"data.root={folder / 'data'}", f"training.device={device}"]
        words += [f"training.batch_size={BATCH[device]}", "training.max_minutes=null"]
        config = Path(__file__).parent / "configs" / CONFIGS[device]
        launch = Launch(config, folder, [*words, *args.overrides], args.limit)
        table = results["scaling"] = scaling.scaling(launch, counts, args.steps)
        print(markdown_table(table, scaling.SCALING_COLUMNS), end="\n\n", flush=True)
        save(args.json, results)
        table = results["curves"] = scaling.curves(launch, counts, args.curve_steps, BATCH[device])
        print(markdown_table(table, scaling.CURVE_COLUMNS), end="\n\n", flush=True)
        save(args.json, results)
        if counts[-1] > 1:
            results["killed"] = scaling.kill_one(launch, counts[-1], every=5)
            print("\n".join(f"{key}: {value}" for key, value in results["killed"].items()))
    save(args.json, results)
    return 0


if __name__ == "__main__":
    run_command(main)
