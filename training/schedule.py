"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


def learning_rate(
    step: int, progress: float, *, peak: float, schedule: str = "constant", warmup_steps: int = 0
) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: optimizer steps done before this one.
        progress: share of the run that is done, in [0, 1].
        peak: the rate after warm-up.
        schedule: `cosine` for half a cosine from `peak` to zero over the run; `peak` otherwise.
        warmup_steps: the first steps, whose rate rises linearly to `peak`.
    """
    rate = peak
    if schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    if step < warmup_steps:
        rate *= (step + 1) / warmup_steps
    return rate


@dataclass
class Plateau:
    """Lowers the learning rate when the validation score has stopped rising.

    Attributes:
        factor: what the rate is multiplied with each time.
        patience: validations in a row without a new best score before that happens.
        scale: product of the factors so far.
        best: best score so far, in dB.
        waited: validations since then.
    """

    factor: float
    patience: int
    scale: float = 1.0
    best: float = -math.inf
    waited: int = 0

    def note(self, score: float) -> None:
        """Take in the score of a validation."""
        if score > self.best:
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.scale *= self.factor
            self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; factor and patience are the configuration's."""
        return {key: asdict(self)[key] for key in ("scale", "best", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.scale, self.best, self.waited = state["scale"], state["best"], state["waited"]
