"""Training on 1, 2, 4 ... processes as a user starts it: torchrun, real data, real loop.

Everything is read off what the runs write: `metrics.jsonl` and the checkpoints.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import CLOSE_S, Launch, children, end, median_step, steady
from models.errors import InputError

SCALING_COLUMNS = (
    "processes", "examples/s", "efficiency", "s/step", "waiting for data", "peak GiB",
    "first step s",
)  # fmt: skip
CURVE_COLUMNS = (
    "processes", "batch", "accumulation", "first loss", "last loss", "largest difference",
)  # fmt: skip


def scaling(launch: Launch, counts: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Examples a second and efficiency of every count, the same batch a process.

    "first step s" is the time from the start of torchrun to the row of the first step.
    """
    table: list[dict[str, Any]] = []
    words = ["training.accumulation=1", f"training.max_steps={steps + 1}", "training.log_every=1"]
    words += [f"training.validate_every={10 * steps}", f"training.checkpoint_every={10 * steps}"]
    for count in counts:
        started = time.time()
        first, *rows = launch.finish(f"scaling_{count}", count, *words)
        rows = steady(rows)
        step = median_step(rows)
        rate = rows[-1]["examples_per_second"] * rows[-1]["seconds_per_step"] / step
        alone = table[0]["examples/s"] if table else rate
        table.append({
            "processes": count,
            "examples/s": rate,
            "efficiency": rate / count / alone,
            "s/step": step,
            "waiting for data": statistics.mean(row["data_wait_share"] for row in rows),
            "peak GiB": rows[-1].get("gpu_memory_gib"),
            "first step s": launch.first_step(f"scaling_{count}", started, first),
        })  # fmt: skip
    return table


def curves(launch: Launch, counts: Sequence[int], steps: int, batch: int) -> list[dict[str, Any]]:
    """Losses over some steps at the same total batch, against those of one process."""
    table: list[dict[str, Any]] = []
    most = max(counts)
    reference: list[float] = []
    for count in counts:
        words = [f"training.batch_size={batch}", f"training.accumulation={most // count}"]
        words += [f"training.max_steps={steps}", "training.log_every=1"]
        words += [
            f"training.validate_every={10 * steps}",
            f"training.checkpoint_every={10 * steps}",
        ]
        losses = [row["loss"] for row in launch.finish(f"curve_{count}", count, *words)]
        reference = reference or losses
        table.append({
            "processes": count,
            "batch": batch,
            "accumulation": most // count,
            "first loss": losses[0],
            "last loss": losses[-1],
            "largest difference": max(
                abs(a - b) / b for a, b in zip(losses, reference, strict=True)
            ),
            "losses": losses,
        })  # fmt: skip
    return table


def kill_one(launch: Launch, processes: int, every: int) -> dict[str, Any]:
    """kill -9 of one rank once there is a checkpoint: the end of the others, and resuming."""
    words = ["training.max_steps=1000000", "training.log_every=1", "training.accumulation=1"]
    words += [f"training.checkpoint_every={every}", "training.validate_every=1000000"]
    run = launch.start("killed", processes, *words)
    try:
        _wait_for(launch.folder / "killed" / "checkpoints" / "last.pt", run, launch)
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        started = time.monotonic()
        try:
            code: int | None = run.wait(2 * CLOSE_S)
        except subprocess.TimeoutExpired:
            code = None
    finally:
        end(run)
    seconds = time.monotonic() - started
    reached = launch.rows("killed")[-1]["step"]
    words[0] = f"training.max_steps={reached + every}"
    rows = launch.finish("killed", processes, *words, "--resume", "auto")
    return {
        "processes": processes,
        "others ended after s": seconds if code is not None else None,
        "within a minute": code is not None and seconds < CLOSE_S,
        "exit code": code,
        "steps before the kill": reached,
        "steps after resuming": rows[-1]["step"],
        "rows": len(rows),
    }


def _wait_for(path: Path, run: subprocess.Popen[str], launch: Launch) -> None:
    deadline = time.monotonic() + launch.limit_s
    while not path.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            raise InputError(f"no {path.name} was written: {launch.tail('killed')}")
        time.sleep(0.05)
