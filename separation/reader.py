"""Audio files as streams of blocks, float32 [channel, time]: any length in little memory."""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
from tqdm import tqdm

from models.errors import InputError

BLOCK_FRAMES = 2**16
STANDARD_INPUT = "-"
UNKNOWN_SIZE = 0xFFFFFF00  # in a header, from here on: written to a pipe, length not known
UNKNOWN_FRAMES = 2**62  # what libsndfile counts then
NO_FFMPEG = "ffmpeg is missing; convert it to wav or install ffmpeg (apt install ffmpeg)"

SMALL_BLOCK_FRAMES = 2**10
# Channels of WAV files by those of Vorbis I, section 4.3.9.
VORBIS_TO_WAV = {
    3: (0, 2, 1),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}

Decoder = subprocess.Popen[bytes]


@dataclass
class AudioStream:
    """An open audio file.

    Attributes:
        name: what messages call it.
        rate: in Hz.
        channels: of every block.
        frames: samples a channel that the file promises, None where it does not say.
        blocks: float32 [channel, time], to be read once.
        is_exact: whether `frames` is a count, not derived from a duration.
    """

    name: str
    rate: int
    channels: int
    frames: int | None
    blocks: Iterator[np.ndarray]
    is_exact: bool = False


@contextmanager
def open_audio(path: str | Path, decoders: set[Decoder] | None = None) -> Iterator[AudioStream]:
    """Open a file, or standard input as "-".

    libsndfile reads wav, aiff, flac, ogg and mp3; anything else (m4a, mp4, wma), flac and mp3 that
    do not say how long they are, and standard input go through ffmpeg. What is left of a damaged
    file is read, with a warning.

    decoders: holds ffmpeg's process while it runs, from before the first read that may wait for
    it: another thread ends that read by killing the process.
    Raises InputError, naming the file, if it does not exist or is no audio; so do its blocks, if
    none can be decoded or ffmpeg is killed.
    """
    decoders = set() if decoders is None else decoders
    if str(path) == STANDARD_INPUT:
        with _open_ffmpeg("standard input", "pipe:0", decoders) as stream:
            yield stream
        return
    path = Path(path)
    _require_content(path)
    file = _open_soundfile(path)
    if file is None:
        with _open_ffmpeg(str(path), f"file:{path}", decoders) as stream:
            yield stream
        return
    with file:
        blocks = _soundfile_blocks(file, path)
        frames = file.frames if file.frames < UNKNOWN_FRAMES else None
        is_exact = file.format != "MP3" and frames is not None
        yield AudioStream(str(path), file.samplerate, file.channels, frames, blocks, is_exact)


def _open_soundfile(path: Path) -> soundfile.SoundFile | None:
    """The file, None where ffmpeg is to read it."""
    try:
        with _silent_decoders(only_if=_looks_like_mp3(path)):
            file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return None
    if _tells_its_length(file, path):
        return file
    if shutil.which("ffmpeg") is not None:
        file.close()
        return None
    warnings.warn(
        f"{path}: does not say how long it is; its end may be missing without ffmpeg", stacklevel=2
    )
    return file


def _tells_its_length(file: soundfile.SoundFile, path: Path) -> bool:
    """Whether libsndfile knows where a file ends, which it guesses of an mp3 without a tag."""
    if file.format != "MP3":
        return bool(file.frames < UNKNOWN_FRAMES)
    with path.open("rb") as content:
        head = content.read(10)
        if head[:3] == b"ID3":  # its size is in four times seven bits
            content.seek(10 + sum(byte << 7 * place for place, byte in enumerate(head[:5:-1])))
        else:
            content.seek(0)
        first = content.read(4096)
    return any(tag in first for tag in (b"Xing", b"Info", b"VBRI"))


def probe_seconds(path: Path) -> float | None:
    """Length by the file's header, None if it does not say or cannot be read."""
    try:
        with _silent_decoders(only_if=_looks_like_mp3(path)):
            info = soundfile.info(path)
        if info.frames < UNKNOWN_FRAMES:
            return float(info.duration)
    except (soundfile.LibsndfileError, OSError):
        pass  # ffprobe knows more formats
    command = ["ffprobe", "-v", "error", "-show_entries", "format=duration", "-of", "csv=p=0"]
    try:
        output = subprocess.run([*command, f"file:{path}"], capture_output=True, check=True)
        seconds = float(output.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


def _require_content(path: Path) -> None:
    if not path.is_file():
        what = "is a folder, not an audio file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if is_empty:
        raise InputError(f"{path}: is an empty file (0 bytes)")


def _soundfile_blocks(file: soundfile.SoundFile, path: Path) -> Iterator[np.ndarray]:
    is_cut = _is_cut_short(file, path)
    # Vorbis and Opus have the centre second and the bass last.
    order = VORBIS_TO_WAV.get(file.channels) if file.format == "OGG" else None
    done, size = 0, BLOCK_FRAMES
    while True:
        try:
            with _silent_decoders(only_if=file.format == "MP3"):
                block = file.read(size, dtype="float32", always_2d=True)  # t c
        except soundfile.LibsndfileError as error:
            if size == BLOCK_FRAMES and _can_seek(file, done):
                is_cut, size = True, SMALL_BLOCK_FRAMES  # the rest, as far as it goes
                continue
            if not done:
                raise InputError(f"{path}: is damaged: nothing in it can be decoded") from error
            is_cut = True
            break
        if not len(block):
            break
        done += len(block)
        yield np.ascontiguousarray((block if order is None else block[:, order]).T)
    # Sizes in a header that was written to a pipe are larger than any file.
    is_cut |= done < file.frames < UNKNOWN_SIZE
    if is_cut and done:
        _warn_cut_short(str(path), done / file.samplerate)


def _can_seek(file: soundfile.SoundFile, frame: int) -> bool:
    try:
        return bool(file.seek(frame) == frame)
    except soundfile.LibsndfileError:
        return False


def _warn_cut_short(name: str, seconds: float) -> None:
    text = f"{name}: is damaged or cut short; only its first {seconds:.1f} s can be read"
    warnings.warn(text, stacklevel=2)


def _is_cut_short(file: soundfile.SoundFile, path: Path) -> bool:
    """Whether the samples end before the header, or the last Ogg page, says they do."""
    if file.format == "OGG":
        with path.open("rb") as content:
            content.seek(max(0, path.stat().st_size - 2**17))
            tail = content.read()
        page = tail[tail.rfind(b"OggS") :]
        return len(page) < 6 or not page[5] & 4  # flag: end of stream
    # libsndfile lowers the promised size of a data chunk to what is there, and logs both.
    sizes = re.search(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.M)
    return sizes is not None and int(sizes[2]) < int(sizes[1]) < UNKNOWN_SIZE


def _looks_like_mp3(path: Path) -> bool:
    """Whether libsndfile may ask libmpg123: by the name, an ID3 tag or a frame's sync bits."""
    with path.open("rb") as file:
        head = file.read(3)
    has_sync = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return path.suffix.lower() == ".mp3" or head == b"ID3" or has_sync


@contextmanager
def _silent_decoders(only_if: bool) -> Iterator[None]:
    """Keep libmpg123, which libsndfile calls for mp3, from writing to the process's stderr.

    It has no other way to be told. stderr is the whole process's: tqdm's lock, which every message
    and every bar takes, lets one thread at a time redirect it, and keeps messages until after.
    """
    if not only_if:
        yield
        return
    with tqdm.get_lock():
        sys.stderr.flush()
        kept = os.dup(2)
        try:
            with Path(os.devnull).open("wb") as sink:
                os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _open_ffmpeg(name: str, address: str, decoders: set[Decoder]) -> Iterator[AudioStream]:
    """Decode through a pipe of Sun .au: a header of rate and channels, then float32 samples."""
    with (
        tempfile.TemporaryFile() as log,
        _run_ffmpeg(name, address, log, decoders) as process,
    ):
        assert process.stdout is not None
        header = process.stdout.read(24)
        if len(header) < 24:
            raise InputError(
                f"{name}: not an audio file that libsndfile or ffmpeg can read; convert it to wav"
            )
        _, offset, _, _, rate, channels = struct.unpack(">4s5I", header)
        process.stdout.read(offset - 24)
        frames = None
        if not _is_pipe(address) and (seconds := probe_seconds(Path(name))) is not None:
            frames = round(seconds * rate)
        blocks = _ffmpeg_blocks(process, log, name, rate, channels)
        yield AudioStream(name, rate, channels, frames, blocks)


@contextmanager
def _run_ffmpeg(
    name: str, address: str, log: IO[bytes], decoders: set[Decoder]
) -> Iterator[Decoder]:
    """ffmpeg at work, one of `decoders` until it has ended. Raises InputError if it is missing."""
    command = ["ffmpeg", "-v", "error", "-protocol_whitelist", "file,pipe", "-i", address]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    stdin = None if _is_pipe(address) else subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=log)
    except FileNotFoundError as error:
        how = "reading it needs ffmpeg:" if _is_pipe(address) else "libsndfile cannot read it and"
        raise InputError(f"{name}: {how} {NO_FFMPEG}") from error
    decoders.add(process)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        decoders.remove(process)
        if process.stdout is not None:
            process.stdout.close()


def _is_pipe(address: str) -> bool:
    return address.startswith("pipe:")


def _ffmpeg_blocks(
    process: Decoder, log: IO[bytes], name: str, rate: int, channels: int
) -> Iterator[np.ndarray]:
    assert process.stdout is not None
    done = 0
    while True:
        content = process.stdout.read(4 * channels * BLOCK_FRAMES)
        frames = len(content) // (4 * channels)
        if not frames:
            break
        samples = np.frombuffer(content, ">f4", frames * channels)
        done += frames
        yield np.ascontiguousarray(samples.reshape(frames, channels).T, dtype=np.float32)
    code = process.wait()
    if code < 0:  # which says nothing about the file
        raise InputError(f"{name}: ffmpeg was ended by signal {-code}")
    log.seek(0)
    if code or log.read(1):
        if not done:
            of_pipe = ", or cannot be read from a pipe: give the file itself"
            raise InputError(
                f"{name}: is damaged: nothing in it can be decoded"
                + (of_pipe if name == "standard input" else "")
            )
        _warn_cut_short(name, done / rate)
