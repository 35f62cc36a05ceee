"""MUSDB18 in its compressed form: one `.stem.mp4` a track, decoded by ffmpeg through `musdb`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from training.data.audio_files import AudioFile
from training.data.track import AUDIO_CHANNELS, STEMS, CorruptAudioError, Expected, check_range

SUFFIX = ".stem.mp4"
# Stream numbers of a MUSDB18 file (musdb 0.4, configs/mus.yaml).
_STREAMS = {"mixture": 0, "drums": 1, "bass": 2, "other": 3, "vocals": 4}
# ffmpeg takes times in microseconds: ask for a little more and cut to the sample.
_MARGIN_SECONDS = 0.001
# A decoder may end up to one AAC frame before the length in the container's header.
_AAC_FRAME = 1024


@dataclass(frozen=True)
class StemFileTrack:
    """A `.stem.mp4` with the mixture and the four stems as audio streams.

    Each read decodes the file from its beginning, so random access costs up to a second:
    `python -m training.data.prepare` decodes the files once.
    """

    name: str
    root: Path
    path: Path
    sample_rate: int
    frames: int
    container: AudioFile
    stems: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def is_seekable(self) -> bool:
        return False

    def file(self, stem: str) -> AudioFile | None:
        """See `Track.file`: the same for every stem it has."""
        return self.container if stem in _STREAMS else None

    def read(self, stem: str, start: int = 0, frames: int | None = None) -> np.ndarray:
        """See `Track.read`: float32 [c, t]."""
        count = check_range(self, start, frames)
        if stem not in _STREAMS:
            return np.zeros((AUDIO_CHANNELS, count), dtype=np.float32)
        if not self.path.is_file():
            raise CorruptAudioError(f"{self.path} has disappeared", self.path)
        audio = _probe(self.path).load_audio(
            str(self.path),
            _STREAMS[stem],
            chunk_start=start / self.sample_rate,
            chunk_duration=count / self.sample_rate + _MARGIN_SECONDS,
            sample_rate=self.sample_rate,
        )[:count]  # t c
        missing = count - len(audio)
        if missing > _AAC_FRAME:
            raise CorruptAudioError(
                f"{self.path} is cut: {count} samples of {stem} from {start} on asked,"
                f" {len(audio)} decoded",
                self.path,
            )
        padded = np.pad(np.asarray(audio, dtype=np.float32), ((0, missing), (0, 0)))
        return np.ascontiguousarray(padded.T)


def open_stem_file(root: Path, path: Path, expected: Expected) -> StemFileTrack:
    """Open a track of the data root `root` by its container's header.

    Raises:
        InputError: ffmpeg is missing, the file is not five stereo streams at the expected rate, or
            none of them is an expected stem.
    """
    if missing := expected.lacking(STEMS):
        raise InputError(
            f"{path} has no stem '{missing[0]}', only {', '.join(STEMS)}: change data.stems, or"
            " where it has some of them set data.missing_stems=silence"
        )
    multitrack = _probe(path)
    info = multitrack.info
    streams = info.nb_audio_streams
    if streams != len(_STREAMS) or set(info.channels_streams) != {AUDIO_CHANNELS}:
        raise InputError(
            f"{path} has {streams} audio streams of {info.channels_streams} channels, expected"
            f" {len(_STREAMS)} stereo ones ({', '.join(_STREAMS)}): restore the original file"
        )
    rate = int(multitrack.rate)
    if expected.sample_rate not in (None, rate):
        raise InputError(
            f"{path} has {rate} Hz, expected {expected.sample_rate}: resample the data set ahead"
            f" (python -m training.data.prepare ROOT --sample-rate {expected.sample_rate})"
        )
    name = path.name.removesuffix(SUFFIX)
    frames = min(info.nb_samples_streams)
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    container = AudioFile(str(path), *stamp, frames, rate, AUDIO_CHANNELS, "AAC")
    return StemFileTrack(name, root, path, rate, frames, container, expected.stems)


def require_ffmpeg() -> None:
    """Raises InputError where musdb and stempeg could not be imported for want of ffmpeg."""
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise InputError(
                f"{program} is not on the PATH and {SUFFIX} files need it: apt install ffmpeg"
                " (Debian), brew install ffmpeg (macOS), or https://ffmpeg.org"
            )


@lru_cache(maxsize=256)
def _probe(path: Path) -> Any:
    """The `musdb.MultiTrack` of a file; ffprobe takes 0.1 s, hence the cache."""
    require_ffmpeg()
    import ffmpeg
    import musdb

    try:
        return musdb.MultiTrack(path=str(path), name=path.name.removesuffix(SUFFIX), stem_id=0)
    except ffmpeg.Error as error:
        raise CorruptAudioError(
            f"{path} is not readable by ffmpeg: restore the original file", path
        ) from error
