"""SDR by frequency: in the network's 62 bands and in six regions that have names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.figures import Curve, Panel, draw_panels
from evaluation.result import Evaluation, estimates_of
from evaluation.scoring import MIXTURE_ESTIMATE, Detail
from evaluation.spectral import N_FFT
from evaluation.tables import align, number
from models.bsmamba2 import BSMamba2Config
from models.errors import InputError

REGIONS_HZ = (0, 250, 1000, 4000, 8000, 16000, 24000)
TEXT = (
    "SDR of a region: energy of its STFT bins (n_fft 2048) over that of their error, per track,",
    "median over tracks, dB. A track without energy in a region is left out there.",
)


def by_frequency(evaluations: Sequence[Evaluation], stem: str) -> dict[str, Any]:
    """Median SDR over tracks in each band and region, for each estimate.

    Raises InputError if the sample rates differ.
    """
    rates = {track.sample_rate for evaluation in evaluations for track in evaluation.tracks}
    if len(rates) > 1:
        raise InputError(f"runs at {sorted(rates)} Hz: their bands are not the same frequencies")
    (rate,) = rates
    hertz = np.arange(N_FFT // 2 + 1) * rate / N_FFT
    # Whatever lies above the last edge, at rates of 48 kHz and more, joins the highest region.
    regions = np.searchsorted(REGIONS_HZ[:-1], hertz, side="right") - 1
    widths = BSMamba2Config().band_widths
    bands = np.repeat(np.arange(len(widths)), widths)
    rows = []
    for label, pairs in estimates_of(evaluations, stem):
        details = [detail for _, detail in pairs]
        rows.append(
            {
                "estimate": label,
                "regions": _median_sdr(details, regions, len(REGIONS_HZ) - 1),
                "bands": _median_sdr(details, bands, len(widths)),
            }
        )
    centres = [float(hertz[bands == band].mean()) for band in range(len(widths))]
    return {
        "experiment": "bands",
        "stem": stem,
        "regions_hz": list(REGIONS_HZ[:-1]),
        "band_centres_hz": centres,
        "tracks": len(evaluations[0].tracks),
        "rows": rows,
    }


def region_names() -> list[str]:
    edges = [f"{hz / 1000:g}k" if hz >= 1000 else f"{hz}" for hz in REGIONS_HZ[:-1]]
    return [f"{low}-{high} Hz" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]}+ Hz"]


def table(result: dict[str, Any]) -> list[str]:
    cells = [[row["estimate"], *map(number, row["regions"])] for row in result["rows"]]
    head = [f"SDR of {result['stem']}", *region_names()]
    return [*align(head, [cells]), "", *TEXT]


def panels(result: dict[str, Any]) -> list[Panel]:
    def curves(key: str) -> list[Curve]:
        return [
            Curve(row["estimate"], row[key], dashed=row["estimate"] == MIXTURE_ESTIMATE)
            for row in result["rows"]
        ]

    ticks = [name.removesuffix(" Hz") for name in region_names()]
    return [
        Panel("regions, median over tracks", "Hz", "SDR [dB]", ticks, curves("regions")),
        Panel(
            "the network's 62 bands, median over tracks",
            "centre of the band [Hz]",
            "SDR [dB]",
            (),
            curves("bands"),
            result["band_centres_hz"],
        ),
    ]


def figure(result: dict[str, Any]) -> Any:
    return draw_panels(panels(result))


def _median_sdr(details: Sequence[Detail], groups: np.ndarray, count: int) -> list[float]:
    """Median over tracks of the SDR in each group of bins; NaN where no track has energy."""
    values = np.full((len(details), count), np.nan)
    for row, detail in enumerate(details):
        reference = np.bincount(groups, detail.reference_bins, count)
        error = np.bincount(groups, detail.error_bins, count)
        with np.errstate(divide="ignore", invalid="ignore"):
            values[row] = np.where(reference > 0, 10 * np.log10(reference / error), np.nan)
    known = [column[~np.isnan(column)] for column in values.T]
    return [float(np.median(column)) if column.size else float("nan") for column in known]
