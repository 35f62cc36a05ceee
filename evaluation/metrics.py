"""Separation scores as pure functions on arrays [channel, time]; all values in dB.

An undefined value is NaN, a perfect one may be +inf; no function raises for a silent signal.
docs/evaluation.md explains the odd values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

from models.errors import InputError

BSS_SCORES = ("SDR", "ISR", "SIR", "SAR")
# Keeps uSDR finite; the value of the authors' code (EuiYeonKim/BSMamba2@42eb8c8).
USDR_EPSILON = 1e-7


def usdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Utterance SDR: the energy ratio over a whole signal, both [channel, time].

    `10 log10((sum s^2 + 1e-7) / (sum (s - e)^2 + 1e-7))`, as in the Music Demixing Challenge
    (arXiv 2108.13559). It is finite for every input: an estimate of silence scores 0 dB, and
    a silent reference scores far below 0 dB unless the estimate is silent too.
    """
    reference, estimate = _as_pair(reference, estimate)
    return usdr_of_energies(np.sum(reference**2), np.sum((reference - estimate) ** 2))


def usdr_of_energies(signal: float, error: float) -> float:
    """`usdr` of the energies sum s^2 and sum (s - e)^2."""
    return float(10 * np.log10((signal + USDR_EPSILON) / (error + USDR_EPSILON)))


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Scale-invariant SDR of a whole signal, both [channel, time] (Le Roux et al. 2019).

    The channels share one scale: they count as one long signal. No mean is subtracted.
    """
    reference, estimate = _as_pair(reference, estimate)
    product = np.sum(reference * estimate)
    return si_sdr_of_energies(np.sum(reference**2), product, np.sum(estimate**2))


def si_sdr_of_energies(signal: float, product: float, estimate: float) -> float:
    """`si_sdr` of the inner products sum s^2, sum s e and sum e^2.

    NaN if either signal is silent; +inf if they are proportional, -inf if they are orthogonal.
    The residual of a fit closer than 1e-15 of the energy is rounding and counts as zero.
    """
    if signal == 0 or estimate == 0:
        return float("nan")
    fitted = product**2 / signal
    residual = estimate - fitted
    if residual < 1e-15 * estimate:
        return float("inf")
    return float(10 * np.log10(fitted / residual)) if fitted > 0 else float("-inf")


def framewise_sdr(
    reference: np.ndarray, estimate: np.ndarray, window: int = 44100, hop: int = 44100
) -> np.ndarray:
    """SDR of BSS Eval v4 for one source, [channel, time] -> [frame].

    For one source the distortion filters cancel out of the SDR, which leaves the energy ratio
    of each frame: this equals `museval.metrics.bss_eval(reference, estimate, window, hop)[0]`.
    Like museval, a last frame shorter than the window is dropped, unless the whole signal is
    shorter; a frame is NaN where the sum of the channels of the reference or of the estimate
    is zero throughout, and +inf where the error is exactly zero. Where museval refuses a
    signal that is silent from end to end, every frame here is NaN.
    """
    reference, estimate = _as_pair(reference, estimate)
    rows = []
    for frame in _frames(reference.shape[-1], window, hop):  # one frame at a time stays in cache
        s, e = (np.ascontiguousarray(signal[:, frame]) for signal in (reference, estimate))
        is_silent = not (s.sum(axis=0).any() and e.sum(axis=0).any())
        rows.append((np.sum(s * s), np.sum((s - e) ** 2), is_silent))
    signal, error, silent = np.array(rows).T
    return sdr_of_energies(signal, error, silent == 1)


def sdr_of_energies(signal: np.ndarray, error: np.ndarray, silent: np.ndarray) -> np.ndarray:
    """`framewise_sdr` of each frame's energies sum s^2 and sum (s - e)^2; NaN where `silent`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(silent, np.nan, 10 * np.log10(signal / error))


def csdr(reference: np.ndarray, estimate: np.ndarray, sample_rate: int = 44100) -> float:
    """Chunk-level SDR of one track, [channel, time]: the median over its 1 s frames.

    NaN frames are left out; NaN if there is no other.
    """
    return frame_median(framewise_sdr(reference, estimate, sample_rate, sample_rate))


def frame_median(frames: np.ndarray) -> float:
    """Median of frame scores without the NaN ones; NaN if there is no other."""
    known = frames[~np.isnan(frames)]
    return float(np.median(known)) if known.size else float("nan")


def bss_eval(
    references: np.ndarray, estimates: np.ndarray, window: int = 44100, hop: int = 44100
) -> dict[str, np.ndarray]:
    """SDR, ISR, SIR and SAR of BSS Eval v4 by museval, [source, channel, time] -> [source, frame].

    The references must sum to the mixture for SIR and SAR to mean what they say. A frame in
    which any reference or any estimate is silent is NaN for every source. museval raises for a
    source that is silent from end to end (its projections are undefined); here every frame of
    every source is NaN then.

    Raises InputError if ffmpeg is missing, see `import_museval`.
    """
    references, estimates = _as_pair(references, estimates)
    if _has_silent_source(references) or _has_silent_source(estimates):
        frames = len(_frames(references.shape[-1], window, hop))
        return {name: np.full((len(references), frames), np.nan) for name in BSS_SCORES}
    museval = import_museval()
    with _numpy_as_museval_knows_it():
        scores = museval.bss_eval(
            references.transpose(0, 2, 1), estimates.transpose(0, 2, 1), window=window, hop=hop
        )
    return dict(zip(BSS_SCORES, scores[:4], strict=True))


def _as_pair(reference: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64: float32 sums over a track lose 1e-4 dB."""
    reference, estimate = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    if reference.shape != estimate.shape:
        raise ValueError(f"reference {reference.shape} and estimate {estimate.shape} differ")
    return reference, estimate


def _frames(length: int, window: int, hop: int) -> list[slice]:
    """The whole frames of a signal, or all of it if it is shorter."""
    last = max(0, length - window)
    return [slice(start, start + window) for start in range(0, last + 1, hop)]


def _has_silent_source(sources: np.ndarray) -> bool:
    """museval's own test: a source is silent if the sum of its channels is zero throughout."""
    return bool(np.any(np.all(sources.sum(axis=1) == 0, axis=-1)))


@contextmanager
def _numpy_as_museval_knows_it() -> Iterator[None]:
    """museval 0.4.1 solves singular systems (a stem with equal channels) by least squares.

    It catches them as `numpy.linalg.linalg.LinAlgError`, a name that numpy 2.4 no longer has.
    """
    if hasattr(np.linalg, "linalg"):
        yield
        return
    names = vars(np.linalg)
    names["linalg"] = SimpleNamespace(LinAlgError=np.linalg.LinAlgError)
    try:
        yield
    finally:
        del names["linalg"]


def import_museval() -> ModuleType:
    """`museval.metrics`. Raises InputError if ffmpeg is missing, which its imports need."""
    try:
        with warnings.catch_warnings():
            # musdb's own imports warn about packages that separation scores do not use.
            warnings.simplefilter("ignore")
            import museval.metrics
    except RuntimeError as error:
        raise InputError(
            "museval needs ffmpeg and ffprobe on the PATH: install ffmpeg "
            "(apt install ffmpeg, brew install ffmpeg or ffmpeg.org)"
        ) from error
    return museval.metrics
