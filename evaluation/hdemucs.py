"""Hybrid Demucs as torchaudio ships it (Défossez 2021): a baseline with public weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from separation.overlap_add import separate_waveform
from training.data.sources import MIXTURE, Track

CHUNK_SECONDS = 10.0


def separate_with_hdemucs(
    stems: tuple[str, ...], device: torch.device
) -> tuple[Callable[[Track], np.ndarray], int]:
    """A separator of a track -> float32 [stem, channel, time], and the rate in Hz it needs.

    The weights (MUSDB18-HQ and 150 extra songs, `HDEMUCS_HIGH_MUSDB_PLUS`) are downloaded once.
    Raises InputError if torchaudio does not load, the weights cannot be had, or a stem is unknown.
    """
    bundle = _load_bundle()
    try:
        model = bundle.get_model().to(device).eval()
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--baseline hdemucs: its weights could not be downloaded ({_line(error)});"
            " check the connection"
        ) from error
    unknown = [stem for stem in stems if stem not in model.sources]
    if unknown:
        raise InputError(
            f"--baseline hdemucs: no stem {unknown[0]}; it has {', '.join(model.sources)}"
        )
    wanted = [list(model.sources).index(stem) for stem in stems]
    rate = int(bundle.sample_rate)

    def network(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(batch.to(device))[:, wanted].float().cpu()

    return partial(_separate, network, round(CHUNK_SECONDS * rate)), rate


def _separate(network: Callable[[Tensor], Tensor], chunk_frames: int, track: Track) -> np.ndarray:
    """The model was trained on mixtures with the mean and spread of their mono sum taken out."""
    mixture = torch.from_numpy(track.read(MIXTURE))
    mono = mixture.mean(dim=0)
    mean, spread = mono.mean(), mono.std().clamp_min(1e-8)
    outputs = separate_waveform(network, (mixture - mean) / spread, chunk_frames=chunk_frames)
    return (outputs * spread + mean).numpy()


def _load_bundle() -> Any:
    try:
        from torchaudio.pipelines import HDEMUCS_HIGH_MUSDB_PLUS
    except (ImportError, OSError) as error:
        raise InputError(
            f"--baseline hdemucs needs a torchaudio that loads beside torch {torch.__version__}:"
            f" install the matching build (pytorch.org) ({_line(error)})"
        ) from error
    return HDEMUCS_HIGH_MUSDB_PLUS


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
