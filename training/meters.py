"""Numbers between two log rows: means of what steps report, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.trainer import Trainer


class Averages:
    """Running means of named numbers, which stay on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: Tensor | float = 0.0

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Take in one value of every name; with weight 0 nothing, whatever the values are."""
        for name, value in values.items():
            if isinstance(weight, Tensor):
                value = torch.where(weight > 0, value, 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count = self._count + weight

    def means(self) -> dict[str, Tensor]:
        """The means by name; NaN where everything had weight 0."""
        return {name: total / self._count for name, total in self._sums.items()}


class Stopwatch:
    """Time of a run between two rows, and the shares of it spent on named things."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.monotonic() - started

    def spent(self, name: str) -> float:
        """Seconds spent on `name`."""
        return self._spent.get(name, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started


def training_row(trainer: Trainer) -> dict[str, float]:
    """What happened since the last row, as plain numbers, over all ranks."""
    means = trainer.averages.means()
    values = [float(value) for value in trainer.world.mean(list(means.values()))]
    # Read after the means, which wait for the steps to end.
    watch, steps = trainer.row_watch, max(1, trainer.step - trainer.row_step)
    rate = steps * trainer.examples_per_step / watch.seconds
    row = {
        "step": trainer.step,
        **dict(zip(means, values, strict=True)),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "seconds_per_step": watch.seconds / steps,
        "examples_per_second": rate,
        "real_time_factor": rate * trainer.config.data.segment_seconds,
        "skipped_steps": trainer.skipped,
        "seconds": trainer.seconds,
        "seconds_left": trainer.seconds * max(0.0, 1 / max(trainer.progress, 1e-9) - 1),
    }
    row |= trainer.curriculum.row()
    # The largest of any rank: one that waits makes all wait, and each trains on every file.
    own = {"data_wait_share": watch.spent("data") / watch.seconds}
    own |= trainer.loaders.read_failures()
    if trainer.device.type == "cuda":
        own["gpu_memory_gib"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
    ranks = trainer.world.gather(own)
    row |= {name: max(rank[name] for rank in ranks) for name in own}
    lost = "data/lost_valid_segments"  # of which each has its own
    return row | {lost: sum(rank[lost] for rank in ranks)}
