"""Training on 1, 2, 4 ... processes as a user starts it: torchrun, real data, real loop.

Everything is read off what the runs write: `metrics.jsonl` and the checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
            RuntimeError: it failed or ran out of time; the message ends with its last lines.
        """
        process = self.start(name, processes, *words)
        try:
            code = process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -1
        if code != 0:
            raise RuntimeError(f"{name} failed ({code}): {self.tail(name)}")
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

    "first step s" is the time from the start of torchrun to the end of the set-up, and a step.
    """
    table: list[dict[str, Any]] = []
    words = [
        "training.accumulation=1",
        f"training.max_steps={steps}",
        f"training.log_every={steps // 3}",
    ]
    words += [f"training.validate_every={10 * steps}", f"training.checkpoint_every={10 * steps}"]
    for count in counts:
        started = time.time()
        rows = launch.finish(f"scaling_{count}", count, *words)
        # The first third holds compilation and the loaders' start.
        last = rows[-1]
        rate = last["examples_per_second"]
        alone = table[0]["examples/s"] / table[0]["processes"] if table else rate / count
        first = (launch.folder / f"scaling_{count}" / "config.yaml").stat().st_mtime
        table.append({
            "processes": count,
            "examples/s": rate,
            "efficiency": rate / count / alone,
            "s/step": last["seconds_per_step"],
            "waiting for data": last["data_wait_share"],
            "peak GiB": last.get("gpu_memory_gib"),
            "first step s": first - started + rows[0]["seconds_per_step"],
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
    last = launch.folder / "killed" / "checkpoints" / "last.pt"
    deadline = time.monotonic() + launch.limit_s
    while not last.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint: {launch.tail('killed')}")
        time.sleep(0.05)
    os.kill(_children(run.pid)[-1], signal.SIGKILL)
    started = time.monotonic()
    try:
        code: int | None = run.wait(2 * _CLOSE_S)
    except subprocess.TimeoutExpired:
        run.kill()
        code = None
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


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]
