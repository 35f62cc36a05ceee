"""The training loss: L1 in time plus multi-resolution L1 of complex STFTs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Elements of a spectrogram worked on at once: bounds the memory of large batches.
SLICE_ELEMENTS = 1 << 26


class SeparationLoss(nn.Module):
    """`time_weight * mean|e| + sum over windows w of mean|STFT_w(e)|`, e = estimate - target.

    The modulus of the complex difference is averaged over batch, stem, channel, bin and frame;
    the means are summed with weight one and the STFTs are not normalised, so that long windows
    weigh more. This is the loss of arXiv 2508.14556 as configured in EuiYeonKim/BSMamba2@42eb8c8.

    Args:
        time_weight: factor of the time term.
        windows: lengths of the periodic Hann windows, in samples.
        hop: hop of every STFT, in samples.
        n_fft_min: shortest FFT, in samples; a shorter window is zero-padded to it on both sides.
    """

    def __init__(
        self,
        time_weight: float = 10.0,
        windows: Sequence[int] = (4096, 2048, 1024, 512, 256),
        hop: int = 147,
        n_fft_min: int = 2048,
    ) -> None:
        super().__init__()
        self.time_weight = time_weight
        self.windows = tuple(windows)
        self.hop = hop
        self.n_fft_min = n_fft_min
        for length in self.windows:
            missing = max(length, n_fft_min) - length
            window = F.pad(torch.hann_window(length), [missing // 2, missing - missing // 2])
            self.register_buffer(f"window_{length}", window, persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare two `[..., time]` waveforms of equal shape, in float32 or wider.

        Returns:
            The loss and its terms (`time`, `stft_4096`, ...), each without its factor; the terms
            carry no gradient.
        """
        with torch.autocast(estimate.device.type, enabled=False):
            dtype = torch.promote_types(estimate.dtype, torch.float32)
            # The STFT is linear: that of the error is the difference of the two.
            error = estimate.to(dtype) - target.to(dtype)
            terms = {"time": error.abs().mean()}
            total = terms["time"] * self.time_weight
            rows = error.reshape(-1, error.shape[-1])  # b*n*c t
            for _, lengths in groupby(self.windows, key=lambda w: max(w, self.n_fft_min)):
                names = [f"window_{length}" for length in lengths]
                windows = torch.stack([self.get_buffer(name) for name in names]).to(dtype)
                spectral, means = _SpectralL1.apply(rows, windows, self.hop)
                total = total + spectral
                spectra = [f"stft_{name.removeprefix('window_')}" for name in names]
                terms |= dict(zip(spectra, means, strict=True))
        return total, {name: term.detach() for name, term in terms.items()}


class _SpectralL1(torch.autograd.Function):
    """Sum over windows of mean |STFT|, and the means, of `[row, time]`.

    The gradient of a mean modulus is the phase, brought back by the adjoint of the STFT: it is
    taken along with the value, so that no spectrogram is kept.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, windows: Tensor, hop: int) -> tuple[Tensor, Tensor]:
        n_fft, half = windows.shape[1], windows.shape[1] // 2
        frames = rows.shape[1] // hop + 1
        count = rows.shape[0] * frames * (half + 1)
        means = rows.new_zeros(len(windows))
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        step = max(1, SLICE_ELEMENTS // (frames * n_fft))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            sums, slope = _moduli(part, windows, hop, gradient is not None)
            means += sums / count
            if gradient is not None and slope is not None:
                gradient[start : start + step] = slope / count
        ctx.mark_non_differentiable(means)
        ctx.save_for_backward(gradient)
        return means.sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_total * gradient, None, None


def _moduli(
    rows: Tensor, windows: Tensor, hop: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of |STFT| a window `[w]`, and the gradient of their total `[row, time]`."""
    n_fft = windows.shape[1]
    padded = F.pad(rows[:, None], [n_fft // 2] * 2, mode="reflect")[:, 0]
    frames = padded.unfold(1, n_fft, hop)  # row frame sample
    sums, slope = [], torch.zeros_like(frames) if with_gradient else None
    for window in windows:
        spectrum = torch.fft.rfft(frames * window)  # row frame bin
        moduli = spectrum.abs()
        sums.append(moduli.sum())
        if slope is not None:
            phase = spectrum.sgn()
            # irfft takes every bin but the outer two for a pair; the STFT has each once.
            phase[..., 0] *= 2
            phase[..., -1] *= 2
            back = torch.fft.irfft(phase, n=n_fft, norm="forward")
            slope.addcmul_(back, window, value=0.5)
    if slope is None:
        return torch.stack(sums), None
    return torch.stack(sums), _unframe(slope, hop, padded.shape[1], rows.shape[1])


def _unframe(frames: Tensor, hop: int, padded: int, length: int) -> Tensor:
    """Adjoint of reflecting and framing: overlap-add, then fold the edges back in."""
    n_fft = frames.shape[-1]
    covered = n_fft + hop * (frames.shape[1] - 1)
    summed = F.fold(
        frames.transpose(1, 2), (1, covered), kernel_size=(1, n_fft), stride=(1, hop)
    ).flatten(1)  # row covered
    summed = F.pad(summed, [0, padded - covered])
    half = n_fft // 2
    middle = summed[:, half : half + length].clone()
    middle[:, 1 : half + 1] += summed[:, :half].flip(1)
    middle[:, length - 1 - half : length - 1] += summed[:, half + length :].flip(1)
    return middle
