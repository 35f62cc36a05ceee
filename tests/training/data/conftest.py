from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training.data.activity import ActivityIndex, build_activity_index
from training.data.sources import STEMS, Track, open_dataset

RATE = 44_100
SEGMENT = 4410


@pytest.fixture
def make_folder_track() -> Callable[..., Path]:
    """Writes a track folder of noise; `**stems` overrides or, with None, leaves out stems."""

    def make(
        folder: Path,
        seconds: float = 1.0,
        seed: int = 0,
        mixture: bool = True,
        rate: int = RATE,
        **stems: np.ndarray | None,
    ) -> Path:
        rng = np.random.default_rng(seed)
        folder.mkdir(parents=True)
        audio = {s: rng.integers(-4000, 4000, (round(seconds * rate), 2)) for s in STEMS}
        if mixture:
            audio["mixture"] = np.sum(list(audio.values()), axis=0)
        for name, samples in {**audio, **stems}.items():
            if samples is not None:
                path = folder / f"{name}.wav"
                soundfile.write(path, samples.astype(np.int16), rate, "PCM_16")
        return folder

    return make


@pytest.fixture
def tracks(tmp_path: Path, make_folder_track: Callable[..., Path]) -> list[Track]:
    """Three tracks of half a second."""
    for number in range(3):
        make_folder_track(tmp_path / "test" / f"{number}", seconds=0.5, seed=number)
    return open_dataset(tmp_path, "test")


@pytest.fixture
def index(tracks: list[Track]) -> ActivityIndex:
    """Of `tracks`, for segments of a tenth of a second."""
    return build_activity_index(tracks, STEMS, SEGMENT)


@pytest.fixture
def places(tracks: list[Track]) -> Callable[[str, np.ndarray], list[tuple[int, int]]]:
    """Finds where a window of a stem lies in `tracks`: (track, start)."""

    def find(stem: str, window: np.ndarray) -> list[tuple[int, int]]:
        songs = [track.read(stem) for track in tracks]
        return [
            (number, int(start))
            for number, song in enumerate(songs)
            for start in np.flatnonzero(song[0, : 1 - SEGMENT] == window[0, 0])
            if np.array_equal(song[:, start : start + SEGMENT], window)
        ]

    return find
