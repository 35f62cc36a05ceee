"""A run: its state, one optimizer step, and the loop around it."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.contrib.logging import logging_redirect_tqdm

from models import BSMamba2
from models.checkpoint import Checkpoint
from training.config import Config
from training.curriculum import TargetGain
from training.data.mixing import Example
from training.distributed import Agreement, World
from training.ema import EMA
from training.finite import FiniteGuard, stop_at_bad_step
from training.loaders import Loaders
from training.logbook import Logbook, Row, quiet_tensorboard
from training.loss import SeparationLoss
from training.meters import Averages, Stopwatch, training_row
from training.run_folder import RunFolder
from training.schedule import Plateau, learning_rate
from training.setup import (
    AUTOCAST_TYPES,
    Network,
    apply_switches,
    make_network,
    make_optimizer,
    replicate,
    resolve_device,
)
from training.signals import StopRequest, exit_code
from training.state import (
    Position,
    check_ranks_agree,
    resume,
    start_from_weights,
    training_state,
)
from training.validation import round_trip, show_examples, tell_of_failure, validate
from training.writer import BackgroundWriter, on_host, snapshot

logger = logging.getLogger(__name__)


class Trainer:
    """A run: its state, one optimizer step, and the loop around it.

    Args:
        config: the whole configuration.
        folder: where the run writes.
        checkpoint: what to go on from; None starts afresh.
        world: this process among those of the run.

    Raises:
        InputError: the data set, the device or the checkpoint does not fit the configuration.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.settings = config.training
        self.folder = folder
        self.world = world or World()
        self.device = resolve_device(self.settings.device, self.world)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and streams are the current device's
        with self.world.main_first():  # rank 0 indexes the data set
            self.loaders = Loaders(config, folder, self.world.rank, self.world.size)
        apply_switches(self.settings)
        self.model = BSMamba2(config.model).to(self.device)
        self.network = make_network(self.model, config)
        self.loss = SeparationLoss(**config.loss.model_dump()).to(self.device)
        self.optimizer = make_optimizer(self.model, self.settings)
        fp16 = self.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.ema = EMA(self.model, self.settings.ema_decay, self.settings.ema_share)
        self.curriculum = TargetGain(config.curriculum, self.device, self.world)
        self.plateau = Plateau(self.settings.plateau_factor, self.settings.plateau_patience)
        self.position = Position()
        if checkpoint is not None:
            resume(self, checkpoint)
        elif self.settings.init_from is not None:
            start_from_weights(self, self.settings.init_from)
        check_ranks_agree(self)
        # After the weights, which it takes from rank 0.
        self.replicas = replicate(self.network, self.device, self.world)
        self.guard = FiniteGuard(self.device)
        self.recent: deque[int] = deque(maxlen=2)  # first examples of the newest steps
        self.clock = self.position.seconds  # the one that all ranks agree on
        self.watch = Stopwatch()  # of this process
        self.row_watch, self.row_step = Stopwatch(), self.position.step
        self.averages = Averages()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def seconds(self) -> float:
        """Training time of the run, over all its resumed parts."""
        return self.position.seconds + self.watch.seconds

    @property
    def skipped(self) -> int:
        """Steps skipped, over all resumed parts of the run."""
        return self.position.skipped + int(self.guard.total)

    @property
    def examples_per_step(self) -> int:
        """Examples that all ranks together make one optimizer step of."""
        return self.settings.batch_size * self.settings.accumulation * self.world.size

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps or of its time, whichever is further."""
        progress = self.step / self.settings.max_steps
        if self.settings.max_minutes is not None:
            progress = max(progress, self.clock / 60 / self.settings.max_minutes)
        return progress

    def run(self) -> int:
        """Train until a limit or a stop request, and return the exit code."""
        batches = self.loaders.training(self.position.examples)
        agreement = Agreement(self.world)
        number = 0
        # Signals are taken until the last checkpoint is on disk.
        with StopRequest() as stop, self.reporting() as logbook:
            while self.progress < 1 and not number:
                self.train_step(batches)
                proposal = [float(stop.signal or 0), self.seconds]
                agreed = agreement.propose(proposal)
                # The ranks' clocks differ, their learning rates must not.
                number, self.clock = int(agreed[0]), max(self.clock, agreed[1])
                self._after_step(logbook, bool(number))
            agreement.close()
        verb = "stopped" if number else "finished"
        logger.info("%s at step %d: %s", verb, self.step, self.folder.checkpoints)
        return exit_code(number)

    @contextmanager
    def reporting(self) -> Iterator[Logbook | None]:
        """The checkpoint writer and, on rank 0, the logbook, until the body ends."""
        with ExitStack() as stack:
            self.writer = stack.enter_context(BackgroundWriter())
            stack.enter_context(logging_redirect_tqdm())
            logbook = None
            if self.world.is_main:
                stack.enter_context(quiet_tensorboard())
                logbook = Logbook(
                    self.folder.root,
                    step=self.step,
                    max_steps=self.settings.max_steps,
                    tensorboard=self.config.run.tensorboard,
                )
                stack.enter_context(closing(logbook))
            yield logbook

    def _after_step(self, logbook: Logbook | None, stops: bool) -> None:
        settings = self.settings
        if logbook is not None:
            logbook.advance()
        finished = self.progress >= 1
        validates = finished or self.step % settings.validate_every == 0
        saves = finished or stops or self.step % settings.checkpoint_every == 0
        saves = saves and self.world.is_main
        # Queued while a GPU is at work on the step, which a row waits for.
        taken = self.snapshot() if saves and not validates else None
        if validates or stops or self.step % settings.log_every == 0:
            row = self.row()
            if validates:
                row |= self.validate(logbook)
            if logbook is not None:
                logbook.write(row)
            self.row_watch = Stopwatch()
        if saves:
            self.save(taken)
        self.writer.check()
        if self.guard.in_row() >= settings.max_bad_steps:
            self._stop_at_bad_step()

    def _stop_at_bad_step(self) -> NoReturn:
        """Look into the newest steps, whose examples can be drawn again from their numbers."""
        shares = [self.loaders.step(start, self.examples_per_step) for start in self.recent]
        name = f"step {self.step} rank {self.world.rank}"
        batches = itertools.chain.from_iterable(reversed(shares))
        stop_at_bad_step(self.model, batches, self._plain_loss, name, self.folder.root)

    def train_step(self, batches: Iterator[Example]) -> dict[str, Tensor]:
        """One optimizer step on `accumulation` batches a rank; returns what to log.

        The step is skipped where the gradient is not finite: weights and moments stay.
        """
        rate = self.plateau.scale * learning_rate(
            self.step,
            self.progress,
            peak=self.settings.learning_rate,
            schedule=self.settings.schedule,
            warmup_steps=self.settings.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.recent.append(self.position.examples)
        losses = Averages()
        for number in range(1, self.settings.accumulation + 1):
            with self.row_watch.measure("data"):
                batch = next(batches)
            losses.add(self.backward(batch, exchange=number == self.settings.accumulation))
        norm, skipped = self.update()
        means = losses.means() | {"grad_norm": norm}
        self.averages.add(means, 1 - skipped)
        return means

    def backward(self, batch: Example, exchange: bool = True) -> dict[str, Tensor]:
        """Forward and backward pass of one batch; returns the loss and its terms.

        exchange: whether the ranks average their gradients now; they do so once a step.
        """
        with nullcontext() if exchange else self._without_exchange():
            loss, terms = self._losses(self.replicas, batch)
            # One where the loss is finite; else its gradient shall not be either, on any rank.
            factor = (1 + 0 * loss.detach()) / self.settings.accumulation
            self.scaler.scale(loss * factor).backward()
        return {"loss": loss.detach(), **{f"loss_{name}": term for name, term in terms.items()}}

    def _without_exchange(self) -> AbstractContextManager[None]:
        if isinstance(self.replicas, DistributedDataParallel):
            return self.replicas.no_sync()
        return nullcontext()

    def _losses(self, network: Network, batch: Example) -> tuple[Tensor, dict[str, Tensor]]:
        mixture = batch["mixture"].to(self.device, non_blocking=True)  # b c t
        target = batch["target"].to(self.device, non_blocking=True)  # b n c t
        mixture, target = self.curriculum.louder(mixture, target)
        with self.autocast():
            estimate = network(mixture)
        target = round_trip(self.model, target)
        self.curriculum.observe(estimate, target)
        return self.loss(estimate, target)

    def _plain_loss(self, batch: Example) -> Tensor:
        return self._losses(self.model, batch)[0]

    def autocast(self) -> torch.autocast:
        """The precision of the training."""
        dtype = AUTOCAST_TYPES[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def estimate(self, mixture: Tensor) -> Tensor:
        """The network in the training's precision: `[b, c, t]` -> `[b, n, c, t]`."""
        with self.autocast():
            return self.network(mixture)

    def update(self) -> tuple[Tensor, Tensor]:
        """Clip the gradient, step the optimizer and the average.

        Returns:
            The gradient's norm, and 1 where it was not finite and the weights stayed, else 0.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        skipped = (~norm.isfinite()).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused optimizer skips the step on the device; the host does not wait to know.
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.ema.update(self.model, self.step)
        self.curriculum.step()
        self.guard.note(skipped)
        self.position.examples += self.examples_per_step
        return norm, skipped

    def row(self) -> Row:
        """What happened since the last row, as plain numbers, over all ranks."""
        row = training_row(self)
        self.averages, self.row_step = Averages(), self.step
        return row

    def validate(self, logbook: Logbook | None) -> Row:
        """Score the averaged weights, keep them if they are the best so far."""
        with self.ema.applied(self.model):
            batches = self.loaders.validation()
            result = validate(self.estimate, self.model, self.loss, batches, self.world)
            if logbook is not None and self.config.run.tensorboard:
                show_examples(
                    logbook,
                    self.estimate,
                    self.model,
                    self.loaders.segments,
                    count=self.config.run.examples,
                    step=self.step,
                )
        if self.settings.schedule == "plateau":
            self.plateau.note(result.mean_usdr)
        if result.mean_usdr > self.position.best_usdr:
            self.position.best_usdr = result.mean_usdr
            self._save_best()
        tell_of_failure(result, self.step)
        return result.row()

    def weights(self) -> dict[str, Tensor]:
        """The weights that ship. The authors' checkpoints hold the raw ones: save_ema=false."""
        if self.settings.save_ema:
            return self.ema.model_state(self.model)
        return self.model.state_dict()

    def _save_best(self) -> None:
        if not self.world.is_main:
            return
        weights, step, usdr = snapshot(self.weights()), self.step, self.position.best_usdr
        config = self.config.model
        self.writer.submit(lambda: self.folder.save_best(config, on_host(weights), step, usdr))

    def save(self, taken: tuple[Any, Any] | None = None) -> None:
        """Write, in the background, a checkpoint that `--resume` goes on from; rank 0's task.

        taken: what `snapshot` gave for this step; None takes it now.
        """
        copies = taken or self.snapshot()
        config, step = self.config.model, self.step

        def write() -> None:
            weights, training = on_host(copies)  # waits for the step, in this thread
            training["skipped"] = int(training["skipped"])
            self.folder.save_last(config, weights, training, step)

        self.writer.submit(write)

    def snapshot(self) -> tuple[Any, Any]:
        """The weights that ship and the state beside them, as they are after the last step."""
        return snapshot((self.weights(), training_state(self)))
