from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 44_100
STEMS = ("vocals", "drums", "bass", "other")


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
