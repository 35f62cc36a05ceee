"""Scores of one track, and their summary over tracks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from evaluation.energies import Energies, measure_energies
from evaluation.metrics import bss_eval, frame_median
from evaluation.signals import Reader
from evaluation.spectral import SpectralScores, spectral_scores

# Named once, printed with every summary: a number without its aggregation cannot be compared.
TRACK_VALUES = {
    "csdr": "cSDR: median over 1 s frames of the SDR of BSS Eval v4 (one source), dB",
    "usdr": "uSDR: energy ratio over the whole track, dB",
    "si_sdr": "SI-SDR: over the whole track, one scale for both channels, dB",
    "leakage": "leakage: energy of the estimate over the mixture's where the stem is silent, dB",
    "bleedless": "bleedless: 0 to 100, falls with what the estimate has too much (mel, n_fft 2048)",
    "fullness": "fullness: 0 to 100, falls with what the estimate lacks (mel, n_fft 2048)",
    "sdr": "SDR: median over the 1 s frames where no source is silent, museval (BSS Eval v4), dB",
    "isr": "ISR: median over the same frames, museval, dB",
    "sir": "SIR: median over the same frames, museval, dB",
    "sar": "SAR: median over the same frames, museval, dB",
}
MUSEVAL_SCORES = ("sdr", "isr", "sir", "sar")
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "std": lambda values: float(np.std(values)),
    "median": lambda values: float(np.median(values)),
}
SCORERS = {
    "closed-form": tuple(score for score in TRACK_VALUES if score not in MUSEVAL_SCORES),
    "museval": tuple(TRACK_VALUES),
}
MIXTURE_ESTIMATE = "mixture"
NAN = float("nan")


@dataclass(frozen=True)
class StemScores:
    """Scores of one estimate of one stem of one track; NaN where a score is undefined.

    estimate: "model", "mixture" for the unprocessed mixture in the place of the stem, or the name
    of a baseline or of a folder of estimates. `TRACK_VALUES` says what each score is.
    """

    track: str
    stem: str
    estimate: str
    csdr: float = NAN
    usdr: float = NAN
    si_sdr: float = NAN
    leakage: float = NAN
    bleedless: float = NAN
    fullness: float = NAN
    sdr: float = NAN
    isr: float = NAN
    sir: float = NAN
    sar: float = NAN


@dataclass(frozen=True)
class Detail:
    """Where in time and frequency the scores of a `StemScores` come from.

    Attributes:
        energies: per second.
        reference_bins, error_bins: energy per bin of an STFT of 2048, over the whole track.
        museval: SDR, ISR, SIR and SAR per 1 s frame; empty without museval.
    """

    energies: Energies
    reference_bins: np.ndarray
    error_bins: np.ndarray
    museval: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackScores:
    """Everything that is known of one track.

    Attributes:
        rows: one for each stem and estimate.
        details: in the order of `rows`.
        remainder: museval's frames of what the stems leave of the mixture, for the estimate that is
            not the mixture; empty without museval or where nothing is left.
        excerpts: stem -> first sample and length of its loudest seconds.
    """

    track: str
    seconds: float
    sample_rate: int
    rows: list[StemScores]
    details: list[Detail]
    remainder: dict[str, np.ndarray]
    excerpts: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Summary:
    """One score of one estimate over the tracks where it is defined.

    std is the population's (ddof 0). undefined_tracks counts the NaN ones, left out.
    """

    stem: str
    estimate: str
    score: str
    mean: float
    std: float
    median: float
    tracks: int
    undefined_tracks: int


@dataclass(frozen=True)
class Signals:
    """What there is to score in one track, to be read in part: each [channel, time].

    is_complete: the references sum to the mixture, as four stems of MUSDB18 do.
    """

    track: str
    frames: int
    sample_rate: int
    mixture: Reader
    references: dict[str, Reader]
    estimates: dict[str, Reader]
    is_complete: bool = False


EXCERPT_SECONDS = 8


def score_track(
    signals: Signals, *, label: str = "model", scorer: str = "closed-form"
) -> TrackScores:
    """Score the estimates of a track's stems, and the mixture as an estimate of each.

    `scorer="museval"` adds SDR, ISR, SIR and SAR of all stems together. museval needs sources that
    sum to the mixture: unless the stems do (`is_complete`), what they leave joins them as one more
    source (MUSDB18's accompaniment, for a model of vocals): its reference is the mixture minus the
    references, its estimate the mixture minus the estimates. It holds whole tracks in memory.
    """
    unprocessed = dict.fromkeys(signals.references, signals.mixture)
    kinds = {label: signals.estimates, MIXTURE_ESTIMATE: unprocessed}
    decomposed = {
        kind: _decompose(signals, outputs, kind) if scorer == "museval" else []
        for kind, outputs in kinds.items()
    }
    frames, rate = signals.frames, signals.sample_rate
    pairs: dict[tuple[str, str], tuple[StemScores, Detail]] = {}
    excerpts = {}
    for index, (stem, reference) in enumerate(signals.references.items()):
        estimates = [outputs[stem] for outputs in kinds.values()]
        spectra = spectral_scores(reference, estimates, frames, rate)
        for kind, estimate, spectrum in zip(kinds, estimates, spectra, strict=True):
            energies = measure_energies(reference, estimate, signals.mixture, frames, rate)
            museval = decomposed[kind][index] if decomposed[kind] else {}
            detail = Detail(energies, spectrum.reference, spectrum.error, museval)
            row = _row(signals.track, stem, kind, energies, spectrum, museval)
            pairs[kind, stem] = row, detail
            excerpts[stem] = _loudest_seconds(energies, signals)
    rows, details = zip(*(pairs[kind, stem] for kind in kinds for stem in excerpts), strict=True)
    remainder = decomposed[label][len(excerpts)] if len(decomposed[label]) > len(excerpts) else {}
    seconds = frames / rate
    return TrackScores(signals.track, seconds, rate, list(rows), list(details), remainder, excerpts)


def summarise(rows: Iterable[StemScores], scores: Iterable[str] = TRACK_VALUES) -> list[Summary]:
    """Mean, standard deviation and median over tracks, per stem, estimate and score."""
    groups: dict[tuple[str, str], list[StemScores]] = {}
    for row in rows:
        groups.setdefault((row.stem, row.estimate), []).append(row)
    summaries = []
    for (stem, estimate), group in groups.items():
        for score in scores:
            values = np.array([getattr(row, score) for row in group])
            known = values[~np.isnan(values)]
            with np.errstate(invalid="ignore"):  # the spread of infinite scores is NaN
                statistics = {
                    key: function(known) if known.size else NAN
                    for key, function in STATISTICS.items()
                }
            undefined = values.size - known.size
            summaries.append(
                Summary(
                    stem,
                    estimate,
                    score,
                    **statistics,
                    tracks=known.size,
                    undefined_tracks=undefined,
                )
            )
    return summaries


def as_json(row: StemScores | Summary) -> dict[str, Any]:
    """Fields of a row; NaN becomes null, infinity "inf" or "-inf", for JSON lacks both."""
    return {key: json_number(value) for key, value in asdict(row).items()}


def json_number(value: Any) -> Any:
    """A value JSON can hold: NaN as null, infinity as the string "inf" or "-inf"."""
    if not isinstance(value, float) or np.isfinite(value):
        return value
    return None if np.isnan(value) else str(value)


def _row(
    track: str,
    stem: str,
    kind: str,
    energies: Energies,
    spectrum: SpectralScores,
    museval: dict[str, np.ndarray],
) -> StemScores:
    return StemScores(
        track=track,
        stem=stem,
        estimate=kind,
        csdr=energies.csdr,
        usdr=energies.usdr,
        si_sdr=energies.si_sdr,
        leakage=energies.leakage,
        bleedless=spectrum.bleedless,
        fullness=spectrum.fullness,
        **{name.lower(): frame_median(values) for name, values in museval.items()},
    )


def _loudest_seconds(energies: Energies, signals: Signals) -> tuple[int, int]:
    """First sample and length of the `EXCERPT_SECONDS` in which the reference is loudest."""
    length = min(EXCERPT_SECONDS, len(energies.reference))
    sums = np.convolve(energies.reference, np.ones(length), mode="valid")
    start = int(np.argmax(sums)) * signals.sample_rate
    return start, min(length * signals.sample_rate, signals.frames - start)


def _decompose(
    signals: Signals, estimates: dict[str, Reader], kind: str
) -> list[dict[str, np.ndarray]]:
    """museval's frame scores of every stem, then of what the stems leave of the mixture."""

    def read(reader: Reader) -> np.ndarray:
        return np.asarray(reader(0, signals.frames), np.float64)

    references = [read(signals.references[stem]) for stem in signals.references]
    outputs = [read(estimates[stem]) for stem in signals.references]
    if not signals.is_complete:
        mixture = read(signals.mixture)
        references.append(mixture - np.sum(references, axis=0))
        # The mixture minus itself is silent, which museval refuses; there the mixture stands in.
        # No score of a stem depends on what is estimated for another.
        is_mixture = kind == MIXTURE_ESTIMATE
        outputs.append(mixture if is_mixture else mixture - np.sum(outputs, axis=0))
    rate = signals.sample_rate
    frames = bss_eval(np.stack(references), np.stack(outputs), rate, rate)
    return [
        {name: values[index] for name, values in frames.items()} for index in range(len(references))
    ]
