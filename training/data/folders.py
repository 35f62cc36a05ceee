"""MUSDB18-HQ layout: one folder a track, one wav file a stem."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from models.errors import InputError
from training.data.track import AUDIO_CHANNELS, MIXTURE, STEMS, CorruptAudioError, check_range


@dataclass(frozen=True)
class FolderTrack:
    """A folder of `<stem>.wav` files; without `mixture.wav` the mixture is the sum of the stems."""

    name: str
    folder: Path
    sample_rate: int
    frames: int
    stems: tuple[str, ...]
    has_mixture: bool

    @property
    def files(self) -> tuple[Path, ...]:
        names = (*self.stems, MIXTURE) if self.has_mixture else self.stems
        return tuple(stem_path(self.folder, name) for name in names)

    def read(self, stem: str, start: int = 0, frames: int | None = None) -> np.ndarray:
        """See `Track.read`: float32 [c, t]."""
        count = check_range(self, start, frames)
        if stem == MIXTURE and not self.has_mixture:
            mixture = np.zeros((AUDIO_CHANNELS, count), dtype=np.float32)
            for name in self.stems:
                mixture += self.read(name, start, count)
            return mixture
        return _read_wav(stem_path(self.folder, stem), start, count)


def stem_path(folder: Path, stem: str) -> Path:
    """Where a stem of the track in `folder` lies."""
    return folder / f"{stem}.wav"


def open_folder(
    folder: Path,
    sample_rate: int,
    stems: tuple[str, ...] = STEMS,
    need_mixture: bool = False,
) -> FolderTrack:
    """Open a track by its headers alone.

    Raises:
        InputError: a stem is missing, cannot be read, is not stereo at `sample_rate`, or differs in
            length from the others; the message names the file and the remedy.
    """
    has_mixture = stem_path(folder, MIXTURE).is_file()
    if need_mixture and not has_mixture:
        raise InputError(f"{stem_path(folder, MIXTURE)} is missing: add it")
    lengths: dict[str, int] = {}
    for name in (*stems, MIXTURE) if has_mixture else stems:
        lengths[name] = _check_header(stem_path(folder, name), sample_rate)
    frames = lengths[stems[0]]
    for name, length in lengths.items():
        if length != frames:
            raise InputError(
                f"{stem_path(folder, name)} has {length} samples but {stems[0]}.wav has {frames}:"
                " cut or pad the stems of a track to one length"
            )
    return FolderTrack(folder.name, folder, sample_rate, frames, stems, has_mixture)


def _check_header(path: Path, sample_rate: int) -> int:
    """The length in samples of a file fit for use."""
    if not path.is_file():
        raise InputError(f"{path} is missing: add it (a wav of zeros where the stem is silent)")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes): restore it from the original")
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{path} is not readable audio ({error.error_string}): restore it from the original"
        ) from error
    if info.frames == 0:
        raise InputError(f"{path} holds no samples: restore it from the original")
    if info.samplerate != sample_rate:
        raise InputError(
            f"{path} has {info.samplerate} Hz, expected {sample_rate}:"
            f" resample the track (ffmpeg -i IN -ar {sample_rate} OUT)"
        )
    if info.channels != AUDIO_CHANNELS:
        raise InputError(
            f"{path} has {info.channels} channel(s), expected stereo: convert it"
            f" (ffmpeg -i IN -ac {AUDIO_CHANNELS} OUT)"
        )
    return info.frames


def _read_wav(path: Path, start: int, frames: int) -> np.ndarray:
    """Samples of one file, float32 [c, t], by a partial read."""
    try:
        audio, _ = soundfile.read(
            str(path), frames=frames, start=start, dtype="float32", always_2d=True
        )  # t c
    except (soundfile.LibsndfileError, OSError) as error:
        raise CorruptAudioError(f"{path} cannot be read ({error})", path) from error
    if audio.shape != (frames, AUDIO_CHANNELS):
        raise CorruptAudioError(
            f"{path} is cut: {frames} samples from {start} on asked, {len(audio)} there", path
        )
    if not np.isfinite(audio).all():
        raise CorruptAudioError(f"{path} has NaN or infinite samples from {start} on", path)
    return np.ascontiguousarray(audio.T)
