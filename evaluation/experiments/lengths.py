"""Scores by input length: the same checkpoint with chunks of 1 to 16 s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.figures import Curve, Panel, draw_panels
from evaluation.result import Evaluation, estimates_of
from evaluation.scoring import summarise
from evaluation.tables import align, number

SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
SCORES = ("csdr", "usdr", "leakage")
TEXT = (
    "input: what the network sees at once; the whole track is separated in such chunks;",
    "cSDR, uSDR and leakage as in evaluation.evaluate; std: over tracks (ddof 0).",
)


def by_length(evaluations: dict[float, Evaluation], stem: str) -> dict[str, Any]:
    """Statistics over tracks for every length in seconds."""
    rows = []
    for seconds, evaluation in evaluations.items():
        (_, model), _ = estimates_of([evaluation], stem)
        row: dict[str, Any] = {"seconds": seconds, "tracks": len(model)}
        for summary in summarise([scores for scores, _ in model], SCORES):
            row |= {
                f"{summary.score}_{name}": getattr(summary, name)
                for name in ("mean", "std", "median")
            }
        rows.append(row)
    first = next(iter(evaluations.values()))
    return {
        "experiment": "lengths",
        "stem": stem,
        "label": first.label,
        "protocol": first.report.get("protocol", {}).get("name"),
        "checkpoint": first.report.get("checkpoint"),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> list[str]:
    head = ["input", "cSDR median", "mean", "std", "uSDR mean", "std", "leakage median"]
    keys = ("csdr_median", "csdr_mean", "csdr_std", "usdr_mean", "usdr_std", "leakage_median")
    cells = [
        [f"{row['seconds']:g} s", *(number(row[key]) for key in keys)] for row in result["rows"]
    ]
    title = f"{result['stem']}, protocol {result['protocol']}, {result['rows'][0]['tracks']} tracks"
    return [title, *align(head, [cells]), "", *TEXT]


def panels(results: Sequence[tuple[str, dict[str, Any]]]) -> list[Panel]:
    """One line for each named result, over the lengths of the first."""
    rows = results[0][1]["rows"]
    ticks = [f"{row['seconds']:g}" for row in rows]

    def curves(key: str) -> list[Curve]:
        found = []
        for name, result in results:
            values = {f"{row['seconds']:g}": row[key] for row in result["rows"]}
            found.append(Curve(name, [_float(values.get(tick)) for tick in ticks]))
        return found

    return [
        Panel("median over tracks", "input length [s]", "cSDR [dB]", ticks, curves("csdr_median")),
        Panel("mean over tracks", "input length [s]", "uSDR [dB]", ticks, curves("usdr_mean")),
    ]


def figure(result: dict[str, Any]) -> Any:
    return draw_panels(panels([(result["label"], result)]))


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
