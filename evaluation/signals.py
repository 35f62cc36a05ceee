"""Signals that are read in part, so that scoring holds seconds of a track and not all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

from models.errors import InputError
from separation.audio import check_finite
from training.data.stem_files import StemFileTrack
from training.data.track import Track

# read(start, frames) -> [channel, time], exactly `frames` long
Reader = Callable[[int, int], np.ndarray]

BLOCK_SECONDS = 20


def array_reader(audio: np.ndarray) -> Reader:
    """Reads an array [channel, time]."""
    return lambda start, frames: audio[:, start : start + frames]


def track_reader(track: Track, stem: str) -> Reader:
    """Reads a stem or the mixture of a track.

    A compressed track is decoded once and held: each of its reads would decode it anew.
    """
    if isinstance(track, StemFileTrack):
        whole = cache(lambda: array_reader(track.read(stem)))
        return lambda start, frames: whole()(start, frames)
    return lambda start, frames: track.read(stem, start, frames)


def file_reader(path: Path) -> Reader:
    """Reads an audio file; raises InputError, naming it, for samples that are not finite."""

    def read(start: int, frames: int) -> np.ndarray:
        try:
            audio, rate = soundfile.read(
                str(path), frames=frames, start=start, dtype="float32", always_2d=True
            )  # t c
        except (soundfile.LibsndfileError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}); make it again") from error
        if len(audio) < frames:
            raise InputError(f"{path}: is cut at sample {start + len(audio)}; make it again")
        check_finite(audio.T, rate, str(path), start, "separate it again")
        return audio.T

    return read


def blocks(frames: int, length: int) -> Iterator[tuple[int, int]]:
    """Start and length of the consecutive blocks of a signal; only the last may be shorter."""
    for start in range(0, frames, length):
        yield start, min(length, frames - start)
