"""The best, the median and the worst track of an evaluation, to be seen and heard."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from evaluation.result import EXCERPTS, Evaluation, names_of
from evaluation.scoring import MIXTURE_ESTIMATE
from models.errors import InputError
from separation.writer import MP3_RATES
from training.data.sources import MIXTURE, STEMS, Track, open_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Example:
    """The loudest seconds of a stem of one track.

    title: says which track it is and why. picture: data URI of the spectrograms. sounds: name ->
    data URI of MP3, for the mixture, the truth and each evaluation's estimate.
    """

    title: str
    picture: str
    sounds: dict[str, str]


def examples(evaluations: Sequence[Evaluation], stem: str, data: Path | None) -> list[Example]:
    """Best, median and worst track by cSDR of the first evaluation; fewer if it has fewer tracks.

    data: root of the data set, where it is no longer the evaluation's own.
    Raises InputError if the data set or an excerpt is missing.
    """
    first = evaluations[0]
    report = first.report
    opened = open_dataset(
        data or Path(report["data"]),
        report["subset"],
        sample_rate=None,
        stems=tuple(report.get("data_stems", STEMS)),
        use_copies=False,
    )
    tracks = {track.name: track for track in opened}
    found = []
    for kind, name, score in chosen_tracks(first, stem):
        if name not in tracks:
            raise InputError(f"{data or report['data']}: has no track {name}; give its --data")
        title = f"{kind}: {name}, cSDR {score:.2f} dB"
        found.append(_example(title, tracks[name], evaluations, stem))
    return found


def chosen_tracks(evaluation: Evaluation, stem: str) -> list[tuple[str, str, float]]:
    """Kind, name and cSDR of the best, the median and the worst track, each track once."""
    ranked = sorted(
        (row.csdr, row.track)
        for track in evaluation.tracks
        for row in track.rows
        if row.stem == stem and row.estimate != MIXTURE_ESTIMATE and not np.isnan(row.csdr)
    )
    if not ranked:
        return []
    places = {"best": len(ranked) - 1, "worst": 0, "median": (len(ranked) - 1) // 2}
    kinds = {place: kind for kind, place in reversed(places.items())}
    order = sorted(kinds, reverse=True)
    return [(kinds[place], ranked[place][1], ranked[place][0]) for place in order]


def _example(title: str, track: Track, evaluations: Sequence[Evaluation], stem: str) -> Example:
    from training.pictures import spectrogram_triptych

    rate = track.sample_rate
    start, frames = _excerpt_of(evaluations[0], track.name, stem)
    waves = {
        "mixture": track.read(MIXTURE, start, frames),
        f"true {stem}": track.read(stem, start, frames),
    }
    for name, evaluation in zip(names_of(evaluations), evaluations, strict=True):
        if track.name in {scores.track for scores in evaluation.tracks}:
            waves[name] = _read_excerpt(evaluation, track.name, stem)
    mixture, truth, estimate = list(waves.values())[:3]
    figure = spectrogram_triptych(mixture, estimate, truth, rate)
    sounds = {name: sound_uri(wave, rate) for name, wave in waves.items()}
    return Example(title, picture_uri(figure), sounds)


def _excerpt_of(evaluation: Evaluation, track: str, stem: str) -> tuple[int, int]:
    return next(scores.excerpts[stem] for scores in evaluation.tracks if scores.track == track)


def _read_excerpt(evaluation: Evaluation, track: str, stem: str) -> np.ndarray:
    folder = evaluation.folder or Path()
    path = folder / EXCERPTS / track / f"{stem}.flac"
    try:
        audio, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: not readable ({error.error_string}); evaluate again") from error
    return audio.T


def picture_uri(figure: Figure) -> str:
    """A figure as a PNG in a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _uri("image/png", buffer)


def sound_uri(audio: np.ndarray, sample_rate: int) -> str:
    """Audio [channel, time] as an MP3 in a data URI: every browser plays it."""
    if sample_rate not in MP3_RATES:
        audio, sample_rate = soxr.resample(audio.T, sample_rate, 44_100).T, 44_100
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T.clip(-1, 1), sample_rate, format="MP3")
    return _uri("audio/mpeg", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
