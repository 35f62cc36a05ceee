"""Several processes on the CPU, joined by Gloo, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.checkpoint import Checkpoint, read_checkpoint
from models.errors import InputError
from training.distributed import Agreement, World, joined_world
from training.setup import resolve_device

MAIN = Path(__file__).parents[2]
FORKED = Path(__file__).with_name("forked.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(MAIN), "OMP_NUM_THREADS": "1"}


def run_forked(*words: str | Path) -> str:
    command = [sys.executable, str(FORKED), *map(str, words)]
    result = subprocess.run(
        command, cwd=MAIN, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_every_rank_has_a_gpu(have_devices) -> None:
    have_devices(2)
    assert resolve_device("auto", World(1, 2, 1)) == torch.device("cuda", 1)
    assert resolve_device("cuda:1", World()) == torch.device("cuda", 1)
    assert resolve_device("cuda", World()) == torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"^training.device: 'cuda:1' is one GPU for 2 ranks"):
        resolve_device("cuda:1", World(0, 2, 0))
    with pytest.raises(InputError, match=r"^3 processes or more for 2 GPUs: start fewer$"):
        resolve_device("cuda", World(2, 3, 2))


def test_a_step_on_several_ranks_equals_one_on_their_batches(
    tiny_config: Path, tmp_path: Path
) -> None:
    run_forked("steps", tmp_path, tiny_config)
    one, *others = (dict(torch.load(tmp_path / f"{ranks}.pt")) for ranks in (1, 2, 3))
    for several in others:
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert several["scores"] == pytest.approx(one["scores"], rel=1e-7)
        for name, weight in one["weights"].items():
            assert weight.dtype == torch.float64
            difference = (several["weights"][name] - weight).norm() / weight.norm()
            assert float(difference) < 1e-6, name


def test_run_on_two_ranks_killed_and_resumed_equals_a_whole_one(
    tiny_config: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 20, "checkpoint_every": 10, "validate_every": 10, "accumulation": 1}
    config = change(tiny_config, training=changes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "training.train", "--config", str(config)]
    command += [f"run.dir={tmp_path / 'whole'}"]
    whole = subprocess.Popen(command, cwd=MAIN, env=ENVIRONMENT, stderr=subprocess.PIPE)
    run_forked("two", tmp_path, config)
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors.decode()
    left = read_checkpoint(tmp_path / "left" / "checkpoints" / "last.pt")
    assert left.training["step"] == 10
    states = [
        read_checkpoint(tmp_path / n / "checkpoints" / "last.pt") for n in ("whole", "killed")
    ]
    assert_same_run(states[0], states[1])
    assert states[1].training["examples"] == 40


def test_one_rank_stopped_or_lost_ends_the_run_on_all(tiny_config: Path, tmp_path: Path) -> None:
    training = {"max_steps": 10_000, "checkpoint_every": 3, "validate_every": 10_000}
    errors = run_forked("one", tmp_path, change(tiny_config, training=training))
    # SIGTERM to a run and its data workers; then to rank 1 alone: both ranks finish a step, and
    # rank 0 writes the checkpoint of it.
    stopped = [line for line in errors.splitlines() if "stopped at step" in line]
    assert len(stopped) == 2
    for name, line in zip(("group", "stopped"), stopped, strict=True):
        checkpoint = read_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
        assert f"stopped at step {checkpoint.training['step']}:" in line
    # kill -9 of rank 1: rank 0 ends with one line, its checkpoint is whole.
    lost = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lost) == 1 and "rank 0 stops, since another one is gone" in lost[0]
    assert "Traceback" not in errors
    assert read_checkpoint(tmp_path / "orphaned" / "checkpoints" / "last.pt").training["step"] >= 3


def change(config: Path, **sections: dict[str, Any]) -> Path:
    """A configuration file beside another, with other values."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    path = config.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def read_both(folder: Path, name: str) -> list[Checkpoint]:
    """A checkpoint of the whole run and of the killed one."""
    return [read_checkpoint(folder / run / "checkpoints" / name) for run in ("whole", "killed")]


def assert_same_run(one: Checkpoint, other: Checkpoint) -> None:
    """Bit for bit: raw weights, averages and moments."""
    pairs = [(one.state_dict, other.state_dict)]
    pairs.append((one.training["weights"], other.training["weights"]))
    moments = [s.training["optimizer"]["state"] for s in (one, other)]
    pairs += [(moments[0][key], moments[1][key]) for key in moments[0]]
    for left, right in pairs:
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name


@pytest.mark.slow
def test_run_killed_twenty_times_equals_a_whole_one(tiny_config: Path, tmp_path: Path) -> None:
    training = {"max_steps": 100, "checkpoint_every": 1, "validate_every": 20, "accumulation": 1}
    config = change(
        tiny_config,
        data={"segment_seconds": 0.06},
        loss={"windows": [256]},
        training=training,
    )
    run_forked("kills", tmp_path, config)
    states = [
        read_checkpoint(tmp_path / n / "checkpoints" / "last.pt") for n in ("whole", "killed")
    ]
    assert_same_run(states[0], states[1])
    bests = [read_checkpoint(tmp_path / n / "checkpoints" / "best.pt") for n in ("whole", "killed")]
    assert bests[0].training["step"] == bests[1].training["step"]
    rows = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "killed")]
    assert len(rows[0]) == len(rows[1]) == 100
    names = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert names == {"last.pt", "best.pt", "step_00000098.pt", "step_00000099.pt"}


def test_incomplete_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="start several processes with torchrun"), joined_world():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(InputError, match="rank 0 cannot join the others.*MASTER_ADDR"),
        joined_world(),
    ):
        pass


def test_alone_a_proposal_is_the_answer_at_once() -> None:
    agreement = Agreement(World())
    assert agreement.propose([2.0, 5.0]) == [2.0, 5.0]
    assert agreement.close() is None
