"""A run: its state, one optimizer step, and the loop around it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from models import BSMamba2, BSMamba2Config
from models.checkpoint import Checkpoint
from models.errors import InputError
from training.config import Config, TrainingSection
from training.data.mixing import Example
from training.ema import EMA
from training.loaders import Loaders
from training.logbook import Averages, Logbook, Row
from training.loss import SeparationLoss
from training.run_folder import RunFolder
from training.schedule import learning_rate
from training.signals import StopRequest
from training.validation import round_trip, validate

logger = logging.getLogger(__name__)

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The device that `training.device` names.

    Raises:
        InputError: it is a CUDA device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"training.device: no '{name}' here ({count} CUDA devices); use auto")
    return device


def make_optimizer(model: BSMamba2, settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW that decays all parameters alike, as the authors' training does."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Trainer:
    """A run: its state, one optimizer step, and the loop around it.

    Args:
        config: the whole configuration.
        folder: where the run writes.
        checkpoint: what to go on from; None starts afresh.

    Raises:
        InputError: the data set, the device or the checkpoint does not fit the configuration.
    """

    def __init__(self, config: Config, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
        self.config = config
        self.settings = config.training
        self.folder = folder
        self.device = resolve_device(self.settings.device)
        self.loaders = Loaders(config, folder)
        torch.set_float32_matmul_precision("high" if self.settings.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.settings.tf32
        torch.manual_seed(self.settings.seed)
        self.model = BSMamba2(config.model).to(self.device)
        self.network: Callable[[Tensor], Tensor] = self.model
        if self.settings.compile:
            self.network = torch.compile(self.model)
        self.loss = SeparationLoss(**config.loss.model_dump()).to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings)
        fp16 = self.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.ema = EMA(self.model, self.settings.ema_decay)
        self.step = 0  # optimizer steps done
        self.examples = 0  # examples consumed, which is the position in the data stream
        self.best_usdr = -math.inf
        self.seconds_before = 0.0
        if checkpoint is not None:
            self.load(checkpoint)
        self.started = time.monotonic()
        logger.info(
            "%s parameters on %s in %s, %d segments of %g s a step",
            f"{sum(p.numel() for p in self.model.parameters()):,}",
            self.device,
            self.settings.precision,
            self.settings.batch_size * self.settings.accumulation,
            config.data.segment_seconds,
        )

    @property
    def seconds(self) -> float:
        """Training time of the run, over all its resumed parts."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is further."""
        progress = self.step / self.settings.max_steps
        if self.settings.max_minutes is not None:
            progress = max(progress, self.seconds / 60 / self.settings.max_minutes)
        return progress

    def run(self) -> int:
        """Train until a limit or a stop request, and return the exit code."""
        settings = self.settings
        logbook = Logbook(
            self.folder.root,
            step=self.step,
            max_steps=settings.max_steps,
            tensorboard=self.config.run.tensorboard,
        )
        batches = self.loaders.training(self.examples)
        averages = Averages()
        with closing(logbook), logging_redirect_tqdm(), StopRequest() as stop:
            while self.progress < 1 and not stop:
                averages.add(self.train_step(batches))
                logbook.advance()
                finished = self.progress >= 1
                validates = finished or self.step % settings.validate_every == 0
                if validates or stop or self.step % settings.log_every == 0:
                    row = self.row(averages)
                    averages = Averages()
                    if validates:
                        row |= self.validate(logbook)
                    logbook.write(row)
                if finished or stop or self.step % settings.checkpoint_every == 0:
                    self.save()
        verb = "stopped" if stop else "finished"
        logger.info("%s at step %d: %s", verb, self.step, self.folder.checkpoints)
        return stop.exit_code

    def train_step(self, batches: Iterator[Example]) -> dict[str, Tensor | float]:
        """One optimizer step on `accumulation` batches; returns what to log.

        Raises:
            InputError: the loss or the gradient is not finite; the weights are as they were.
        """
        started = time.monotonic()
        rate = learning_rate(
            self.step,
            self.progress,
            peak=self.settings.learning_rate,
            schedule=self.settings.schedule,
            warmup_steps=self.settings.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = Averages()
        for _ in range(self.settings.accumulation):
            losses.add(self.backward(next(batches)))
        means = losses.means()
        means["grad_norm"] = self.update(torch.as_tensor(means["loss"]))
        means["seconds_per_step"] = time.monotonic() - started
        return means

    def backward(self, batch: Example) -> dict[str, Tensor]:
        """Forward and backward pass of one batch; returns the loss and its terms."""
        mixture = batch["mixture"].to(self.device, non_blocking=True)  # b c t
        target = batch["target"].to(self.device, non_blocking=True)  # b n c t
        self.examples += len(mixture)
        loss, terms = self.loss(self.estimate(mixture), round_trip(self.model, target))
        self.scaler.scale(loss / self.settings.accumulation).backward()
        return {"loss": loss.detach(), **{f"loss_{name}": term for name, term in terms.items()}}

    def estimate(self, mixture: Tensor) -> Tensor:
        """The network in the training's precision: `[b, c, t]` -> `[b, n, c, t]`."""
        dtype = AUTOCAST_TYPES[self.settings.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.network(mixture)

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradient, step the optimizer and the average; returns the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        # The scaler lowers its scale and skips the step where an fp16 gradient overflows.
        checked = loss if self.scaler.is_enabled() else loss + norm
        if not torch.isfinite(checked):
            raise InputError(
                f"step {self.step + 1}: the loss ({float(loss):g}) or its gradient"
                f" ({float(norm):g}) is not finite, stopped before the weights changed:"
                " lower training.learning_rate or try training.precision=fp32"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        return norm

    def row(self, averages: Averages) -> Row:
        """The means since the last row as plain numbers."""
        means = {name: float(value) for name, value in averages.means().items()}
        examples = self.settings.batch_size * self.settings.accumulation
        return {
            "step": self.step,
            **means,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "examples_per_second": examples / means["seconds_per_step"],
            "seconds": self.seconds,
        }

    def validate(self, logbook: Logbook) -> Row:
        """Score the averaged weights, keep them if they are the best so far."""
        with self.ema.applied(self.model):
            result = validate(self.estimate, self.model, self.loss, self.loaders.validation())
        for number, name in enumerate(self.model.config.stem_names):
            waves = {kind: wave[number] for kind, wave in result.example.items()}
            logbook.write_example(waves, self.model.config.sample_rate, self.step, name)
        if result.mean_usdr > self.best_usdr:
            self.best_usdr = result.mean_usdr
            self.folder.save_best(self.config.model, self.weights(), self.step, self.best_usdr)
        per_stem = {f"valid_usdr_{name}": score for name, score in result.usdr.items()}
        return {"valid_loss": result.loss, "valid_usdr": result.mean_usdr, **per_stem}

    def weights(self) -> dict[str, Tensor]:
        """The weights that ship. The authors' checkpoints hold the raw ones: save_ema=false."""
        if self.settings.save_ema:
            return self.ema.model_state(self.model)
        return self.model.state_dict()

    def save(self) -> None:
        """Write a checkpoint that `load` goes on from."""
        training: dict[str, Any] = {
            "step": self.step,
            "examples": self.examples,
            "seconds": self.seconds,
            "best_usdr": self.best_usdr,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
            "config": self.config.model_dump(mode="json"),
        }
        if not self.settings.save_ema:
            training["ema"] = self.ema.state_dict()
        self.folder.save_last(self.config.model, self.weights(), training, self.step)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint.

        Raises:
            InputError: it is of another network than the configuration's.
        """
        training = checkpoint.training
        check_same_network(checkpoint.config, self.config.model)
        self.model.load_state_dict(training["weights"])
        self.ema.load_state_dict(training.get("ema", checkpoint.state_dict))
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        for group in self.optimizer.param_groups:
            # The configuration rules, also where it changed since.
            group["betas"] = self.settings.betas
            group["weight_decay"] = self.settings.weight_decay
        self.step = training["step"]
        self.examples = training["examples"]
        self.best_usdr = training["best_usdr"]
        self.seconds_before = training["seconds"]
        set_random_states(training["random"])
        logger.info("resumed at step %d", self.step)


def check_same_network(saved: BSMamba2Config, wanted: BSMamba2Config) -> None:
    """Compare a checkpoint's network with the configuration's, but for how it is computed.

    Raises:
        InputError: they differ; the line names the first key.
    """
    for field in dataclasses.fields(BSMamba2Config):
        if field.name in ("scan_backend", "gradient_checkpointing"):
            continue
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if old != new:
            raise InputError(
                f"model.{field.name}: the checkpoint has {old}, the configuration {new};"
                " make them agree or use another run.dir"
            )


def random_states() -> dict[str, Any]:
    """States of torch's generators; the stream of examples has none, it counts."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave; CUDA's only where the number of devices agrees."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
