"""Write one self-contained HTML page on one evaluation or several.

    python -m evaluation.report RUN [RUN ...] --output report.html

RUN is the --output of evaluation.evaluate. The page holds the table, the differences between runs
with a paired test over tracks, box plots, curves by sparsity and frequency (and by input length
with --lengths FILE, made by evaluation.experiments lengths), spectrograms and sound of the best,
the median and the worst track, the configuration, the commit and the versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison import compare
from evaluation.experiments import bands, lengths, sparsity
from evaluation.figures import draw_boxes, draw_panels
from evaluation.listening import Example, examples, picture_uri
from evaluation.result import Evaluation, estimates_of, names_of, read_evaluation
from evaluation.scoring import EXCERPT_SECONDS, TRACK_VALUES, StemScores, summarise
from evaluation.tables import LABELS, number
from models.errors import InputError, run_command
from models.files import write_text

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html")
COMPARED = ("csdr", "usdr")


@dataclass(frozen=True)
class Table:
    """Cells of an HTML table; the first `texts` columns are text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description="Write one self-contained HTML page on one evaluation or several.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument(
        "--lengths", nargs="+", type=Path, default=[], metavar="FILE", help="lengths.json"
    )
    parser.add_argument("--data", type=Path, help="root of the data set, if it has moved")
    parser.add_argument("--title", default="Evaluation")
    return parser.parse_args(argv)


def build_page(
    evaluations: Sequence[Evaluation],
    length_results: Sequence[tuple[str, dict[str, Any]]] = (),
    data: Path | None = None,
    title: str = "Evaluation",
) -> str:
    """The page as HTML. Raises InputError if the evaluations share no stem."""
    from jinja2 import Environment

    stems = [s for s in evaluations[0].stems if all(s in e.stems for e in evaluations)]
    if not stems:
        raise InputError(f"{evaluations[1].folder}: shares no stem with {evaluations[0].folder}")
    silence = ""
    sections = []
    for stem in stems:
        found: list[Example] = []
        try:
            found = examples(evaluations, stem, data)
        except InputError as error:
            silence = f"Left out: {error}"
            logger.warning("no spectrograms and sound: %s", error)
        sections.append(_section(evaluations, stem, found, length_results))
    names = names_of(evaluations)
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        names=names,
        runs=_runs(names, evaluations),
        sections=sections,
        definitions=[TRACK_VALUES[score] for score in evaluations[0].scores],
        silence=silence,
        seconds=EXCERPT_SECONDS,
        provenance=[(n, _provenance(e)) for n, e in zip(names, evaluations, strict=True)],
    )


def _section(
    evaluations: Sequence[Evaluation],
    stem: str,
    found: list[Example],
    length_results: Sequence[tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """What the page says of one stem."""
    estimates = {name: [row for row, _ in pairs] for name, pairs in estimates_of(evaluations, stem)}
    scores = evaluations[0].scores
    boxes: dict[str, dict[str, Sequence[float]]] = {
        LABELS[score]: {name: [getattr(r, score) for r in rows] for name, rows in estimates.items()}
        for score in COMPARED
    }
    return {
        "stem": stem,
        "summary": _summary(estimates, scores),
        "differences": _differences(estimates, names_of(evaluations)),
        "boxes": picture_uri(draw_boxes(boxes, "dB")),
        "tracks": _tracks(estimates, scores),
        "curves": _curves(evaluations, stem, length_results),
        "examples": found,
    }


def _runs(names: list[str], evaluations: Sequence[Evaluation]) -> Table:
    head = ["evaluation", "checkpoint or folder", "protocol", "data", "tracks", "commit"]
    rows = []
    for name, evaluation in zip(names, evaluations, strict=True):
        report = evaluation.report
        protocol = report.get("protocol", {})
        cut = f"{protocol['name']}, {protocol['chunk_seconds']:g} s chunks" if protocol else "-"
        source = report.get("checkpoint") or report["source"].get("estimates") or "-"
        tracks = f"{len(evaluation.tracks)} ({report['subset']})"
        rows.append([name, source, cut, report["data"], tracks, report["commit"]])
    return Table(head, rows, texts=6)


def _summary(estimates: dict[str, list[StemScores]], scores: Sequence[str]) -> Table:
    """Median, mean and standard deviation of every score for every estimate."""
    head = ["estimate", "over tracks", *(LABELS[score] for score in scores), "tracks"]
    rows = []
    for name, group in estimates.items():
        summaries = summarise(group, scores)
        undefined = summaries[0].undefined_tracks
        tracks = f"{len(group)}, {undefined} without cSDR" if undefined else str(len(group))
        for statistic in ("median", "mean", "std"):
            values = [number(getattr(summary, statistic)) for summary in summaries]
            rows.append([name, statistic, *values, tracks])
    return Table(head, rows, texts=2)


def _differences(estimates: dict[str, list[StemScores]], names: list[str]) -> Table | None:
    """Every pair of evaluations; None if there is one alone."""
    rows = []
    for first, second in itertools.combinations(names, 2):
        for score in COMPARED:
            values = [
                {row.track: getattr(row, score) for row in estimates[name]}
                for name in (first, second)
            ]
            result = compare(*values)
            p_value = f"{result.p_value:.2g}"
            rows.append(
                [f"{first} - {second}", LABELS[score], number(result.median), number(result.mean)]
                + [f"{result.wins} / {result.losses}", str(result.tracks), p_value]
            )
    head = ["evaluations", "score", "median [dB]", "mean [dB]", "better / worse", "tracks", "p"]
    return Table(head, rows, texts=2) if rows else None


def _tracks(estimates: dict[str, list[StemScores]], scores: Sequence[str]) -> Table:
    rows = [
        [row.track, name, *(number(getattr(row, score)) for score in scores)]
        for name, group in estimates.items()
        for row in group
    ]
    rows.sort(key=lambda row: row[0])
    return Table(["track", "estimate", *(LABELS[score] for score in scores)], rows, texts=2)


def _curves(
    evaluations: Sequence[Evaluation],
    stem: str,
    length_results: Sequence[tuple[str, dict[str, Any]]],
) -> list[dict[str, str]]:
    by_sparsity = sparsity.by_sparsity(evaluations, stem)
    by_frequency = bands.by_frequency(evaluations, stem)
    drawn = [
        ("By sparsity", sparsity.panels(by_sparsity), sparsity.TEXT),
        ("By frequency", bands.panels(by_frequency), bands.TEXT),
    ]
    of_stem = [(name, result) for name, result in length_results if result["stem"] == stem]
    if of_stem:
        drawn.insert(0, ("By input length", lengths.panels(of_stem), lengths.TEXT))
    return [
        {"title": title, "picture": picture_uri(draw_panels(panels)), "note": " ".join(text)}
        for title, panels, text in drawn
    ]


def _provenance(evaluation: Evaluation) -> str:
    """Everything the report says but the scores."""
    left_out = ("tracks", "summary", "track_values")
    kept = {key: value for key, value in evaluation.report.items() if key not in left_out}
    return json.dumps(kept, indent=2)


def read_lengths(path: Path) -> tuple[str, dict[str, Any]]:
    """A result of `evaluation.experiments lengths`, named by its folder."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--lengths {path}: cannot be read ({error})") from error
    if not isinstance(result, dict) or result.get("experiment") != "lengths":
        raise InputError(f"--lengths {path}: no result of evaluation.experiments lengths")
    return path.resolve().parent.name, result


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    evaluations = [read_evaluation(folder) for folder in arguments.runs]
    results = [read_lengths(path) for path in arguments.lengths]
    page = build_page(evaluations, results, arguments.data, arguments.title)
    try:
        write_text(arguments.output, page)
    except OSError as error:
        raise InputError(f"{arguments.output}: cannot be written ({error.strerror})") from error
    print(f"written: {arguments.output} ({len(page) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_command(main)
