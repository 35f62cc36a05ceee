"""Scores as aligned text."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.scoring import MIXTURE_ESTIMATE, STATISTICS, TRACK_VALUES, StemScores, Summary

LABELS = {score: text.partition(":")[0] for score, text in TRACK_VALUES.items()}


def format_table(rows: list[StemScores], summaries: list[Summary]) -> str:
    """Scores per track, then their statistics over tracks, then what each number is."""
    scores = list(dict.fromkeys(summary.score for summary in summaries))
    head = ["track", "stem", "estimate", *(LABELS[score] for score in scores)]
    tracks = [
        [row.track, row.stem, row.estimate, *(number(getattr(row, score)) for score in scores)]
        for row in rows
    ]
    lines = align(head, [tracks, summary_cells(summaries, scores)], texts=3)
    return "\n".join([*lines, "", *_footnotes(scores, rows, summaries)])


def summary_cells(summaries: list[Summary], scores: list[str]) -> list[list[str]]:
    """A row for each statistic, stem and estimate."""
    groups = list(dict.fromkeys((summary.stem, summary.estimate) for summary in summaries))
    values = {(s.stem, s.estimate, s.score): s for s in summaries}
    return [
        [
            f"{statistic} over tracks",
            stem,
            estimate,
            *(number(getattr(values[stem, estimate, score], statistic)) for score in scores),
        ]
        for statistic in STATISTICS
        for stem, estimate in groups
    ]


def number(value: float) -> str:
    """Two decimals; "nan" and "inf" as they are."""
    return f"{value:.2f}"


def align(head: Sequence[str], parts: Sequence[list[list[str]]], texts: int = 1) -> list[str]:
    """Lines of a table; the first `texts` columns to the left, a rule after the head and parts."""
    everything = [list(head), *(row for part in parts for row in part)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(head)]
    for part in parts:
        lines += [rule, *map(line, part)]
    return lines


def _footnotes(scores: list[str], rows: list[StemScores], summaries: list[Summary]) -> list[str]:
    lines = [TRACK_VALUES[score] for score in scores]
    lines += [
        "mixture: the unprocessed mixture as estimate; free of artifacts, so its SAR says nothing",
        "std: of the population (ddof 0); papers usually give the median of cSDR, the mean of uSDR",
    ]
    for s in summaries:
        if s.undefined_tracks and s.estimate != MIXTURE_ESTIMATE:
            names = [
                row.track
                for row in rows
                if (row.stem, row.estimate) == (s.stem, s.estimate)
                and getattr(row, s.score) != getattr(row, s.score)
            ]
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(
                f"{LABELS[s.score]} of {s.stem} ({s.estimate}): undefined on {s.undefined_tracks}"
                f" of {s.tracks + s.undefined_tracks} tracks, left out of the statistics ({listed})"
            )
    return lines
