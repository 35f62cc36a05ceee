"""One audio file on disk: its header, taken once, and partial reads of its samples.

wav and flac of any sample format go through libsndfile. The arrays of `.npy`, 16-bit samples [t, c]
that `training.data.prepare` writes, are mapped into memory instead of being read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from models.errors import InputError
from training.data.track import AUDIO_CHANNELS, CorruptAudioError

# In the order of preference where a folder holds several forms of one stem.
SUFFIXES = (".wav", ".flac")
ARRAY_SUFFIX = ".npy"
_INT16_SCALE = np.float32(2.0**-15)
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")


class AudioFile(NamedTuple):  # a tuple: there may be tens of thousands
    """What the header of a file says, and what tells whether the file has changed since.

    Attributes:
        path: as text, for there may be many.
        size: in bytes.
        modified: time of the last change in ns.
        frames: samples per channel.
        sample_rate: in Hz.
        channels: 1 or 2.
        subtype: sample format in libsndfile's terms, such as PCM_16.
    """

    path: str
    size: int
    modified: int
    frames: int
    sample_rate: int
    channels: int
    subtype: str


def read_header(path: str, size: int, modified: int) -> AudioFile:
    """The header of an audio file of known size and time.

    Raises:
        InputError: it is empty, not audio, or not mono or stereo; one line that names the file.
    """
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes): restore it from the original")
    if path.endswith(ARRAY_SUFFIX):
        return _read_array_header(path, size, modified)
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{path} is not readable audio ({error.error_string}): restore it from the original"
        ) from error
    if info.frames == 0:
        raise InputError(f"{path} holds no samples: restore it from the original")
    if info.frames >= 2**62:  # a flac written to a pipe
        raise InputError(f"{path} does not say how long it is: write it again (ffmpeg -i IN OUT)")
    if info.channels not in (1, AUDIO_CHANNELS):
        raise InputError(
            f"{path} has {info.channels} channels, expected stereo or mono: convert it"
            f" (ffmpeg -i IN -ac {AUDIO_CHANNELS} OUT)"
        )
    shape = (info.frames, info.samplerate, info.channels)
    # A header is one of tens of thousands; equal texts need to exist once.
    return AudioFile(path, size, modified, *shape, sys.intern(info.subtype))


def read_frames(file: AudioFile, start: int, frames: int) -> np.ndarray:
    """Samples of a file by a partial read; mono becomes two equal channels.

    Returns:
        float32 [c, t] in -1..1.

    Raises:
        CorruptAudioError: the file has disappeared, is cut, or has NaN or infinite samples.
    """
    # Integers are read as they are: numpy converts and transposes in one pass, three times faster.
    dtype = "int16" if file.subtype == "PCM_16" else "float32"
    raw = _read_raw(file, start, frames, dtype)  # t c
    if raw.shape != (frames, file.channels):
        raise CorruptAudioError(
            f"{file.path} is cut: {frames} samples from {start} on asked, {len(raw)} there",
            Path(file.path),
        )
    audio = np.empty((AUDIO_CHANNELS, frames), dtype=np.float32)
    if dtype == "int16":
        np.multiply(raw.T, _INT16_SCALE, out=audio)
    else:
        audio[:] = raw.T
        if file.subtype in _FLOAT_SUBTYPES and not np.isfinite(audio).all():
            first = start + int(np.argmin(np.isfinite(audio).all(axis=0)))
            raise CorruptAudioError(
                f"{file.path} has NaN or infinite samples from {first} on", Path(file.path)
            )
    return audio


def _read_raw(file: AudioFile, start: int, frames: int, dtype: str) -> np.ndarray:
    """Samples [t, c] as they lie in the file; fewer than `frames` where it is cut."""
    try:
        if file.path.endswith(ARRAY_SUFFIX):
            return np.load(file.path, mmap_mode="r")[start : start + frames]
        with soundfile.SoundFile(file.path) as opened:
            found = (opened.samplerate, opened.channels, opened.subtype)
            opened.seek(min(start, opened.frames))
            audio = opened.read(frames, dtype=dtype, always_2d=True)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        gone = not os.path.exists(file.path)  # noqa: PTH110 (a text path)
        reason = "has disappeared" if gone else f"cannot be read ({error})"
        raise CorruptAudioError(f"{file.path} {reason}", Path(file.path)) from error
    if found != (file.sample_rate, file.channels, file.subtype):
        raise CorruptAudioError(
            f"{file.path} is now {found[0]} Hz, {found[1]} channel(s), {found[2]}: it was replaced"
            " since it was opened",
            Path(file.path),
        )
    return audio


def _read_array_header(path: str, size: int, modified: int) -> AudioFile:
    """Header of a prepared array; its rate lies in the folder's `source.json`."""
    try:
        array = np.load(path, mmap_mode="r")
        source = json.loads((Path(path).parent / "source.json").read_text(encoding="utf-8"))
        rate = int(source["sample_rate"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete its folder and prepare the data set again"
        ) from error
    if array.dtype != np.int16 or array.ndim != 2 or array.shape[1] != AUDIO_CHANNELS:
        raise InputError(f"{path} is {array.dtype} {array.shape}, expected int16 [t, 2]")
    return AudioFile(path, size, modified, len(array), rate, AUDIO_CHANNELS, "PCM_16")
