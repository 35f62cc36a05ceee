"""Pictures of spectrograms.

python -m training.pictures mixture.wav estimate.wav truth.wav spectrograms.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError, run_command
from models.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_FFT = 2048
HOP = 441
BINS_SHOWN = 256
LOWEST_HZ = 40.0
RANGE_DB = 80.0


def spectrogram_triptych(
    mixture: Tensor | np.ndarray,
    estimate: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    sample_rate: int,
) -> Figure:
    """Draw the spectrograms of three `[channel, time]` waveforms side by side.

    Channels are averaged; frequency is logarithmic; the panels share one colour scale of 80 dB
    below the loudest point of the mixture and the truth.
    """
    from matplotlib.figure import Figure

    waves = {"mixture": mixture, "estimate": estimate, "truth": truth}
    powers = {name: _log_spectrogram(wave, sample_rate) for name, wave in waves.items()}
    top = max(float(powers["mixture"].max()), float(powers["truth"].max()))
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    longest = max(wave.shape[-1] for wave in waves.values()) / sample_rate
    for panel, (name, power) in zip(panels, powers.items(), strict=True):
        image = panel.imshow(
            power,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=top - RANGE_DB,
            vmax=top,
            extent=(0, waves[name].shape[-1] / sample_rate, 0, 1),
            interpolation="nearest",
        )
        panel.set_xlim(0, longest)
        panel.set_title(name)
        panel.set_xlabel("time [s]")
    octaves = np.log2(sample_rate / 2 / LOWEST_HZ)
    ticks = [hz for hz in (100, 300, 1000, 3000, 10000) if hz < sample_rate / 2]
    panels[0].set_yticks([np.log2(hz / LOWEST_HZ) / octaves for hz in ticks])
    panels[0].set_yticklabels([f"{hz / 1000:g}" for hz in ticks])
    panels[0].set_ylabel("frequency [kHz]")
    figure.colorbar(image, ax=list(panels), label="level [dB]", pad=0.01)
    return figure


def _log_spectrogram(wave: Tensor | np.ndarray, sample_rate: int) -> np.ndarray:
    """Level in dB of the channels' mean on logarithmically spaced bins, `[bin, frame]`."""
    mono = torch.as_tensor(wave).detach().float().cpu().mean(0)  # t
    window = torch.hann_window(N_FFT)
    spectrum = torch.stft(
        mono, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True
    )  # f t
    level = 20 * torch.log10(spectrum.abs().clamp_min(1e-6) / (N_FFT / 4))
    hertz = np.geomspace(LOWEST_HZ, sample_rate / 2, BINS_SHOWN)
    rows = np.rint(hertz / sample_rate * N_FFT).astype(int).clip(0, N_FFT // 2)
    # The loudest bin of each row: a harmonic never falls between two rows.
    return np.maximum.reduceat(level.numpy(), rows, axis=0)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from separation.audio import load_audio

    parser = argparse.ArgumentParser(
        prog="python -m training.pictures",
        description="Draw the spectrograms of a mixture, an estimate and the truth.",
    )
    for name in ("mixture", "estimate", "truth"):
        parser.add_argument(name, type=Path, help="audio file")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    paths = (args.mixture, args.estimate, args.truth)
    waves, rates = zip(*(load_audio(path) for path in paths), strict=True)
    if len(set(rates)) > 1:
        raise InputError(f"{args.estimate}: the three files must have one sample rate, not {rates}")
    figure = spectrogram_triptych(waves[0], waves[1], waves[2], rates[0])
    with whole_file(args.picture) as temporary:
        figure.savefig(temporary, format="png")
    return 0


if __name__ == "__main__":
    run_command(main)
