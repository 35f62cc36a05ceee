"""What the training loop adds to its steps: bookkeeping, checkpoints, resuming, determinism.

    python -m benchmarks.loop                                    # the paper's network, 5 x 8 s
    python -m benchmarks.loop --device cpu --config configs/demo.yaml --steps 40

Every run is `python -m training.train` on a synthetic data set made for the purpose.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Cell, environment, markdown_table, save
from benchmarks.runs import MAIN, Launch, median_step, steady
from benchmarks.timing import free_memory, synchronize
from models.device import TRAINING_KINDS, pick_device
from models.errors import InputError, run_command
from training.config import load_config
from training.data import synthetic
from training.run_folder import RunFolder
from training.trainer import Trainer
from training.validation import round_trip

COLUMNS = ("what", "value", "goal")
WARMUP = 3
NEVER = 1_000_000
_AFTER = 5  # steps in which a checkpoint is written


def bare_step(config_path: Path, words: Sequence[str], steps: int) -> float:
    """Seconds of network, loss, backward pass and optimizer alone, on one batch again and again."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(config_path, [*words, f"run.dir={folder}/run", "data.num_workers=0"])
        trainer = Trainer(config, RunFolder(config.run.dir), None)
        batch = next(trainer.loaders.training(0))
    mixture, target = (batch[name].to(trainer.device) for name in ("mixture", "target"))
    start = 0.0
    for number in range(WARMUP + steps):
        if number == WARMUP:
            synchronize(trainer.device)
            start = time.perf_counter()
        with trainer.autocast():
            estimate = trainer.network(mixture)
        trainer.loss(estimate, round_trip(trainer.model, target))[0].backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    synchronize(trainer.device)
    seconds = (time.perf_counter() - start) / steps
    device = trainer.device
    del trainer, batch, mixture, target, estimate
    free_memory(device)
    return seconds


def measure(launch: Launch, steps: int) -> list[dict[str, Cell]]:
    """All rows; `goal` is what is aimed for, where there is such a number."""
    table: list[dict[str, Cell]] = []

    def note(what: str, value: Cell, goal: str | None = None) -> None:
        table.append({"what": what, "value": value, "goal": goal})
        print(f"  {what}: {value}", file=sys.stderr, flush=True)

    limit = f"training.max_steps={steps}"
    never = [f"training.{kind}_every={NEVER}" for kind in ("validate", "checkpoint")]
    bare = bare_step(launch.config, [*launch.words, *never], max(WARMUP, steps // 3))
    note("step without the loop, s", bare)
    launch.finish("dry", None, "--dry-run", *never)
    found = re.search(r"peak memory: ([\d.]+) GiB", launch.output("dry"))
    rows = launch.finish("plain", None, limit, "training.log_every=10", *never)
    plain = median_step(steady(rows))
    note("step in the loop, s", plain)
    note("the loop's own share", plain / bare - 1, "below 0.02")
    note("share of waiting for data", statistics.mean(r["data_wait_share"] for r in rows[1:-1]))
    saving = ["training.log_every=10", never[0], "training.checkpoint_every=10"]
    rows = launch.finish("saving", None, limit, *saving)
    note("a checkpoint costs, steps", 10 * (median_step(steady(rows)) / plain - 1))
    peak = rows[-1].get("gpu_memory_gib")
    if found and peak:
        note("memory that --dry-run predicts, GiB", float(found[1]))
        note("memory of a run with checkpoints, GiB", peak, "10 % of the line above")
    every = max(_AFTER + 1, steps // 4)
    watched = ["training.log_every=1", never[0], f"training.checkpoint_every={every}"]
    rows = launch.finish("watched", None, limit, *watched)
    longest, mean = _beside_checkpoints([row["seconds_per_step"] for row in rows], every)
    note("longest step beside a checkpoint, of the others' median", longest, "below 1.1")
    note("mean step beside a checkpoint, of the others' median", mean)
    more = [f"training.max_steps={steps + 2}", "--resume", "auto"]
    started = time.time()
    resumed = launch.finish("watched", None, *more, *watched)[steps]
    first = launch.first_step("watched", started, resumed)
    note("start of the process to the first step when resuming, s", first, "below 20")
    same = ["training.log_every=1", "training.max_steps=10", "training.deterministic=true", *never]
    pair = [launch.finish(f"deterministic_{number}", None, *same) for number in (1, 2)]
    losses = [[row["loss"] for row in rows] for rows in pair]
    note("deterministic: two runs are equal", str(losses[0] == losses[1]), "True")
    note("deterministic: a step, of the plain one", median_step(pair[0][WARMUP:]) / plain)
    return table


def _beside_checkpoints(seconds: Sequence[float], every: int) -> tuple[float, float]:
    """The steps from a snapshot on, against the median of the others: the longest, the mean.

    The first checkpoint, which allocates what the others use again, does not count.
    """
    # The snapshot is part of the row of its own step, which is the one before in `seconds`.
    starts = range(2 * every - 1, len(seconds) - _AFTER - 1, every)
    beside = set(itertools.chain.from_iterable(range(s, s + _AFTER + 1) for s in starts))
    first = set(range(every + _AFTER)) | {len(seconds) - 1}
    others = [s for n, s in enumerate(seconds) if n not in beside | first]
    chosen = [seconds[n] for n in sorted(beside)]
    median = statistics.median(others)
    return max(chosen) / median, statistics.mean(chosen) / median


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=MAIN / "configs" / "bsmamba2.yaml")
    parser.add_argument("--device", default="auto", help="as training.device")
    parser.add_argument("--steps", type=int, default=80, help="of a timed run; at least 40")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 40:
        raise InputError(f"--steps {args.steps}: should be at least 40")
    device = pick_device(args.device, TRAINING_KINDS, "--device")
    facts = environment(device, steps=str(args.steps))
    facts["command"] = "python -m benchmarks.loop " + shlex.join(argv or sys.argv[1:])
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        synthetic.main([f"{folder}/data", "--tracks", "12", "--seconds", "30"])
        words = [f"data.root={folder}/data", f"training.device={device}"]
        words += ["training.accumulation=1", "training.max_minutes=null", *args.overrides]
        rows = measure(Launch(args.config.resolve(), Path(folder), words), args.steps)
    print(markdown_table(rows, COLUMNS))
    save(args.json, {"environment": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    run_command(main)
