"""What every source of data offers: a track with aligned stems that can be read in part."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from models.errors import InputError

if TYPE_CHECKING:
    from training.data.audio_files import AudioFile

STEMS = ("vocals", "drums", "bass", "other")
MIXTURE = "mixture"
AUDIO_CHANNELS = 2


class CorruptAudioError(InputError):
    """An audio file whose header was fine but whose samples cannot be read."""

    # One positional argument suffices: the DataLoader rebuilds a worker's exception from its text.
    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


MissingStems = Literal["error", "silence"]


@dataclass(frozen=True)
class Expected:
    """What every track of a data set must be.

    Attributes:
        sample_rate: in Hz; None takes every track at its own rate.
        stems: the sources that sum to the mixture.
        missing_stems: whether a track without one of them is an error or has silence there.
    """

    sample_rate: int | None = 44_100
    stems: tuple[str, ...] = STEMS
    missing_stems: MissingStems = "error"

    def lacking(self, there: Container[str]) -> list[str]:
        """The stems that a track of those `there` lacks, none where silence may stand for them."""
        missing = [stem for stem in self.stems if stem not in there]
        is_allowed = self.missing_stems == "silence" and len(missing) < len(self.stems)
        return [] if is_allowed else missing


class Track(Protocol):
    """One song: stems of one length, rate and channel count."""

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> Path:
        """The data root it belongs to."""

    @property
    def sample_rate(self) -> int:
        """Samples per second."""

    @property
    def frames(self) -> int:
        """Length in samples per channel."""

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the sources, without the mixture."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files on disk that the track is read from."""

    @property
    def is_seekable(self) -> bool:
        """Whether a partial read costs no more than what it reads."""

    def file(self, stem: str) -> AudioFile | None:
        """The file that holds a stem, None where the stem is missing and counts as silence."""

    def read(self, stem: str, start: int = 0, frames: int | None = None) -> np.ndarray:
        """Samples `start` to `start + frames` of a stem or of "mixture".

        Args:
            stem: one of `stems`, or "mixture".
            start: first sample.
            frames: number of samples, None for everything from `start` on.

        Returns:
            float32 [c, t] in -1..1, exactly `frames` long.

        Raises:
            CorruptAudioError: the samples cannot be read, or fewer are there than the header said.
        """


def check_range(track: Track, start: int, frames: int | None) -> int:
    """The number of samples to read.

    Raises:
        ValueError: the range leaves the track.
    """
    count = track.frames - start if frames is None else frames
    if start < 0 or count < 0 or start + count > track.frames:
        raise ValueError(f"{track.name}: samples {start}..{start + count} of {track.frames}")
    return count
