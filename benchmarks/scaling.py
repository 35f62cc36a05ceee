"""Training on 1, 2, 4 ... processes as a user starts it: torchrun, real data, real loop.

Everything is read off what the runs write: `metrics.jsonl` and the checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import InputError

MAIN = Path(__file__).parents[1]
SCALING_COLUMNS = (
    "processes", "examples/s", "efficiency", "s/step", "waiting for data", "peak GiB",
    "first step s",
)  # fmt: skip
CURVE_COLUMNS = (
    "processes", "batch", "accumulation", "first loss", "last loss", "largest difference",
)  # fmt: skip
_CLOSE_S = 60.0  # how soon the other ranks must end once one is killed


@dataclass
class Launch:
    """How the runs of one benchmark are started.

    Attributes:
        config: YAML file of the runs.
        words: overrides that all runs share.
        folder: receives a folder a run.
        limit_s: seconds after which a run is given up.
    """

    config: Path
    folder: Path
    words: Sequence[str] = ()
    limit_s: float = 300.0
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def start(self, name: str, processes: int, *words: str) -> subprocess.Popen[str]:
        """A training run in `folder/name` on this many processes, its output in `NAME.log`."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "training.train"]
        command += ["--config", str(self.config), *self.words, *words]
        command += [f"run.dir={self.folder / name}", "run.tensorboard=false"]
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(
            command, cwd=MAIN, env=self.environment, stdout=log, stderr=log, text=True
        )

    def finish(self, name: str, processes: int, *words: str) -> list[dict[str, Any]]:
        """The rows of such a run, once it has ended.

        Raises:
            InputError: it failed or ran out of time; the message ends with its last lines.
        """
        process = self.start(name, processes, *words)
        try:
            code: int | str = process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            code = f"out of time after {self.limit_s:g} s"
        finally:
            end(process)
        if code != 0:
            raise InputError(f"{name} failed ({code}): {self.tail(name)}")
        return self.rows(name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What the run has written so far."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def tail(self, name: str) -> str:
        """The error that a run ended with, else its last lines, as one."""
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8").splitlines()
        # torchrun puts a table of its own below them.
        return " | ".join([line for line in lines if line.startswith("error: ")] or lines[-5:])


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
        # config.yaml is written when all is set up, right before the first step.
        log = launch.folder / f"scaling_{count}" / "config.yaml"
        rows = rows[len(rows) // 3 : -1]  # neither the start nor the last validation
        step = statistics.median(row["seconds_per_step"] for row in rows)
        rate = rows[-1]["examples_per_second"] * rows[-1]["seconds_per_step"] / step
        alone = table[0]["examples/s"] if table else rate
        table.append({
            "processes": count,
            "examples/s": rate,
            "efficiency": rate / count / alone,
            "s/step": step,
            "waiting for data": statistics.mean(row["data_wait_share"] for row in rows),
            "peak GiB": rows[-1].get("gpu_memory_gib"),
            "first step s": log.stat().st_mtime - started + first["seconds_per_step"],
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
        os.kill(_children(run.pid)[-1], signal.SIGKILL)
        started = time.monotonic()
        try:
            code: int | None = run.wait(2 * _CLOSE_S)
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
        "within a minute": code is not None and seconds < _CLOSE_S,
        "exit code": code,
        "steps before the kill": reached,
        "steps after resuming": rows[-1]["step"],
        "rows": len(rows),
    }


def end(run: subprocess.Popen[str]) -> None:
    """End torchrun and the processes it started, each of which leads a session of its own."""
    if run.poll() is not None:
        return
    children = _children(run.pid)
    run.terminate()  # it hands the signal on
    try:
        run.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        run.kill()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _wait_for(path: Path, run: subprocess.Popen[str], launch: Launch) -> None:
    deadline = time.monotonic() + launch.limit_s
    while not path.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            raise InputError(f"no {path.name} was written: {launch.tail('killed')}")
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]
