"""Learning rates at the points that define a schedule."""

from __future__ import annotations

import pytest

from training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "progress", "schedule", "warmup_steps", "expected"),
    [
        (0, 0.0, "constant", 0, 2.0),
        (99, 0.99, "constant", 0, 2.0),
        (0, 0.0, "constant", 4, 0.5),
        (3, 0.0, "constant", 4, 2.0),
        (4, 0.1, "constant", 4, 2.0),
        (50, 0.5, "cosine", 0, 1.0),
        (0, 0.0, "cosine", 0, 2.0),
        (100, 1.0, "cosine", 0, 0.0),
        (120, 1.2, "cosine", 0, 0.0),
        (1, 0.5, "cosine", 4, 0.5),
    ],
)
def test_rate(
    step: int, progress: float, schedule: str, warmup_steps: int, expected: float
) -> None:
    rate = learning_rate(step, progress, peak=2.0, schedule=schedule, warmup_steps=warmup_steps)
    assert rate == pytest.approx(expected)
