"""Steps without a finite gradient: skipped, counted, explained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import InputError
from training.config import load_config
from training.data.mixing import RandomMixes
from training.finite import FiniteGuard
from training.run_folder import RunFolder
from training.train import main
from training.trainer import Trainer


def make_trainer(config: Path, *overrides: str) -> Trainer:
    parsed = load_config(config, overrides)
    return Trainer(parsed, RunFolder(parsed.run.dir), None)


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in trainer.model.parameters()]
    for moments in trainer.optimizer.state.values():
        tensors += [value.clone() for value in moments.values()]
    return tensors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_is_skipped_and_the_next_is_as_if_it_had_not_been(
    tiny_config: Path, precision: str, value: float
) -> None:
    words = [f"training.precision={precision}", "training.accumulation=1"]
    trainer, other = (make_trainer(tiny_config, *words) for _ in range(2))
    good = next(trainer.loaders.training(0))
    broken = {name: wave.clone() for name, wave in good.items()}
    broken["target"][0, 0, 0, 100] = value
    trainer.train_step(iter([good]))
    before = state_of(trainer)
    trainer.train_step(iter([broken]))
    assert all(map(torch.equal, before, state_of(trainer)))
    assert (trainer.step, int(trainer.guard.total), trainer.guard.in_row()) == (2, 1, 1)
    trainer.train_step(iter([good]))
    assert trainer.guard.in_row() == 0
    for _ in range(2):
        other.train_step(iter([good]))
    assert all(map(torch.equal, state_of(trainer), state_of(other)))
    row = trainer.row()
    assert row["skipped_steps"] == 1 and math.isfinite(row["loss"])


def test_guard_counts_a_row_and_the_whole() -> None:
    guard = FiniteGuard(torch.device("cpu"))
    rows = []
    for skipped in (1.0, 1.0, 0.0, 1.0):
        guard.note(torch.tensor(skipped))
        rows.append(guard.in_row())
    assert rows == [1, 2, 0, 1]
    assert int(guard.total) == 3


def test_too_many_in_a_row_stop_with_the_tensor_and_the_batch(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = RandomMixes.__getitem__

    def draw_broken(self: RandomMixes, i: int) -> Any:
        example = draw(self, i)
        if i >= 4:
            example["mixture"][0, 7] = math.nan
        return example

    monkeypatch.setattr(RandomMixes, "__getitem__", draw_broken)
    words = ["training.max_bad_steps=3", "training.max_steps=50", "training.checkpoint_every=2"]
    with pytest.raises(InputError, match=r"^step 5 rank 0: .*first in the mixture of the batch"):
        main(["--config", str(tiny_config), *words])
    saved = torch.load(tmp_path / "run" / "step_5_rank_0.pt")
    assert saved["tensor"] == "the mixture of the batch"
    assert saved["mixture"].isnan().sum() == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("final_norm.gamma", "the weight final_norm.gamma"),
        ("a module", "the output of layers.0.1"),
        ("the loss", "the norm of the gradient"),
    ],
)
def test_the_first_bad_tensor_is_named(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    trainer = make_trainer(tiny_config, "training.accumulation=1")
    if name == "a module":
        block = trainer.model.layers[0][1]
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *args: forward(*args) * math.inf)
    elif name == "the loss":
        trainer.loss.time_weight = 1e25  # each gradient is finite, their squares are not
    else:
        with torch.no_grad():
            trainer.model.get_parameter(name)[0] = math.nan
    trainer.train_step(trainer.loaders.training(0))
    with pytest.raises(InputError, match=message):
        trainer._stop_at_bad_step()
