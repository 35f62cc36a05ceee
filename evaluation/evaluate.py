"""Score a checkpoint on the tracks of a data set, beside the unprocessed mixture.

    python -m evaluation.evaluate --checkpoint runs/x/checkpoints/best.pt --data /path/to/musdb18hq

prints cSDR, ISR, SIR, SAR (museval) and uSDR per track with their mean, standard deviation and
median over tracks; --json FILE writes the same numbers. --protocol paper cuts tracks as the
authors do, into 8 s chunks without overlap.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.metrics import import_museval
from evaluation.scoring import (
    SCORERS,
    STATISTICS,
    TRACK_VALUES,
    StemScores,
    Summary,
    as_json,
    score_track,
    summarise,
)
from models.errors import InputError, run_command
from models.files import write_text
from separation.separator import DEVICES, DTYPES, PROTOCOLS, Separator
from training.data.sources import SUBSETS, Track, open_dataset

LABELS = {"csdr": "cSDR", "isr": "ISR", "sir": "SIR", "sar": "SAR", "usdr": "uSDR"}
PACKAGES = ("torch", "numpy", "museval", "scipy", "soundfile")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate", description="Score a checkpoint on a data set."
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="weights of a BSMamba2")
    parser.add_argument("--data", required=True, type=Path, help="root of a MUSDB18 layout")
    parser.add_argument("--subset", default="test", choices=SUBSETS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here too")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA")
    parser.add_argument(
        "--protocol",
        default="ours",
        choices=PROTOCOLS,
        help="ours: chunks overlap and cross-fade; paper: 8 s chunks, no overlap, no fade",
    )
    parser.add_argument(
        "--scorer",
        default="museval",
        choices=tuple(SCORERS),
        help="closed-form: cSDR and uSDR only, the same values, much faster",
    )
    parser.add_argument("--tracks", type=int, metavar="N", help="only the first N tracks")
    parser.add_argument("--batch-size", type=int, default=1, help="chunks at once")
    return parser.parse_args(argv)


def evaluate(
    separator: Separator, tracks: list[Track], scorer: str = "museval"
) -> Iterator[list[StemScores]]:
    """Separate and score track by track.

    Raises InputError for a track without one of the model's stems or at another rate.
    """
    rate = separator.model.config.sample_rate
    stems = separator.stem_names
    for track in tracks:
        missing = set(stems) - set(track.stems)
        if missing:
            raise InputError(
                f"{track.name}: no stem {', '.join(sorted(missing))}, which the model separates; "
                f"it has {', '.join(track.stems)}"
            )
        if track.sample_rate != rate:
            raise InputError(f"{track.name}: {track.sample_rate} Hz, the model needs {rate} Hz")
        mixture = track.read("mixture")
        outputs = separator(torch.from_numpy(mixture)).numpy()  # n c t
        yield score_track(
            track.name,
            mixture,
            {stem: track.read(stem) for stem in stems},
            dict(zip(stems, outputs, strict=True)),
            rate,
            scorer=scorer,
            is_complete=set(stems) == set(track.stems),
        )


def format_table(rows: list[StemScores], summaries: list[Summary]) -> str:
    """Scores per track, then their statistics over tracks, as aligned text."""
    scores = list(dict.fromkeys(summary.score for summary in summaries))
    cells = [["track", "stem", "estimate", *(LABELS[score] for score in scores)]]
    for row in rows:
        numbers = [_number(getattr(row, score)) for score in scores]
        cells.append([row.track, row.stem, row.estimate, *numbers])
    groups = list(dict.fromkeys((summary.stem, summary.estimate) for summary in summaries))
    values = {(s.stem, s.estimate, s.score): s for s in summaries}
    for statistic in STATISTICS:
        for stem, estimate in groups:
            numbers = [_number(getattr(values[stem, estimate, s], statistic)) for s in scores]
            cells.append([f"{statistic} over tracks", stem, estimate, *numbers])
    return "\n".join([*_align(cells, len(rows)), "", *_footnotes(scores, summaries)])


def build_report(
    arguments: argparse.Namespace,
    separator: Separator,
    rows: list[StemScores],
    summaries: list[Summary],
) -> dict[str, Any]:
    """Everything the table says and what it was made with; plain values for JSON."""
    return {
        "checkpoint": str(arguments.checkpoint),
        "config": asdict(separator.model.config),
        "data": str(arguments.data),
        "subset": arguments.subset,
        "protocol": {
            "name": separator.protocol,
            "chunk_seconds": separator.chunk_seconds,
            "overlap": 0.0 if separator.protocol == "paper" else separator.overlap,
            "dtype": "bfloat16" if separator.uses_bfloat16 else "float32",
            "device": separator.device.type,
        },
        "scorer": arguments.scorer,
        "track_values": TRACK_VALUES,
        "unit": "dB",
        "tracks": [as_json(row) for row in rows],
        "summary": [as_json(summary) for summary in summaries],
        "versions": _versions(),
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write atomically. Raises InputError, naming the file, if it cannot be written."""
    try:
        write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.tracks is not None and arguments.tracks < 1:
        raise InputError(f"--tracks {arguments.tracks}: must be at least 1")
    if arguments.scorer == "museval":
        import_museval()  # fails now rather than after the first track is separated
    tracks = open_dataset(arguments.data, arguments.subset)[: arguments.tracks]
    separator = Separator.from_checkpoint(
        arguments.checkpoint,
        arguments.device,
        batch_size=arguments.batch_size,
        protocol=arguments.protocol,
        dtype=arguments.dtype,
    )
    scored = evaluate(separator, tracks, arguments.scorer)
    bar = tqdm(scored, total=len(tracks), desc="evaluate", unit="track", disable=None)
    rows = [row for track_rows in bar for row in track_rows]
    summaries = summarise(rows, SCORERS[arguments.scorer])
    print(format_table(rows, summaries))
    if arguments.json:
        write_json(arguments.json, build_report(arguments, separator, rows, summaries))
        print(f"\nwritten: {arguments.json}")
    return 0


def _number(value: float) -> str:
    return f"{value:.2f}"


def _align(cells: list[list[str]], track_rows: int) -> list[str]:
    """Lines of a table with text to the left, numbers to the right, a rule after each part."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1 : track_rows + 1], rule, *lines[track_rows + 1 :]]


def _footnotes(scores: list[str], summaries: list[Summary]) -> list[str]:
    lines = [f"{TRACK_VALUES[score]}, dB" for score in scores]
    lines += [
        "mixture: the unprocessed mixture as estimate; free of artifacts, so its SAR says nothing",
        "std: of the population (ddof 0); papers usually give the median of cSDR, the mean of uSDR",
    ]
    lines += [
        f"{LABELS[s.score]} of {s.stem} ({s.estimate}): undefined on {s.undefined_tracks} of "
        f"{s.tracks + s.undefined_tracks} tracks, left out of the statistics"
        for s in summaries
        if s.undefined_tracks
    ]
    return lines


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


if __name__ == "__main__":
    run_command(main)
