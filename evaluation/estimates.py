"""Where estimates come from: a network, an oracle, or the folders of any other separator.

Everything is scored from files: what a network or an oracle makes is written as float wav first, so
that one code reads, checks and scores all of them, in any process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch

from evaluation.scoring import MIXTURE_ESTIMATE
from models.errors import InputError
from separation.separator import Separator
from separation.writer import write_wav
from training.data.sources import MIXTURE, Track
from training.data.track import AUDIO_CHANNELS

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_MAX_LISTED = 5


class Source(Protocol):
    """Estimates of some stems for every track.

    label: what the tables call it. identity: what makes its output what it is; scores of another
    identity are never mixed with these.
    """

    @property
    def label(self) -> str: ...

    @property
    def stems(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def check(self, tracks: Sequence[Track]) -> None:
        """Raise InputError, before any work, for what is missing or cannot be scored."""

    def inputs(self, track: Track) -> list[Path]:
        """The files of estimates that are there already."""

    def files(self, track: Track, folder: Path) -> dict[str, Path]:
        """The file of each stem's estimate; files that had to be made lie in `folder`."""


@dataclass(frozen=True)
class ComputedSource:
    """Estimates made on the spot: `separate(track)` -> float32 [stem, channel, time]."""

    label: str
    stems: tuple[str, ...]
    identity: dict[str, Any]
    separate: Callable[[Track], np.ndarray] = field(repr=False)
    sample_rate: int | None = None

    def check(self, tracks: Sequence[Track]) -> None:
        for track in tracks:
            missing = [stem for stem in self.stems if stem not in track.stems]
            if missing:
                raise InputError(
                    f"{track.name}: no stem {', '.join(missing)}, which {self.label} estimates; "
                    f"it has {', '.join(track.stems)}"
                )
            if self.sample_rate and track.sample_rate != self.sample_rate:
                raise InputError(
                    f"{track.name}: {track.sample_rate} Hz, {self.label} needs {self.sample_rate}"
                    " Hz; resample the data set"
                )

    def inputs(self, track: Track) -> list[Path]:
        return []

    def files(self, track: Track, folder: Path) -> dict[str, Path]:
        outputs = self.separate(track)
        if not np.isfinite(outputs).all():
            raise InputError(
                f"{track.name}: the output of {self.label} has NaN or infinity;"
                " check the checkpoint, or use --dtype float32"
            )
        paths = {stem: folder / f"{stem}.wav" for stem in self.stems}
        for path, output in zip(paths.values(), outputs, strict=True):
            write_wav(path, output, track.sample_rate)
        return paths


@dataclass(frozen=True)
class FolderSource:
    """Stems in folders, as Demucs, MSST and `separation.separate` write them.

    A track's stem is looked for at `root/[subset/]<track>/<stem>.wav`, then at
    `.../<track>/mixture/<stem>.wav`, where `separation.separate` puts the stems of a data set's
    mixtures, and at `.../<track>_<stem>.wav`; flac, mp3 and ogg do as well.
    """

    root: Path
    stems: tuple[str, ...]
    subset: str = "test"

    @property
    def label(self) -> str:
        # Two kinds of rows stand in every table; a folder of such a name must not join them.
        name = self.root.resolve().name
        return f"{name}/" if name in ("model", MIXTURE_ESTIMATE) else name

    @property
    def identity(self) -> dict[str, Any]:
        return {"estimates": str(self.root.resolve())}

    def check(self, tracks: Sequence[Track]) -> None:
        problems = []
        for track in tracks:
            for stem in self.stems:
                try:
                    _check_estimate(self._find(track, stem), track)
                except InputError as error:
                    problems.append(str(error))
        if problems:
            listed = "; ".join(problems[:_MAX_LISTED])
            more = len(problems) - _MAX_LISTED
            raise InputError(listed + (f"; and {more} more" if more > 0 else ""))

    def inputs(self, track: Track) -> list[Path]:
        return list(self.files(track, self.root).values())

    def files(self, track: Track, folder: Path) -> dict[str, Path]:
        return {stem: self._find(track, stem) for stem in self.stems}

    def _find(self, track: Track, stem: str) -> Path:
        path = find_estimate(self.root, self.subset, track.name, stem)
        if path is None:
            wanted = self.root / track.name / f"{stem}.wav"
            raise InputError(f"{wanted}: no such estimate; separate the track, or use --tracks")
        return path


def find_estimate(root: Path, subset: str, track: str, stem: str) -> Path | None:
    """The file of a stem in a folder of estimates, None if there is none.

    Raises InputError if there are several.
    """
    names = (f"{track}/{stem}", f"{track}/{MIXTURE}/{stem}", f"{track}_{stem}")
    places = (
        folder / f"{name}{suffix}"
        for folder in (root, root / subset)
        for name in names
        for suffix in SUFFIXES
    )
    found = [path for path in places if path.is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]}: both may be the estimate; remove one")
    return found[0] if found else None


def open_folder_source(
    root: Path, subset: str, tracks: Sequence[Track], stems: tuple[str, ...] = ()
) -> FolderSource:
    """A folder's estimates of the given stems, or else of those it has for the first track.

    Raises InputError if the folder is missing or has no estimate.
    """
    if not root.is_dir():
        raise InputError(f"--estimates {root}: no such folder")
    track = tracks[0]
    found = tuple(s for s in track.stems if find_estimate(root, subset, track.name, s))
    if not stems and not found:
        raise InputError(
            f"--estimates {root}: nothing for {track.name}; expected"
            f" {root / track.name / 'vocals.wav'} or {root / (track.name + '_vocals.wav')}"
        )
    return FolderSource(root, stems or found, subset)


def model_source(separator: Separator, checkpoint: Path) -> ComputedSource:
    """The estimates of a checkpoint of ours, as `separator` makes them."""

    def separate(track: Track) -> np.ndarray:
        return separator(torch.from_numpy(track.read(MIXTURE))).numpy()  # n c t

    status = checkpoint.stat()
    identity = {
        "checkpoint": str(checkpoint.resolve()),
        "checkpoint_bytes": status.st_size,
        "checkpoint_modified": status.st_mtime_ns,
        **{f"protocol_{key}": value for key, value in protocol_of(separator).items()},
    }
    rate = separator.model.config.sample_rate
    return ComputedSource("model", separator.stem_names, identity, separate, rate)


def protocol_of(separator: Separator) -> dict[str, Any]:
    """How a separator cuts and computes, in plain values."""
    return {
        "name": separator.protocol,
        "chunk_seconds": separator.chunk_seconds,
        "overlap": 0.0 if separator.protocol == "paper" else separator.overlap,
        "dtype": "bfloat16" if separator.uses_bfloat16 else "float32",
        "device": separator.device.type,
    }


def _check_estimate(path: Path, track: Track) -> None:
    """Compare a file's header with the track's."""
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: not readable audio ({error.error_string})") from error
    if info.samplerate != track.sample_rate:
        raise InputError(
            f"{path}: {info.samplerate} Hz, the reference has {track.sample_rate}; resample it"
        )
    if info.channels != AUDIO_CHANNELS:
        raise InputError(f"{path}: {info.channels} channel(s), the reference is stereo; convert it")
    if info.frames != track.frames:
        raise InputError(
            f"{path}: {info.frames} samples, the reference has {track.frames};"
            " cut or pad it to the same length, aligned with the mixture"
        )
