"""A tiny data set of noise and a configuration that trains on it in moments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

STEMS = ("vocals", "drums", "bass", "other")
SAMPLE_RATE = 44100


@pytest.fixture(scope="session")
def noise_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training tracks of 1 s, of which the last validates: noise of a level per stem."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for track in ("a", "b", "c"):
        folder = root / "train" / track
        folder.mkdir(parents=True)
        for number, stem in enumerate(STEMS):
            audio = 0.05 * (number + 1) * rng.standard_normal((SAMPLE_RATE, 2))
            soundfile.write(folder / f"{stem}.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    return root


@pytest.fixture
def tiny_config(tmp_path: Path, noise_root: Path) -> Path:
    """A configuration file for a network of one small layer; it writes to tmp_path/run."""
    values = {
        "model": {"dim": 8, "depth": 1, "d_state": 8, "expand": 2, "headdim": 8},
        "data": {
            "root": str(noise_root),
            "segment_seconds": 0.2,
            "num_workers": 0,
            "valid_segments": 3,
        },
        "training": {
            "batch_size": 1,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "max_steps": 4,
            "log_every": 1,
            "validate_every": 4,
            "checkpoint_every": 2,
            "ema_decay": 0.5,
            "device": "cpu",
        },
        "run": {"dir": str(tmp_path / "run"), "tensorboard": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
