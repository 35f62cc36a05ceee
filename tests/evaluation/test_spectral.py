"""Bleedless, fullness and bin energies against a plain computation of the whole signal."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch

from evaluation.signals import array_reader
from evaluation.spectral import N_FFT, SpectralScores, spectral_scores

RATE = 44100


def noise(frames: int, seed: int, level: float = 0.1) -> np.ndarray:
    audio = level * np.random.default_rng(seed).standard_normal((2, frames))
    return audio.astype(np.float32)


def score(reference: np.ndarray, *estimates: np.ndarray) -> list[SpectralScores]:
    readers = [array_reader(estimate) for estimate in estimates]
    return spectral_scores(array_reader(reference), readers, reference.shape[1], RATE)


def levels(audio: np.ndarray) -> np.ndarray:
    """Mel levels in dB of a whole signal, clamped to 80 dB of range, by torch and librosa."""
    spectrum = torch.stft(
        torch.from_numpy(audio),
        N_FFT,
        441,
        window=torch.hann_window(N_FFT),
        pad_mode="constant",
        return_complex=True,
    )
    bank = librosa.filters.mel(sr=RATE, n_fft=N_FFT, n_mels=512)
    level = 20 * np.log10(np.maximum(bank @ spectrum.abs().numpy(), 1e-10))
    return np.maximum(level, level.max() - 80)


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_blocks_change_nothing() -> None:
    """12 s: two blocks, the second not whole; silence at the start."""
    reference = noise(12 * RATE + 77, 0)
    reference[:, : 2 * RATE] = 0
    estimate = 0.8 * reference + noise(reference.shape[1], 1, 0.01)
    found = score(reference, reference, estimate)[1]
    difference = levels(estimate) - levels(reference)
    over, under = difference[difference > 0], -difference[difference < 0]
    assert found.bleedless == pytest.approx(100 / (1 + over.mean()), rel=1e-5)
    assert found.fullness == pytest.approx(100 / (1 + under.mean()), rel=1e-5)


def test_what_is_too_much_lowers_bleedless_and_what_lacks_lowers_fullness() -> None:
    vocals, other = noise(RATE, 0), noise(RATE, 1, 0.05)
    same, more, less = score(vocals, vocals, vocals + other, 0.5 * vocals)
    assert (same.bleedless, same.fullness) == (100, 100)
    # Half the amplitude is 6.02 dB less in every bin, and nowhere more.
    assert less.bleedless == 100
    assert less.fullness == pytest.approx(100 / (1 + 20 * np.log10(2)), rel=1e-4)
    assert more.bleedless < 50
    swapped = score(vocals + other, vocals)[0]
    assert swapped.fullness == pytest.approx(more.bleedless, rel=1e-6)


def test_silence_is_finite() -> None:
    signal = noise(RATE, 0)
    for found in (score(0 * signal, signal)[0], score(signal, 0 * signal)[0]):
        assert 0 < found.bleedless <= 100
        assert 0 < found.fullness <= 100


def test_bin_energies_tell_where_the_error_is() -> None:
    time = np.arange(2 * RATE) / RATE
    low, high = (0.1 * np.sin(2 * np.pi * hz * time) for hz in (500, 5000))
    reference = np.stack([low + high] * 2).astype(np.float32)
    estimate = np.stack([low + 0.9 * high] * 2).astype(np.float32)
    found = score(reference, estimate)[0]
    hertz = np.arange(N_FFT // 2 + 1) * RATE / N_FFT
    for band, expected in (((4900, 5100), 20.0), ((450, 550), 60.0)):
        inside = (hertz > band[0]) & (hertz < band[1])
        ratio = 10 * np.log10(found.reference[inside].sum() / found.error[inside].sum())
        # The low tone is untouched: all that is there is what leaks from the high one.
        assert ratio == pytest.approx(20, abs=0.1) if expected == 20 else ratio > expected
