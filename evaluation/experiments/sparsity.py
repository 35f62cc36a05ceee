"""Scores by vocal sparsity: segments and tracks binned by the share of time the stem is active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.energies import Energies
from evaluation.figures import Curve, Panel, draw_panels
from evaluation.result import Evaluation, estimates_of
from evaluation.scoring import MIXTURE_ESTIMATE
from evaluation.tables import align, number

SEGMENT_SECONDS = 8  # the paper's
# Upper edges of the bins of the active share; the first holds what is silent throughout.
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
BINS = ("0 %", "to 25 %", "25-50 %", "50-75 %", "75-100 %")
TEXT = (
    "active: share of the tenths of a second in which the stem is above -60 dBFS (RMS);",
    "SDR: energy ratio of a segment of 8 s, median over the segments of a bin, dB;",
    "leakage: energy of the estimate over that of the mixture where the stem is silent, dB;",
    "cSDR: median over the tracks of a bin, dB.",
)


def by_sparsity(evaluations: Sequence[Evaluation], stem: str) -> dict[str, Any]:
    """SDR and leakage of the segments, cSDR and leakage of the tracks, per estimate and bin."""
    rows = []
    for label, pairs in _estimates(evaluations, stem):
        segments = [part for _, energies in pairs for part in _segments(energies)]
        wholes = [energies for _, energies in pairs]
        csdr = [value for value, _ in pairs]
        for index, name in enumerate(BINS):
            inside = [part for part in segments if bin_of(part) == index]
            tracks = [i for i, energies in enumerate(wholes) if bin_of(energies) == index]
            sdr = [part.usdr for part in inside if index > 0]
            low, median, high = _quartiles(sdr)
            rows.append(
                {
                    "estimate": label,
                    "active": name,
                    "segments": len(inside),
                    "sdr": median,
                    "sdr_quartiles": [low, high],
                    "leakage": _pooled_leakage(inside),
                    "tracks": len(tracks),
                    "track_csdr": _quartiles([csdr[i] for i in tracks])[1],
                    "track_leakage": _pooled_leakage([wholes[i] for i in tracks]),
                }
            )
    return {"experiment": "sparsity", "stem": stem, "bins": list(BINS), "rows": rows}


def bin_of(energies: Energies) -> int:
    """The bin of a stretch of time by its mean activity."""
    return int(np.searchsorted(EDGES, round(float(energies.active.mean()), 6)))


def table(result: dict[str, Any]) -> list[str]:
    head = ["estimate", "active", "segments", "SDR", "leakage", "tracks", "cSDR", "leakage"]
    cells = [
        [
            row["estimate"],
            row["active"],
            str(row["segments"]),
            number(row["sdr"]),
            number(row["leakage"]),
            str(row["tracks"]),
            number(row["track_csdr"]),
            number(row["track_leakage"]),
        ]
        for row in result["rows"]
    ]
    return [*align(head, [cells], texts=2), "", *TEXT]


def panels(result: dict[str, Any]) -> list[Panel]:
    labels = list(dict.fromkeys(row["estimate"] for row in result["rows"]))
    by_label = {
        label: [row for row in result["rows"] if row["estimate"] == label] for label in labels
    }
    sdr = [
        Curve(
            label,
            [row["sdr"] for row in rows],
            [row["sdr_quartiles"][0] for row in rows],
            [row["sdr_quartiles"][1] for row in rows],
            dashed=label == MIXTURE_ESTIMATE,
        )
        for label, rows in by_label.items()
    ]
    leakage = [
        Curve(label, [row["leakage"] for row in rows], dashed=label == MIXTURE_ESTIMATE)
        for label, rows in by_label.items()
    ]
    xlabel = f"share of a segment of {SEGMENT_SECONDS} s in which {result['stem']} are active"
    return [
        Panel("median and quartiles over segments", xlabel, "SDR [dB]", BINS, sdr),
        Panel("where the stem is silent", xlabel, "leakage [dB]", BINS, leakage),
    ]


def figure(result: dict[str, Any]) -> Any:
    return draw_panels(panels(result))


def _estimates(
    evaluations: Sequence[Evaluation], stem: str
) -> Iterator[tuple[str, list[tuple[float, Energies]]]]:
    """Name, and cSDR and energies of each track, of every estimate of a stem."""
    for name, pairs in estimates_of(evaluations, stem):
        yield name, [(row.csdr, detail.energies) for row, detail in pairs]


def _segments(energies: Energies) -> Iterator[Energies]:
    """Consecutive segments; a rest of less than half a segment joins none."""
    total = len(energies.active)
    for start in range(0, total, SEGMENT_SECONDS):
        if total - start >= SEGMENT_SECONDS / 2:
            yield energies.slice(start, start + SEGMENT_SECONDS)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    known = np.array([value for value in values if not np.isnan(value)])
    if not known.size:
        return (float("nan"),) * 3
    low, median, high = np.percentile(known, [25, 50, 75])
    return float(low), float(median), float(high)


def _pooled_leakage(parts: Sequence[Energies]) -> float:
    """Leakage of several stretches as one."""
    if not parts:
        return float("nan")
    names = ("silent_estimate", "silent_mixture")
    sums = {name: np.array([sum(getattr(p, name).sum() for p in parts)]) for name in names}
    return Energies(**{**vars(parts[0]), **sums}).leakage
