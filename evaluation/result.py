"""An evaluation's folder: RUN/scores.json, RUN/tracks/<track>.json, RUN/excerpts/<track>/*.flac."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.estimates import Source
from evaluation.records import IDENTITY, TrackStore, claim_folder, read_tracks, write_json
from evaluation.runner import Runner
from evaluation.scoring import (
    MIXTURE_ESTIMATE,
    SCORERS,
    TRACK_VALUES,
    Detail,
    StemScores,
    TrackScores,
    as_json,
    summarise,
)
from models.errors import InputError
from models.provenance import provenance
from training.data.sources import Track

SCORES = "scores.json"
TRACKS = "tracks"
EXCERPTS = "excerpts"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        report: what scores.json holds: the rows, their summary, what they were made with.
        tracks: all details of each track.
        folder: where it lies; None if it was not kept.
    """

    report: dict[str, Any]
    tracks: list[TrackScores]
    folder: Path | None = None

    @property
    def label(self) -> str:
        return self.report["label"]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that were computed."""
        return SCORERS[self.report["scorer"]]

    @property
    def stems(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.stem for track in self.tracks for row in track.rows))


def evaluate(
    tracks: Sequence[Track],
    source: Source,
    info: dict[str, Any],
    runner: Runner,
    output: Path | None = None,
) -> Evaluation:
    """Score tracks, in the folder `output` if one is given, from where it ended last time.

    info: what the report says beside the scores, with at least `data` and `subset`.
    Raises InputError if `output` holds another evaluation, or a track cannot be scored.
    """
    if output:
        identity = identity_of(source, info, runner.scorer)
        claim_folder(output, identity, "--output")
        store = TrackStore(output / TRACKS, identity)
        runner = replace(runner, store=store, excerpts=output / EXCERPTS)
    scored = runner.run(tracks, source)
    evaluation = Evaluation(build_report(source, info, scored, runner.scorer), scored, output)
    if output:
        write_json(output / SCORES, evaluation.report)
    return evaluation


def build_report(
    source: Source, info: dict[str, Any], scored: list[TrackScores], scorer: str
) -> dict[str, Any]:
    """Everything the table says and what it was made with; plain values for JSON."""
    rows = [row for track in scored for row in track.rows]
    made_by = provenance()
    return {
        "label": source.label,
        "source": source.identity,
        **info,
        "scorer": scorer,
        "track_values": TRACK_VALUES,
        "unit": "dB",
        "tracks": [as_json(row) for row in rows],
        "summary": [as_json(summary) for summary in summarise(rows, SCORERS[scorer])],
        "versions": {name: value for name, value in made_by.items() if name != "commit"},
        "commit": made_by["commit"],
    }


def identity_of(source: Source, info: dict[str, Any], scorer: str) -> dict[str, Any]:
    """What scores depend on beside the files of a track."""
    data_stems = {"data_stems": info["data_stems"]} if "data_stems" in info else {}
    return {
        **source.identity,
        "stems": list(source.stems),
        "scorer": scorer,
        "data": str(Path(info["data"]).resolve()),
        "subset": info["subset"],
        **data_stems,
    }


def names_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """A name for each: its label, or where labels repeat, the shortest end of its path that does.

    None is the mixture's, which stands beside them. Raises InputError if one folder is given twice.
    """
    labels = [evaluation.label for evaluation in evaluations]
    if _are_distinct(labels):
        return labels
    parts = [(e.folder or Path(e.label)).resolve().parts for e in evaluations]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if _are_distinct(names):
            return names
    raise InputError(f"{evaluations[0].folder}: named twice")


def _are_distinct(names: Sequence[str]) -> bool:
    return len({*names, MIXTURE_ESTIMATE}) == len(names) + 1


def estimates_of(
    evaluations: Sequence[Evaluation], stem: str
) -> list[tuple[str, list[tuple[StemScores, Detail]]]]:
    """Each evaluation's name and its scores of a stem, track by track; the mixture's come last.

    The mixture is the first evaluation's. Raises InputError if one does not have the stem.
    """
    found = []
    for name, evaluation in zip(names_of(evaluations), evaluations, strict=True):
        if stem not in evaluation.stems:
            raise InputError(
                f"{evaluation.folder or name}: has no scores of {stem}; it has"
                f" {', '.join(evaluation.stems)}"
            )
        found.append((name, _pairs(evaluation, stem, is_mixture=False)))
    return [*found, (MIXTURE_ESTIMATE, _pairs(evaluations[0], stem, is_mixture=True))]


def _pairs(
    evaluation: Evaluation, stem: str, *, is_mixture: bool
) -> list[tuple[StemScores, Detail]]:
    return [
        (row, detail)
        for track in evaluation.tracks
        for row, detail in zip(track.rows, track.details, strict=True)
        if row.stem == stem and (row.estimate == MIXTURE_ESTIMATE) == is_mixture
    ]


def read_evaluation(folder: Path) -> Evaluation:
    """An evaluation from its folder. Raises InputError if the folder holds none."""
    path = folder / SCORES
    if not path.is_file():
        reason = "is not finished" if (folder / IDENTITY).is_file() else "holds no evaluation"
        raise InputError(
            f"{folder}: {reason} ({SCORES} is missing); run evaluation.evaluate --output {folder}"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        names = {row["track"] for row in report["tracks"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); evaluate again") from error
    tracks = [track for track in read_tracks(folder / TRACKS) if track.track in names]
    if len(tracks) != len(names):
        raise InputError(f"{folder}: tracks of {SCORES} are missing; evaluate again")
    return Evaluation(report, tracks, folder)
