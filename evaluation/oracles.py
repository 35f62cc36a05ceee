"""Ideal masks, made from the true stems: how far masking the mixture's STFT could go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from separation.overlap_add import separate_waveform
from training.data.sources import MIXTURE, Track

N_FFT = 2048  # as BSMamba2's
HOP = 441
# Largest modulus of a complex mask (Williamson et al. 2016 bound theirs to 10 too); an unbounded
# one would return the stem itself.
MAX_MODULUS = 10.0
_CHUNK_SECONDS = 20

Mask = Callable[[Tensor, Tensor], Tensor]


def ratio_mask(stem: Tensor, mixture: Tensor) -> Tensor:
    """|S|^2 / (|S|^2 + |X - S|^2) of complex STFTs: real, 0 to 1 (the Wiener form of the IRM)."""
    target = stem.abs() ** 2
    return target / (target + (mixture - stem).abs() ** 2).clamp_min(1e-20)


def complex_mask(stem: Tensor, mixture: Tensor) -> Tensor:
    """S / X of complex STFTs, its modulus bounded to `MAX_MODULUS`."""
    mask = stem / torch.where(mixture == 0, torch.ones_like(mixture), mixture)
    return mask * (MAX_MODULUS / mask.abs().clamp_min(1e-20)).clamp_max(1)


MASKS: dict[str, Mask] = {"irm": ratio_mask, "icm": complex_mask}


def apply_mask(stem: Tensor, mixture: Tensor, mask: Mask) -> Tensor:
    """The mixture under the ideal mask of a stem; all [..., time]."""
    window = torch.hann_window(N_FFT)

    def transform(wave: Tensor) -> Tensor:
        flat = wave.reshape(-1, wave.shape[-1])
        return torch.stft(
            flat, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True
        )  # c f t

    spectra = transform(stem), transform(mixture)
    masked = mask(*spectra) * spectra[1]
    length = mixture.shape[-1]
    return torch.istft(masked, N_FFT, HOP, window=window, length=length).view_as(mixture)


def separate_with_oracle(name: str, stems: tuple[str, ...]) -> Callable[[Track], np.ndarray]:
    """A separator of a track: float32 [stem, channel, time] under the mask `irm` or `icm`.

    Chunks of 20 s are cross-faded, so memory does not depend on a track's length but for its
    waveforms.
    """

    def separate(track: Track) -> np.ndarray:
        mixture = torch.from_numpy(track.read(MIXTURE))
        channels = mixture.shape[0]

        def network(batch: Tensor) -> Tensor:  # b 2c t: the stem's channels, then the mixture's
            return apply_mask(batch[:, :channels], batch[:, channels:], MASKS[name])[:, None]

        outputs = [
            separate_waveform(
                network,
                torch.cat([torch.from_numpy(track.read(stem)), mixture]),
                chunk_frames=_CHUNK_SECONDS * track.sample_rate,
            )[0]
            for stem in stems
        ]
        return torch.stack(outputs).numpy()  # n c t

    return separate
