"""A tiny network, songs, and the command as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models import BSMamba2, BSMamba2Config
from models.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]
TINY = {"dim": 8, "depth": 1, "d_state": 16, "expand": 4, "headdim": 16}


def make_checkpoint(path: Path, **config) -> Path:
    torch.manual_seed(0)
    settings = BSMamba2Config(**TINY, **config)
    save_checkpoint(path, settings, BSMamba2(settings).state_dict())
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


@pytest.fixture(scope="session")
def two_stem_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "two.pt"
    return make_checkpoint(path, num_stems=2, stem_names=("vocals", "drums"))


@pytest.fixture
def song(tmp_path: Path) -> Callable[..., Path]:
    """Writes a float wav of noise, or of the samples [channel, time] given."""

    def write(
        name: str = "song.wav",
        samples: np.ndarray | None = None,
        rate: int = 44100,
        seconds: float = 0.5,
        channels: int = 2,
    ) -> Path:
        if samples is None:
            shape = (channels, round(seconds * rate))
            samples = 0.1 * np.random.default_rng(0).standard_normal(shape)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples.T, rate, subtype="FLOAT")
        return path

    return write


@pytest.fixture
def run_separate() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "separation.separate", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return run
