"""Training runs as a user starts them, with torchrun or without, and what is read off them.

Everything comes from what the runs write: `metrics.jsonl`, their log and their files' times.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import InputError

MAIN = Path(__file__).parents[1]
CLOSE_S = 60.0  # how soon the other ranks must end once one is killed


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

    def start(self, name: str, processes: int | None, *words: str) -> subprocess.Popen[str]:
        """A training run in `folder/name`, its output in `NAME.log`.

        processes: how many torchrun starts; None is one without torchrun.
        """
        command = [sys.executable, "-m"]
        if processes is not None:
            command += ["torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}", "-m"]
        command += ["training.train", "--config", str(self.config), *self.words, *words]
        command += [f"run.dir={self.folder / name}", "run.tensorboard=false"]
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(
            command, cwd=MAIN, env=self.environment, stdout=log, stderr=log, text=True
        )

    def finish(self, name: str, processes: int | None, *words: str) -> list[dict[str, Any]]:
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

    def first_step(self, name: str, started: float, row: dict[str, Any]) -> float:
        """Seconds from `started`, the time of its start, to the end of the run's first step.

        row: that of the step. config.yaml is written when all is set up, right before it.
        """
        ready = (self.folder / name / "config.yaml").stat().st_mtime
        return ready - started + row["seconds_per_step"]

    def output(self, name: str) -> str:
        """What the run has printed so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def tail(self, name: str) -> str:
        """The error that a run ended with, else its last lines, as one."""
        lines = self.output(name).splitlines()
        # torchrun puts a table of its own below them.
        return " | ".join([line for line in lines if line.startswith("error: ")] or lines[-5:])


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run without its start and the last validation."""
    return rows[len(rows) // 3 : -1]


def median_step(rows: list[dict[str, Any]]) -> float:
    """Seconds of a step."""
    return statistics.median(row["seconds_per_step"] for row in rows)


def end(run: subprocess.Popen[str]) -> None:
    """End torchrun and the processes it started, each of which leads a session of its own."""
    if run.poll() is not None:
        return
    started = children(run.pid)
    run.terminate()  # it hands the signal on
    try:
        run.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        run.kill()
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Numbers of a process's children, in the order of their start."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]
