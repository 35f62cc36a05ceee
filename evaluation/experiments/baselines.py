"""A separator between its bounds: the mixture below, ideal masks above, other separators beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.figures import draw_boxes
from evaluation.result import Evaluation, estimates_of
from evaluation.scoring import STATISTICS, TRACK_VALUES, summarise
from evaluation.tables import LABELS, align, number

DEFAULT = ("irm", "icm")


def compare(evaluations: Sequence[Evaluation], stem: str) -> dict[str, Any]:
    """Every score of every estimate over tracks, from the lowest median cSDR up."""
    scores = evaluations[0].scores
    rows = []
    for name, pairs in estimates_of(evaluations, stem):
        row: dict[str, Any] = {"estimate": name, "tracks": len(pairs)}
        for summary in summarise([scored for scored, _ in pairs], scores):
            row[summary.score] = {key: getattr(summary, key) for key in STATISTICS}
        row["csdr"]["per_track"] = {scored.track: scored.csdr for scored, _ in pairs}
        rows.append(row)
    rows.sort(key=lambda row: row["csdr"]["median"])
    return {"experiment": "baselines", "stem": stem, "scores": list(scores), "rows": rows}


def table(result: dict[str, Any]) -> list[str]:
    scores = result["scores"]

    def cells(statistic: str) -> list[list[str]]:
        return [
            [row["estimate"], statistic, *(number(row[score][statistic]) for score in scores)]
            for row in result["rows"]
        ]

    parts = [cells("median"), cells("mean")]
    head = [result["stem"], "over tracks", *(LABELS[score] for score in scores)]
    return [*align(head, parts, texts=2), "", *(TRACK_VALUES[score] for score in scores)]


def figure(result: dict[str, Any]) -> Any:
    group: dict[str, Sequence[float]] = {
        row["estimate"]: list(row["csdr"]["per_track"].values()) for row in result["rows"]
    }
    return draw_boxes({f"{result['stem']}: cSDR of each track": group}, "cSDR [dB]")
