"""The loop's benchmark: what it makes of the rows of a run, and of a run that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loop
from benchmarks.runs import Launch, median_step, steady
from models import InputError

EVERY = 10


def test_steps_beside_checkpoints_are_held_against_the_others() -> None:
    seconds = [1.0] * 46
    seconds[EVERY - 1] = seconds[EVERY] = 50.0  # the first checkpoint, which allocates
    seconds[2 * EVERY - 1] = 1.7  # the snapshot of the second
    seconds[2 * EVERY], seconds[3 * EVERY + 4] = 1.5, 1.2  # while two are written
    seconds[-1] = 9.0  # the end of the run
    longest, mean = loop._beside_checkpoints(seconds, EVERY)
    assert longest == 1.7
    assert mean == pytest.approx((15 + 1.7 + 1.5 + 1.2) / 18)


def test_a_step_is_the_median_without_start_and_end() -> None:
    rows = [{"seconds_per_step": s} for s in (9.0, 9.0, 1.0, 2.0, 1.0, 8.0)]
    assert median_step(steady(rows)) == 1.0


def test_a_run_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    config = loop.MAIN / "configs" / "demo.yaml"
    launch = Launch(config, tmp_path, [f"data.root={tmp_path / 'none'}"])
    with pytest.raises(InputError, match=r"first failed \(2\).*none"):
        launch.finish("first", None)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(InputError, match="--steps 3"):
        loop.main(["--steps", "3"])
