"""Scores of one track, and their summary over tracks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from evaluation.metrics import bss_eval, csdr, frame_median, usdr

# Named once, printed with every summary: a number without its aggregation cannot be compared.
TRACK_VALUES = {
    "csdr": "cSDR: median over 1 s frames of the SDR of BSS Eval v4 (one source)",
    "isr": "ISR: median over 1 s frames, museval (BSS Eval v4)",
    "sir": "SIR: median over 1 s frames, museval (BSS Eval v4)",
    "sar": "SAR: median over 1 s frames, museval (BSS Eval v4)",
    "usdr": "uSDR: energy ratio over the whole track",
}
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "std": lambda values: float(np.std(values)),
    "median": lambda values: float(np.median(values)),
}
SCORERS = {"museval": tuple(TRACK_VALUES), "closed-form": ("csdr", "usdr")}


@dataclass(frozen=True)
class StemScores:
    """Scores in dB of one estimate of one stem of one track; NaN where a score is undefined.

    estimate: "model", or "mixture" for the unprocessed mixture in the place of the stem.
    """

    track: str
    stem: str
    estimate: str
    csdr: float
    isr: float
    sir: float
    sar: float
    usdr: float


@dataclass(frozen=True)
class Summary:
    """One score of one estimate over the tracks where it is defined; values in dB.

    std is the population's (ddof 0). undefined_tracks counts the NaN ones, left out.
    """

    stem: str
    estimate: str
    score: str
    mean: float
    std: float
    median: float
    tracks: int
    undefined_tracks: int


def score_track(
    name: str,
    mixture: np.ndarray,
    references: dict[str, np.ndarray],
    estimates: dict[str, np.ndarray],
    sample_rate: int,
    *,
    scorer: str = "museval",
    is_complete: bool = False,
) -> list[StemScores]:
    """Score a model's stems, and the mixture as an estimate of each; arrays [channel, time].

    museval needs sources that sum to the mixture. Unless the stems are all there is in it
    (`is_complete`), what they leave joins them as one more source (MUSDB18's accompaniment,
    for a model of vocals): its reference is the mixture minus the references, its estimate the
    mixture minus the estimates. `scorer="closed-form"` leaves ISR, SIR and SAR undefined and
    is much faster.
    """
    unprocessed = dict.fromkeys(references, mixture)
    rows = []
    for kind, outputs in (("model", estimates), ("mixture", unprocessed)):
        decomposed: dict[str, dict[str, float]] = {}
        if scorer == "museval":
            sources = [(references[stem], outputs[stem]) for stem in references]
            if not is_complete:
                sources.append(_remainder(mixture, references, outputs, kind))
            decomposed = dict(zip(references, _decompose(sources, sample_rate), strict=False))
        for stem, reference in references.items():
            scores = decomposed.get(stem, dict.fromkeys(("isr", "sir", "sar"), float("nan")))
            rows.append(
                StemScores(
                    track=name,
                    stem=stem,
                    estimate=kind,
                    csdr=csdr(reference, outputs[stem], sample_rate),
                    usdr=usdr(reference, outputs[stem]),
                    **scores,
                )
            )
    return rows


def summarise(rows: Iterable[StemScores], scores: Iterable[str] = TRACK_VALUES) -> list[Summary]:
    """Mean, standard deviation and median over tracks, per stem, estimate and score."""
    groups: dict[tuple[str, str], list[StemScores]] = {}
    for row in rows:
        groups.setdefault((row.stem, row.estimate), []).append(row)
    summaries = []
    for (stem, estimate), group in groups.items():
        for score in scores:
            values = np.array([getattr(row, score) for row in group])
            known = values[~np.isnan(values)]
            with np.errstate(invalid="ignore"):  # the spread of infinite scores is NaN
                statistics = {
                    key: function(known) if known.size else float("nan")
                    for key, function in STATISTICS.items()
                }
            undefined = values.size - known.size
            summaries.append(
                Summary(
                    stem,
                    estimate,
                    score,
                    **statistics,
                    tracks=known.size,
                    undefined_tracks=undefined,
                )
            )
    return summaries


def as_json(row: StemScores | Summary) -> dict[str, str | int | float | None]:
    """Fields of a row; NaN and infinity, which JSON lacks, become null."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in asdict(row).items()
    }


def _remainder(
    mixture: np.ndarray,
    references: dict[str, np.ndarray],
    estimates: dict[str, np.ndarray],
    kind: str,
) -> tuple[np.ndarray, np.ndarray]:
    """What the stems leave of the mixture: reference and estimate.

    The mixture minus itself is silent, which museval refuses; there the mixture stands in. No
    score of a stem depends on what is estimated for another.
    """
    reference = mixture - np.sum(list(references.values()), axis=0)
    if kind == "mixture":
        return reference, mixture
    return reference, mixture - np.sum(list(estimates.values()), axis=0)


def _decompose(
    sources: list[tuple[np.ndarray, np.ndarray]], sample_rate: int
) -> list[dict[str, float]]:
    """Median ISR, SIR and SAR of each (reference, estimate), by museval."""
    references, estimates = (np.stack(arrays) for arrays in zip(*sources, strict=True))
    frames = bss_eval(references, estimates, sample_rate, sample_rate)
    return [
        {score: frame_median(frames[score.upper()][i]) for score in ("isr", "sir", "sar")}
        for i in range(len(sources))
    ]
