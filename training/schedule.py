"""Learning-rate schedules."""

from __future__ import annotations

import math


def learning_rate(
    step: int, progress: float, *, peak: float, schedule: str = "constant", warmup_steps: int = 0
) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: optimizer steps done before this one.
        progress: share of the run that is done, in [0, 1].
        peak: the rate after warm-up.
        schedule: `constant`, or `cosine` for half a cosine from `peak` to zero over the run.
        warmup_steps: the first steps, whose rate rises linearly to `peak`.
    """
    rate = peak
    if schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    if step < warmup_steps:
        rate *= (step + 1) / warmup_steps
    return rate
