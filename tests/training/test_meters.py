"""Means over steps and where their time went."""

from __future__ import annotations

import math

import pytest
import torch

from training.meters import Averages, Stopwatch


def test_skipped_steps_do_not_count_whatever_they_hold() -> None:
    averages = Averages()
    averages.add({"loss": torch.tensor(1.0)}, torch.tensor(1.0))
    averages.add({"loss": torch.tensor(math.nan)}, torch.tensor(0.0))
    averages.add({"loss": torch.tensor(3.0)}, torch.tensor(1.0))
    assert float(averages.means()["loss"]) == 2.0


def test_nothing_but_skipped_steps_has_no_mean() -> None:
    averages = Averages()
    averages.add({"loss": torch.tensor(1.0)}, torch.tensor(0.0))
    assert math.isnan(averages.means()["loss"])


def test_shares_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("data"):
            pass
    assert (watch.spent("data"), watch.spent("other"), watch.seconds) == (2.5, 0.0, 10.0)
