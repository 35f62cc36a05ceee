"""A tiny network and a small data set in MUSDB18-HQ layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models import BSMamba2, BSMamba2Config
from models.checkpoint import save_checkpoint

STEMS = ("vocals", "drums", "bass", "other")
RATE = 44100


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BSMamba2Config(dim=8, depth=1, d_state=16, expand=4, headdim=16)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    save_checkpoint(path, config, BSMamba2(config).state_dict())
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test tracks of 2.5 s; the vocals of the second are silent throughout."""
    root = tmp_path_factory.mktemp("dataset")
    for index, name in enumerate(("first song", "second song")):
        rng = np.random.default_rng(index)
        folder = root / "test" / name
        folder.mkdir(parents=True)
        stems = (2000 * rng.standard_normal((len(STEMS), RATE * 5 // 2, 2))).astype(np.int16)
        if index == 1:
            stems[0] = 0
        for stem, samples in zip(STEMS, stems, strict=True):
            soundfile.write(folder / f"{stem}.wav", samples, RATE)
        soundfile.write(folder / "mixture.wav", stems.sum(axis=0, dtype=np.int16), RATE)
    return root
