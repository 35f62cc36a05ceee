"""Energies summed in blocks give the scores of the whole signals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.energies import LEAKAGE_FLOOR_DB, Energies, measure_energies
from evaluation.metrics import csdr, framewise_sdr, si_sdr, usdr
from evaluation.signals import array_reader

RATE = 4000


def noise(seconds: float, seed: int) -> np.ndarray:
    shape = (2, round(seconds * RATE))
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def measure(reference: np.ndarray, estimate: np.ndarray, mixture: np.ndarray) -> Energies:
    readers = [array_reader(signal) for signal in (reference, estimate, mixture)]
    return measure_energies(*readers, reference.shape[1], RATE)


@pytest.mark.parametrize("seconds", [0.4, 1.0, 3.7, 41.3])
def test_scores_equal_those_of_the_whole_signals(seconds: float) -> None:
    """41.3 s are three blocks, the last not whole."""
    reference = noise(seconds, 0)
    reference[:, RATE : 2 * RATE] = 0
    reference[1, 2 * RATE : 3 * RATE] = -reference[0, 2 * RATE : 3 * RATE]
    estimate = reference + 0.3 * noise(seconds, 1)
    found = measure(reference, estimate, reference + noise(seconds, 2))
    expected = framewise_sdr(reference, estimate, RATE, RATE)
    np.testing.assert_allclose(found.sdr, expected, atol=1e-9, rtol=0, equal_nan=True)
    assert found.csdr == pytest.approx(csdr(reference, estimate, RATE), abs=1e-9, nan_ok=True)
    assert found.usdr == pytest.approx(usdr(reference, estimate), abs=1e-9)
    assert found.si_sdr == pytest.approx(si_sdr(reference, estimate), abs=1e-9)


def test_leakage_is_the_level_where_the_reference_is_silent() -> None:
    reference, mixture = noise(4, 0), noise(4, 1)
    reference[:, RATE : RATE + RATE // 2] = 0
    reference[:, 2 * RATE : 3 * RATE] *= 0.001  # -80 dBFS: silent too
    estimate = np.where(np.abs(reference) > 1e-3, reference, 0.1 * mixture)
    found = measure(reference, estimate, mixture)
    np.testing.assert_allclose(found.active, [1, 0.5, 0, 1])
    assert found.leakage == pytest.approx(-20, abs=1e-3)
    # Loud or not, what the estimate does where the stem sounds is not leakage.
    estimate[:, :RATE] *= 5
    assert measure(reference, estimate, mixture).leakage == pytest.approx(-20, abs=1e-3)


def test_leakage_without_silence_or_without_an_estimate() -> None:
    reference, mixture = noise(2, 0), noise(2, 1)
    assert math.isnan(measure(reference, reference, mixture).leakage)
    silence = np.zeros_like(reference)
    assert math.isnan(measure(silence, silence, silence).leakage)
    assert measure(silence, silence, mixture).leakage == LEAKAGE_FLOOR_DB


def test_slices_add_up() -> None:
    reference, estimate = noise(6, 0), noise(6, 1)
    found = measure(reference, estimate, reference)
    parts = [found.slice(0, 2), found.slice(2, 6)]
    assert sum(p.error.sum() for p in parts) == pytest.approx(found.error.sum())
    expected = usdr(reference[:, 2 * RATE :], estimate[:, 2 * RATE :])
    assert parts[1].usdr == pytest.approx(expected, abs=1e-9)
