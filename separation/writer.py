"""Stems written as they are made: a file has its name only once it is whole."""

from __future__ import annotations

import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from models.errors import InputError
from models.files import whole_file

Write = Callable[[np.ndarray], None]

# Sizes in a WAV header are 32 bits; from here on the same samples go into RF64.
WAV_LIMIT_BYTES = 2**32 - 2**16
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class Format:
    """How a stem is stored: names of libsndfile, and bytes a sample where they are constant."""

    extension: str
    container: str
    subtype: str
    sample_bytes: int | None = None

    @property
    def is_float(self) -> bool:
        return self.subtype == "FLOAT"


FORMATS = {
    "float": Format("wav", "WAV", "FLOAT", 4),
    "wav16": Format("wav", "WAV", "PCM_16", 2),
    "wav24": Format("wav", "WAV", "PCM_24", 3),
    "flac": Format("flac", "FLAC", "PCM_24"),
    "mp3": Format("mp3", "MP3", "MPEG_LAYER_III"),
}


@contextmanager
def open_writers(
    paths: list[Path], form: Format, rate: int, channels: int, frames: int | None
) -> Iterator[Write]:
    """Write stems side by side: yields a function that takes blocks [stem, channel, time].

    Each file is temporary until the block ends without an error; then it takes its name in
    `paths`. Float samples neither clip nor round, so stems sum to their mixture; the other
    formats clip at full scale, with a warning.
    frames: expected length, where known. Raises InputError, naming the file, if it cannot be
    written.
    """
    _require_rate(paths[0], form, rate)
    peak = 0.0

    def write(block: np.ndarray) -> None:
        nonlocal peak
        if not form.is_float:
            peak = max(peak, float(block.max(initial=0)), -float(block.min(initial=0)))
            block = block.clip(-1, 1) if peak > 1 else block
        for one, stem in zip(writers, block, strict=True):
            one(stem)

    with ExitStack() as stack:
        writers = [
            stack.enter_context(_open_writer(path, form, rate, channels, frames)) for path in paths
        ]
        yield write
    if peak > 1:
        warnings.warn(
            f"{paths[0].parent}: clipped, the peak is {peak:.2f} of full scale; "
            "--format float does not clip",
            stacklevel=3,
        )


def write_wav(path: str | Path, audio: np.ndarray, rate: int) -> None:
    """Write audio [channel, time] as float wav: `path` holds a whole file or is left as it was.

    Raises InputError, naming the file, if it cannot be written.
    """
    channels, frames = audio.shape
    with open_writers([Path(path)], FORMATS["float"], rate, channels, frames) as write:
        write(audio[None])


@contextmanager
def _open_writer(
    path: Path, form: Format, rate: int, channels: int, frames: int | None
) -> Iterator[Write]:
    quality = (
        {"compression_level": 0.0, "bitrate_mode": "CONSTANT"} if form.extension == "mp3" else {}
    )
    container = form.container
    frame_bytes = channels * (form.sample_bytes or 0)
    if (frames or 0) * frame_bytes > WAV_LIMIT_BYTES:
        container = "RF64"
    limit = WAV_LIMIT_BYTES // frame_bytes if container == "WAV" else None
    with (
        _naming(path),
        whole_file(path) as part,
        soundfile.SoundFile(
            part, "w", rate, channels, form.subtype, format=container, **quality
        ) as file,
    ):
        yield _bounded(file, path, limit)


def _bounded(file: soundfile.SoundFile, path: Path, limit: int | None) -> Write:
    """Write at most `limit` samples a channel: what a WAV header can tell, where the length was
    not known before."""

    def write(block: np.ndarray) -> None:
        if limit is not None and file.frames + block.shape[1] > limit:
            raise InputError(f"{path}: more than 4 GiB do not fit into wav; use --format flac")
        with _naming(path):
            try:
                file.write(np.stack(list(block), axis=-1))  # t c; a copy of .T is 6 times slower
            except AssertionError as error:  # soundfile's answer to a short write
                raise OSError("cut short") from error

    return write


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing as an InputError that names the file."""
    try:
        yield
    except (OSError, soundfile.SoundFileRuntimeError) as error:
        reason = str(error)
        with suppress(OSError):
            if shutil.disk_usage(path.parent).free < 2**20:
                reason = "no space left on the disk"
        raise InputError(f"{path}: cannot be written ({reason}); choose another folder") from error


def _require_rate(path: Path, form: Format, rate: int) -> None:
    if form.extension == "mp3" and rate not in MP3_RATES:
        raise InputError(f"{path}: mp3 cannot hold {rate} Hz; use --format flac")


@contextmanager
def open_standard_output(
    form: Format, rate: int, channels: int, frames: int | None
) -> Iterator[Write]:
    """Write one stem as wav to standard output; blocks are [stem = 1, channel, time].

    A pipe cannot be rewound: where the length is not known the header says "until the end", as
    ffmpeg's and sox's do. Raises InputError for other formats, if the reader has gone, or if
    what stands behind it cannot be written.
    """
    if form.container != "WAV" or form.sample_bytes is None:
        raise InputError("standard output takes --format float, wav16 or wav24")
    if sys.stdout.isatty():
        raise InputError("standard output is a terminal: pipe it into a player or a file")
    output = sys.stdout.buffer
    scale = None if form.is_float else 2 ** (8 * form.sample_bytes - 1)

    def write(block: np.ndarray) -> None:
        samples = block[0].T  # t c
        if scale is None:
            content = samples.astype("<f4").tobytes()
        else:
            whole = np.rint(samples.astype(np.float64) * scale).clip(-scale, scale - 1)
            content = (
                whole.astype("<i4").tobytes() if scale > 2**15 else whole.astype("<i2").tobytes()
            )
            if form.sample_bytes == 3:
                content = np.frombuffer(content, np.uint8).reshape(-1, 4)[:, :3].tobytes()
        with _naming_standard_output(output):
            output.write(content)

    with _naming_standard_output(output):
        output.write(_wav_header(form, rate, channels, frames))
    yield write
    with _naming_standard_output(output):
        output.flush()


@contextmanager
def _naming_standard_output(output: BinaryIO) -> Iterator[None]:
    """Errors of writing to it as an InputError."""
    try:
        yield
    except BrokenPipeError as error:
        _forget_standard_output(output)
        raise InputError("standard output was closed by its reader") from error
    except OSError as error:
        _forget_standard_output(output)
        raise InputError(f"standard output cannot be written ({error.strerror})") from error


def _wav_header(form: Format, rate: int, channels: int, frames: int | None) -> bytes:
    assert form.sample_bytes is not None
    frame_bytes = channels * form.sample_bytes
    data = 0xFFFFFFFF if frames is None else min(0xFFFFFFFF, frames * frame_bytes)
    tag = 3 if form.is_float else 1
    layout = struct.pack(
        "<HHIIHH", tag, channels, rate, rate * frame_bytes, frame_bytes, 8 * form.sample_bytes
    )
    riff = min(0xFFFFFFFF, data + 36)
    return (
        struct.pack("<4sI4s4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16)
        + layout
        + struct.pack("<4sI", b"data", data)
    )


def _forget_standard_output(output: BinaryIO) -> None:
    """Keep the interpreter from flushing into what takes no more once again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
