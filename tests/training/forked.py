"""A program of the tests: runs in forked processes, which share one slow import of torch.

    python forked.py steps FOLDER CONFIG    the same two steps on one, two and three ranks
    python forked.py kills FOLDER CONFIG    a run, and the same one killed at random moments
    python forked.py two FOLDER CONFIG      a run on two ranks, killed once it has a checkpoint
    python forked.py one FOLDER CONFIG      runs stopped with their workers, and by one rank

It must compute nothing itself: a process that has run threads cannot be forked safely.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, in seconds

import training.train
from models.errors import run_command
from training.config import load_config
from training.distributed import joined_world
from training.run_folder import RunFolder
from training.trainer import Trainer

KILLS = 20


def fork(target: Callable[[], int | None], environment: dict[str, str] | None = None) -> int:
    """Run `target` in a child process; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= environment or {}
        torch.set_num_threads(1)
        run_command(target)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # the fork must not return into its parent's test
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def fork_ranks(size: int, target: Callable[[], int | None]) -> list[int]:
    """Run `target` in as many processes as torchrun would start, with its environment."""
    if size == 1:
        return [fork(target)]
    with socket.socket() as free:  # tests run side by side
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [fork(target, common | number) for number in numbers]


def wait(pids: list[int], code: int = 0) -> None:
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == code, status


def two_steps(out: Path, config_path: str, overrides: list[str]) -> None:
    """Two optimizer steps and a validation in float64, saved by rank 0."""
    torch.set_default_dtype(torch.float64)
    config = load_config(config_path, overrides)
    with joined_world() as world:
        trainer = Trainer(config, RunFolder(config.run.dir), None, world)
        batches = (
            {name: wave.double() for name, wave in batch.items()}
            for batch in trainer.loaders.training(0)
        )
        losses = []
        for _ in range(2):
            trainer.train_step(batches)
            losses.append(trainer.row()["loss"])
        with trainer.reporting():
            scores = trainer.validate(None)
        if world.is_main:
            weights = trainer.model.state_dict()
            torch.save({"weights": weights, "losses": losses, "scores": scores}, out)


def steps(folder: Path, config: str) -> None:
    # Ranks: batch size and accumulation.
    for size, (batch, accumulation) in {1: (6, 1), 2: (1, 3), 3: (2, 1)}.items():
        words = [
            f"training.batch_size={batch}",
            f"training.accumulation={accumulation}",
            f"run.dir={folder / str(size)}",
            "curriculum.target_gain=3",
        ]
        out = folder / f"{size}.pt"
        wait(fork_ranks(size, lambda out=out, words=words: two_steps(out, config, words)))


def run(folder: Path, config: str, *overrides: str) -> int:
    words = ["--config", config, "--resume", "auto", f"run.dir={folder}", *overrides]
    return training.train.main(words)


def two(folder: Path, config: str) -> None:
    pids = fork_ranks(2, lambda: run(folder / "killed", config))
    wait_for_change(folder / "killed", pids[0])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shutil.copytree(folder / "killed", folder / "left")
    wait(fork_ranks(2, lambda: run(folder / "killed", config)))


def one(folder: Path, config: str) -> None:
    pid = fork(lambda: (os.setsid(), run(folder / "group", config, "data.num_workers=1"))[1])
    wait_for_change(folder / "group", pid)
    os.killpg(pid, signal.SIGTERM)  # the workers get it too
    wait([pid])
    for name in ("stopped", "orphaned"):
        pids = fork_ranks(2, lambda name=name: run(folder / name, config))
        wait_for_change(folder / name, pids[0])
        if name == "stopped":
            os.kill(pids[1], signal.SIGTERM)
            wait(pids)
        else:
            os.kill(pids[1], signal.SIGKILL)
            wait(pids[:1], code=2)


def kills(folder: Path, config: str) -> None:
    wait([fork(lambda: run(folder / "whole", config))])
    rng = random.Random(0)
    for _ in range(KILLS):
        before = written(folder / "killed")
        pid = fork(lambda: run(folder / "killed", config))
        wait_for_change(folder / "killed", pid, before)  # it gets on by a step at least
        time.sleep(rng.uniform(0.0, 0.12))  # then dies in a step or in a write
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended before the kill"
    wait([fork(lambda: run(folder / "killed", config))])


def written(folder: Path) -> int:
    """When the run's newest checkpoint was written, 0 if there is none."""
    last = folder / "checkpoints" / "last.pt"
    return last.stat().st_mtime_ns if last.exists() else 0


def wait_for_change(folder: Path, pid: int, before: int = 0) -> None:
    """Wait until the run writes a checkpoint; a run that ended will not."""
    while written(folder) == before:
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"ended without a checkpoint: {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.001)


if __name__ == "__main__":
    {"steps": steps, "kills": kills, "two": two, "one": one}[sys.argv[1]](
        Path(sys.argv[2]), sys.argv[3]
    )
