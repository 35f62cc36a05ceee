"""Differences between evaluations of the same tracks, with a paired test over tracks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """One score of one estimate against another's, over the tracks both have.

    Attributes:
        tracks: how many tracks have finite scores in both.
        wins, losses: tracks where the first is above, below.
        median, mean: of the differences, first minus second.
        p_value: two-sided Wilcoxon signed-rank test that the differences are symmetric about 0;
            NaN without tracks, 1 if all are equal. Not corrected for several comparisons.
    """

    tracks: int
    wins: int
    losses: int
    median: float
    mean: float
    p_value: float


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Compare two mappings from track to score; a score that is NaN or infinite does not count."""
    names = [name for name in first if name in second]
    values = np.array([first[name] - second[name] for name in names])
    values = values[np.isfinite(values)]
    if not values.size:
        nan = float("nan")
        return Comparison(0, 0, 0, nan, nan, nan)
    wins, losses = int(np.sum(values > 0)), int(np.sum(values < 0))
    return Comparison(
        len(values), wins, losses, float(np.median(values)), float(np.mean(values)), _test(values)
    )


def _test(differences: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)
