"""A track as a folder of stems: `<track>/<stem>.wav` or `.flac`, as in MUSDB18-HQ."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import InputError
from training.data.audio_files import ARRAY_SUFFIX, SUFFIXES, AudioFile, read_frames
from training.data.cache import HeaderCache
from training.data.track import AUDIO_CHANNELS, MIXTURE, Expected, check_range


@dataclass(frozen=True)
class FolderTrack:
    """A folder of one file a stem.

    Without a file `mixture` the mixture is the sum of the stems. A stem in `stems` without a file
    is silent.
    """

    name: str
    root: Path
    folder: Path
    sample_rate: int
    frames: int
    stems: tuple[str, ...]
    audio: dict[str, AudioFile]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(file.path) for file in self.audio.values())

    @property
    def is_seekable(self) -> bool:
        return True

    def file(self, stem: str) -> AudioFile | None:
        """See `Track.file`."""
        return self.audio.get(stem)

    def read(self, stem: str, start: int = 0, frames: int | None = None) -> np.ndarray:
        """See `Track.read`: float32 [c, t]."""
        count = check_range(self, start, frames)
        if stem in self.audio:
            return read_frames(self.audio[stem], start, count)
        silence = np.zeros((AUDIO_CHANNELS, count), dtype=np.float32)
        if stem != MIXTURE:
            return silence
        return sum((self.read(name, start, count) for name in self.stems), start=silence)


def open_folder(
    root: Path, folder: Path, expected: Expected, headers: HeaderCache, need_mixture: bool = False
) -> FolderTrack:
    """Open a track by its headers alone.

    Args:
        root: the data root it belongs to.
        folder: where its files lie.
        expected: its stems and rate.
        headers: those known from before.
        need_mixture: refuse a track without a file `mixture`.

    Raises:
        InputError: a stem is missing, cannot be read, is not mono or stereo at the expected rate,
            or differs in length from the others; the message names the file and the remedy.
    """
    entries = list_audio(folder)
    if MIXTURE not in entries and need_mixture:
        raise InputError(f"{folder / MIXTURE}.wav is missing: add it")
    _check_missing(folder, entries, expected)
    audio: dict[str, AudioFile] = {}
    rate = expected.sample_rate
    for name in (*expected.stems, MIXTURE):
        if name in entries:
            audio[name] = _open(entries[name], rate, headers)
            rate = rate or audio[name].sample_rate
    first, *others = audio.values()
    for file in others:
        if file.frames != first.frames:
            raise InputError(
                f"{file.path} has {file.frames} samples but {Path(first.path).name} has"
                f" {first.frames}: cut or pad the stems of a track to one length"
            )
    return FolderTrack(
        folder.name, root, folder, first.sample_rate, first.frames, expected.stems, audio
    )


def list_audio(folder: Path) -> dict[str, os.DirEntry[str]]:
    """Stem -> its file, for every audio file in a folder; arrays before wav before flac.

    Raises InputError if the folder cannot be read.
    """
    found: dict[str, dict[str, os.DirEntry[str]]] = {}
    for entry in list_folder(folder):
        stem, dot, suffix = entry.name.rpartition(".")
        # A Mac leaves "._vocals.wav" beside the files it copies.
        if not stem.startswith("._"):
            found.setdefault(dot + suffix, {})[stem] = entry
    listed: dict[str, os.DirEntry[str]] = {}
    for suffix in reversed((ARRAY_SUFFIX, *SUFFIXES)):
        listed.update(found.get(suffix, {}))
    return listed


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder of the data, in any order. Raises InputError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror})") from error


def _check_missing(folder: Path, entries: dict[str, os.DirEntry[str]], expected: Expected) -> None:
    missing = expected.lacking(entries)
    if len(missing) == len(expected.stems):
        there = ", ".join(sorted(entry.name for entry in entries.values())) or "no audio"
        raise InputError(
            f"{folder} holds none of the stems {', '.join(missing)} as wav or flac (it has"
            f" {there[:200]}): rename its files, or name its stems in data.stems"
        )
    if missing:
        raise InputError(
            f"{folder / missing[0]}.wav is missing: add it (training takes silence for it with"
            " data.missing_stems=silence)"
        )


def _open(entry: os.DirEntry[str], rate: int | None, headers: HeaderCache) -> AudioFile:
    try:
        file = headers.open(entry)
    except FileNotFoundError as error:  # a dangling link
        raise InputError(f"{entry.path} is a link to a file that is not there") from error
    except OSError as error:
        raise InputError(f"{entry.path} cannot be opened ({error.strerror})") from error
    if rate is not None and file.sample_rate != rate:
        raise InputError(
            f"{entry.path} has {file.sample_rate} Hz, expected {rate}: resample the data set ahead"
            f" (python -m training.data.prepare ROOT --sample-rate {rate})"
        )
    return file
