"""What a checkpoint of a run holds besides the weights that ship, and how a run takes it over."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import BSMamba2Config
from models.checkpoint import Checkpoint, read_checkpoint
from models.errors import InputError
from models.provenance import provenance

if TYPE_CHECKING:
    from training.trainer import Trainer

logger = logging.getLogger(__name__)

# How the network is computed may change between two parts of a run.
_NOT_THE_NETWORK = ("scan_backend", "gradient_checkpointing")


@dataclass
class Position:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        examples: examples consumed by all ranks: the position in the data stream.
        seconds: training time, over all resumed parts.
        best_usdr: best validation score so far, in dB.
        skipped: steps whose gradient was not finite.
    """

    step: int = 0
    examples: int = 0
    seconds: float = 0.0
    best_usdr: float = -math.inf
    skipped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, training: Mapping[str, Any]) -> Position:
        """The position that a checkpoint holds; what older ones lack is as at the start."""
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: training[name] for name in names if name in training}
        return cls(**values | {"skipped": int(values.get("skipped", 0))})


def training_state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds besides the weights that ship, for `resume`.

    Counts that live on the device stay tensors: reading one would wait for the step.
    """
    state: dict[str, Any] = {
        **trainer.position.as_dict(),
        "skipped": trainer.position.skipped + trainer.guard.total,
        "seconds": trainer.seconds,
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "plateau": trainer.plateau.state_dict(),
        "curriculum": trainer.curriculum.state_dict(),
        "random": random_states(),
        "config": trainer.config.model_dump(mode="json"),
        "provenance": provenance(),
    }
    if not trainer.settings.save_ema:
        state["ema"] = trainer.ema.state_dict()
    return state


def resume(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Take over the state of a run's checkpoint.

    Raises:
        InputError: it is of another network than the configuration's.
    """
    training = checkpoint.training
    check_same_network(checkpoint.config, trainer.config.model)
    trainer.model.load_state_dict(training["weights"])
    trainer.ema.load_state_dict(training.get("ema", checkpoint.state_dict))
    trainer.optimizer.load_state_dict(training["optimizer"])
    if training["scaler"] and trainer.scaler.is_enabled():  # else the precision has changed
        trainer.scaler.load_state_dict(training["scaler"])
    trainer.plateau.load_state_dict(training["plateau"])
    trainer.curriculum.load_state_dict(training.get("curriculum", {}))
    for group in trainer.optimizer.param_groups:
        # The configuration rules, also where it changed since.
        group["betas"] = trainer.settings.betas
        group["weight_decay"] = trainer.settings.weight_decay
    trainer.position = Position.from_checkpoint(training)
    if not trainer.folder.best.exists():  # a new folder: its best is yet to come
        trainer.position.best_usdr = -math.inf
    set_random_states(training["random"])
    log_changes(training["config"], trainer.config.model_dump(mode="json"))
    logger.info("resumed at step %d", trainer.step)


def start_from_weights(trainer: Trainer, path: Path) -> None:
    """Start at step 0 from the weights of any checkpoint.

    Raises:
        InputError: they are of another network than the configuration's.
    """
    found = read_checkpoint(path)
    check_same_network(found.config, trainer.config.model, fine_tuning=True)
    trainer.model.load_state_dict(found.state_dict)
    trainer.ema.load_state_dict(found.state_dict)
    logger.info("weights from %s", path)


def check_ranks_agree(trainer: Trainer) -> None:
    """All ranks must go on from one place in one stream, which one folder and data set give.

    Raises:
        InputError: they do not.
    """
    windows = {stem: len(rows) for stem, rows in trainer.loaders.mixes.windows.items()}
    ranks = trainer.world.gather((trainer.step, windows))
    if any(rank != ranks[0] for rank in ranks):
        raise InputError(
            f"the ranks start at different steps or with different segments ({ranks}): run.dir"
            " and the data must be the same on all machines"
        )


def check_same_network(
    saved: BSMamba2Config, wanted: BSMamba2Config, fine_tuning: bool = False
) -> None:
    """Compare a checkpoint's network with the configuration's, but for how it is computed.

    fine_tuning: the names of the stems may differ too, for weights of one stem may start another.

    Raises:
        InputError: they differ; the line names the first key.
    """
    ignored = (*_NOT_THE_NETWORK, "stem_names") if fine_tuning else _NOT_THE_NETWORK
    remedy = "other weights in training.init_from" if fine_tuning else "another run.dir"
    for field in dataclasses.fields(BSMamba2Config):
        if field.name in ignored:
            continue
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if old != new:
            raise InputError(
                f"model.{field.name}: the checkpoint has {old}, the configuration {new};"
                f" make them agree or use {remedy}"
            )


def log_changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Tell which keys of the configuration changed since a checkpoint was written."""
    for section, values in wanted.items():
        before = saved.get(section, {})
        for key, value in values.items():
            if key in before and before[key] != value:
                logger.info("%s.%s changed from %s to %s", section, key, before[key], value)


def random_states() -> dict[str, Any]:
    """States of torch's generators; the stream of examples has none, it counts."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave; CUDA's only where the number of devices agrees."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
