"""Scores on the spectrogram: bleedless, fullness, and energies per frequency bin.

A track is read twice in blocks, once for the level of the loudest mel bin, once for the scores, so
that the memory does not grow with its length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from evaluation.signals import Reader, blocks

# The authors' settings (EuiYeonKim/BSMamba2@42eb8c8); other projects use 4096 and 1024.
N_FFT = 2048
HOP = 441
N_MELS = 512
RANGE_DB = 80.0
_FLOOR = 1e-10
_STFT_FRAMES = 1000  # of a block: 10 s


@dataclass(frozen=True)
class SpectralScores:
    """What one estimate does to the spectrum of one stem.

    bleedless: 0 to 100; falls with what the estimate has and the reference has not.
    fullness: 0 to 100; falls with what the reference has and the estimate has not.
    reference, error: energy of s and of s - e per frequency bin, over time and channels, [bin].
    """

    bleedless: float
    fullness: float
    reference: np.ndarray
    error: np.ndarray


def spectral_scores(
    reference: Reader, estimates: Sequence[Reader], frames: int, sample_rate: int
) -> list[SpectralScores]:
    """Score estimates of a stem of a track of `frames` samples.

    Levels are those of a mel spectrogram (512 bands, Slaney) of the STFT magnitude in dB, clamped
    to 80 dB below the loudest point of each signal; d is the estimate's minus the reference's.
    `bleedless = 100 / (1 + mean of d > 0)` and `fullness = 100 / (1 + mean of |d| where d < 0)`,
    over both channels; a mean over nothing is 0. The authors' evaluate.py exchanges the two names.
    """
    signals = (reference, *estimates)
    floors = [_loudest(signal, frames, sample_rate) - RANGE_DB for signal in signals]
    sums = np.zeros((len(estimates), 2))  # of d > 0 and of |d| where d < 0
    counts = np.zeros((len(estimates), 2))
    energies = np.zeros((1 + len(estimates), N_FFT // 2 + 1))  # of s, then of s - e
    for start, count in blocks(1 + frames // HOP, _STFT_FRAMES):
        truth = _stft(reference, frames, start, count)
        truth_levels = np.maximum(_mel_levels(truth, sample_rate), floors[0])
        energies[0] += _bin_energies(truth)
        for index, estimate in enumerate(estimates):
            spectrum = _stft(estimate, frames, start, count)
            energies[1 + index] += _bin_energies(truth - spectrum)
            levels = np.maximum(_mel_levels(spectrum, sample_rate), floors[1 + index])
            difference = levels - truth_levels
            for column, side in enumerate((difference, -difference)):
                sums[index, column] += np.sum(side, where=side > 0, dtype=np.float64)
                counts[index, column] += np.count_nonzero(side > 0)
    scores = 100 / (1 + sums / np.maximum(counts, 1))
    return [
        SpectralScores(float(bleedless), float(fullness), energies[0], error)
        for (bleedless, fullness), error in zip(scores, energies[1:], strict=True)
    ]


def _bin_energies(spectrum: np.ndarray) -> np.ndarray:
    """Energy per frequency bin of a spectrum [c f t], float64 [f]."""
    power = spectrum.real**2 + spectrum.imag**2
    return np.asarray(power.sum(axis=(0, 2), dtype=np.float64))


def _loudest(signal: Reader, frames: int, sample_rate: int) -> float:
    """Level in dB of the loudest mel bin of a whole signal."""
    spectra = _stft_blocks(signal, frames)
    return float(max(np.max(_mel_levels(spectrum, sample_rate)) for spectrum in spectra))


def _stft_blocks(signal: Reader, frames: int) -> Iterator[np.ndarray]:
    for start, count in blocks(1 + frames // HOP, _STFT_FRAMES):
        yield _stft(signal, frames, start, count)


def _stft(signal: Reader, frames: int, start: int, count: int) -> np.ndarray:
    """STFT frames `start` to `start + count`, centred, zeros around the signal, complex [c f t]."""
    from scipy.fft import rfft

    first = start * HOP - N_FFT // 2
    last = first + (count - 1) * HOP + N_FFT
    begin, end = max(0, first), min(frames, last)
    audio = np.asarray(signal(begin, end - begin), np.float32)
    audio = np.pad(audio, ((0, 0), (begin - first, last - end)))
    windows = np.lib.stride_tricks.sliding_window_view(audio, N_FFT, axis=-1)[:, ::HOP]  # c t w
    return rfft(windows * _window(), axis=-1).transpose(0, 2, 1)


def _mel_levels(spectrum: np.ndarray, sample_rate: int) -> np.ndarray:
    """Level in dB of the mel bands of a spectrum [c f t], float32 [c m t]."""
    bank = _mel_filters(sample_rate)
    mel = np.stack([bank @ np.ascontiguousarray(np.abs(channel)) for channel in spectrum])
    return 20 * np.log10(np.maximum(mel, np.float32(_FLOOR)))


@cache
def _window() -> np.ndarray:
    from scipy.signal import get_window

    return get_window("hann", N_FFT).astype(np.float32)


@cache
def _mel_filters(sample_rate: int) -> Any:
    """Mel filters as a sparse matrix [m, f]: two filters in a thousand are not zero."""
    import librosa
    from scipy.sparse import csr_array

    with warnings.catch_warnings():
        # 41 of the 512 filters lie between two bins and are empty; the definition keeps them.
        warnings.filterwarnings("ignore", message="Empty filters")
        return csr_array(librosa.filters.mel(sr=sample_rate, n_fft=N_FFT, n_mels=N_MELS))
