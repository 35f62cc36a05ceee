"""Whole audio files in memory, and what every signal is checked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.errors import InputError
from separation.reader import open_audio


def load_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read a whole file -> (float32 [channel, time], sample rate in Hz).

    Reads what `separation.reader.open_audio` does. Raises InputError, naming the file, if it does
    not exist, is no audio, or has no samples, NaN or infinity.
    """
    with open_audio(path) as stream:
        blocks = list(stream.blocks)
        audio = np.concatenate(blocks, axis=1) if blocks else np.zeros((stream.channels, 0))
        check_audio(audio, stream.rate, stream.name)
        return audio, stream.rate


def check_audio(audio: np.ndarray, rate: int, name: str) -> None:
    """Raise InputError, naming `name`, if audio [channel, time] is empty or not finite."""
    if audio.shape[-1] == 0:
        raise InputError(f"{name}: has 0 samples; nothing to separate")
    check_finite(audio, rate, name)


def check_finite(
    block: np.ndarray, rate: int, name: str, start: int = 0, remedy: str = "export it again"
) -> None:
    """Raise InputError if a block [channel, time] that starts at sample `start` is not finite."""
    finite = np.isfinite(block).all(axis=0)
    if not finite.all():
        seconds = (start + int(np.argmin(finite))) / rate
        raise InputError(
            f"{name}: has NaN or infinite samples (first at {seconds:.3f} s); {remedy}"
        )
