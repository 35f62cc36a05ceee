"""Audio files in and out: arrays are float32 [channel, time], rates in Hz."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

from models.errors import InputError
from models.files import whole_file

# Sizes in a WAV header are 32 bits; from here on the same samples go into RF64.
WAV_LIMIT_BYTES = 2**32 - 2**16


def load_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a whole file -> (float32 [channel, time], sample rate).

    libsndfile reads wav, flac, ogg and mp3; anything else (m4a, mp4, wma) goes through ffmpeg.
    Raises InputError, naming the file, if it does not exist, is no audio, or has no samples,
    NaN or infinity.
    """
    path = Path(path)
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
    try:
        audio, rate = _read(path)
    except soundfile.LibsndfileError:
        audio, rate = _read_with_ffmpeg(path)
    check_audio(audio, rate, str(path))
    return audio, rate


def check_audio(audio: np.ndarray, rate: int, name: str) -> None:
    """Raise InputError, naming `name`, if audio [channel, time] is empty or not finite."""
    if audio.shape[-1] == 0:
        raise InputError(f"{name}: has 0 samples; nothing to separate")
    finite = np.isfinite(audio).all(axis=0)
    if not finite.all():
        seconds = int(np.argmin(finite)) / rate
        raise InputError(
            f"{name}: has NaN or infinite samples (first at {seconds:.3f} s); export it again"
        )


def write_wav(path: str | Path, audio: np.ndarray, rate: int, subtype: str = "FLOAT") -> None:
    """Write audio [channel, time] atomically: `path` holds a whole file or is left as it was.

    subtype: of soundfile. Float samples neither clip nor round, so stems sum to their mixture.
    Raises InputError, naming the file, if it cannot be written.
    """
    path = Path(path)
    sample_bytes = 8 if subtype == "DOUBLE" else 4
    container = "RF64" if audio.size * sample_bytes > WAV_LIMIT_BYTES else "WAV"
    try:
        with whole_file(path) as part:
            soundfile.write(part, audio.T, rate, subtype=subtype, format=container)
    except (OSError, soundfile.SoundFileRuntimeError) as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another folder") from error


def resample(audio: np.ndarray, rate: int, new_rate: int, frames: int | None = None) -> np.ndarray:
    """Resample [channel, time] in soxr's very high quality.

    frames: cut or pad with zeros to this length.
    """
    if rate != new_rate:
        audio = soxr.resample(audio.T, rate, new_rate, quality="VHQ").T
    if frames is not None and audio.shape[-1] != frames:
        audio = np.pad(audio[:, :frames], [(0, 0), (0, max(0, frames - audio.shape[-1]))])
    return np.ascontiguousarray(audio, dtype=np.float32)


def _read(path: Path) -> tuple[np.ndarray, int]:
    with _silent_decoders():
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return np.ascontiguousarray(audio.T), rate


@contextmanager
def _silent_decoders() -> Iterator[None]:
    """Keep libmpg123, which libsndfile calls for mp3, from writing to the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_with_ffmpeg(path: Path) -> tuple[np.ndarray, int]:
    """Decode through a temporary float wav: keeps rate and channels, allows any length."""
    with tempfile.TemporaryDirectory() as folder:
        decoded = Path(folder) / "decoded.wav"
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", f"file:{path}"]
        command += ["-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto", str(decoded)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return _read(decoded)
        except FileNotFoundError as error:
            raise InputError(
                f"{path}: libsndfile cannot read it and ffmpeg is missing; convert it to wav "
                "or install ffmpeg (apt install ffmpeg)"
            ) from error
        except (subprocess.CalledProcessError, soundfile.LibsndfileError) as error:
            raise InputError(
                f"{path}: not an audio file that libsndfile or ffmpeg can read; convert it to wav"
            ) from error
