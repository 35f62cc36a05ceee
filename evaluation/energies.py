"""Energies per second of a track, from which SDR, uSDR, SI-SDR and the leakage follow."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from evaluation.metrics import (
    frame_median,
    sdr_of_energies,
    si_sdr_of_energies,
    usdr_of_energies,
)
from evaluation.signals import BLOCK_SECONDS, Reader, blocks

# A reference is silent below -60 dBFS: the floor of the authors' source activity detection.
SILENCE_RMS = 1e-3
PARTS = 10  # of a second: activity is decided on each tenth
LEAKAGE_FLOOR_DB = -120.0


@dataclass(frozen=True)
class Energies:
    """Sums over both channels for each second of a track, float64 [frame].

    All of them but `undefined` and the activity are plain sums, so tracks and parts of tracks can
    be pooled. A last second that is not whole is kept: uSDR and SI-SDR count it, cSDR does not.

    Attributes:
        reference, estimate, mixture, error: sums of s^2, e^2, m^2 and (s - e)^2.
        product: sum of s e.
        undefined: 1 where museval skips the frame: L + R of s or of e is zero throughout.
        whole: 1 where the second is whole.
        active: share of its tenths in which the reference is above -60 dBFS (RMS).
        silent_estimate, silent_mixture: sums of e^2 and m^2 over the other tenths.
    """

    reference: np.ndarray
    estimate: np.ndarray
    mixture: np.ndarray
    error: np.ndarray
    product: np.ndarray
    undefined: np.ndarray
    whole: np.ndarray
    active: np.ndarray
    silent_estimate: np.ndarray
    silent_mixture: np.ndarray

    @property
    def sdr(self) -> np.ndarray:
        """`framewise_sdr`: of the whole seconds, or of all there is of a shorter track."""
        used = self.whole == 1 if self.whole.any() else np.ones(len(self.whole), bool)
        return sdr_of_energies(self.reference[used], self.error[used], self.undefined[used] == 1)

    @property
    def csdr(self) -> float:
        return frame_median(self.sdr)

    @property
    def usdr(self) -> float:
        return usdr_of_energies(self.reference.sum(), self.error.sum())

    @property
    def si_sdr(self) -> float:
        return si_sdr_of_energies(self.reference.sum(), self.product.sum(), self.estimate.sum())

    @property
    def leakage(self) -> float:
        """Level of the estimate relative to the mixture, in dB, where the reference is silent.

        NaN if it is nowhere silent, or the mixture is silent there too; not below -120 dB.
        """
        mixture = self.silent_mixture.sum()
        if mixture == 0:
            return float("nan")
        floor = 10 ** (LEAKAGE_FLOOR_DB / 10)
        return float(10 * np.log10(max(self.silent_estimate.sum() / mixture, floor)))

    def slice(self, start: int, stop: int) -> Energies:
        """The seconds `start` to `stop`."""
        return Energies(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


def measure_energies(
    reference: Reader, estimate: Reader, mixture: Reader, frames: int, sample_rate: int
) -> Energies:
    """Read a track of `frames` samples block by block and sum its energies second by second."""
    rows: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Energies)}
    for start, count in blocks(frames, BLOCK_SECONDS * sample_rate):
        signals = [
            np.asarray(read(start, count), np.float64) for read in (reference, estimate, mixture)
        ]
        for name, values in _seconds(*signals, rate=sample_rate).items():
            rows[name].append(values)
    return Energies(**{name: np.concatenate(values) for name, values in rows.items()})


def _seconds(s: np.ndarray, e: np.ndarray, m: np.ndarray, *, rate: int) -> dict[str, np.ndarray]:
    """Fields of `Energies` for signals [channel, time] that begin on a whole second."""
    length = s.shape[-1]
    starts = np.arange(0, length, rate)

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts)

    silent = (total(s.sum(axis=0) != 0) == 0) | (total(e.sum(axis=0) != 0) == 0)
    power = {"reference": s**2, "estimate": e**2, "mixture": m**2, "error": (s - e) ** 2}
    sums = {name: total(values.sum(axis=0)) for name, values in power.items()}
    return {
        **sums,
        "product": total((s * e).sum(axis=0)),
        "undefined": silent.astype(float),
        "whole": (starts + rate <= length).astype(float),
        **_activity(power["reference"], power["estimate"], power["mixture"], rate),
    }


def _activity(s2: np.ndarray, e2: np.ndarray, m2: np.ndarray, rate: int) -> dict[str, np.ndarray]:
    """Activity of the reference and energies in its silence, per second; squares [c, t]."""
    channels, length = s2.shape
    part = max(1, rate // PARTS)
    edges = np.arange(0, length, rate)[:, None] + part * np.arange(PARTS)  # second, tenth
    inside = edges < length
    starts = edges[inside]
    counts = np.diff(np.append(starts, length)) * channels
    silent = np.add.reduceat(s2.sum(axis=0), starts) <= SILENCE_RMS**2 * counts
    per_part = np.zeros((3, *edges.shape))
    per_part[0][inside] = ~silent
    for row, power in ((1, e2), (2, m2)):
        per_part[row][inside] = np.add.reduceat(power.sum(axis=0), starts) * silent
    active, estimate, mixture = per_part.sum(axis=-1)
    return {
        "active": active / inside.sum(axis=-1),
        "silent_estimate": estimate,
        "silent_mixture": mixture,
    }
