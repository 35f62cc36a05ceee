"""The training loss: L1 in time plus multi-resolution L1 of complex STFTs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
            window = torch.hann_window(length)
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
            for length in self.windows:
                terms[f"stft_{length}"] = self._spectral_term(error, length)
            total = terms["time"] * self.time_weight
            for length in self.windows:
                total = total + terms[f"stft_{length}"]
        return total, {name: term.detach() for name, term in terms.items()}

    def _spectral_term(self, error: Tensor, length: int) -> Tensor:
        window = self.get_buffer(f"window_{length}").to(error.dtype)
        spectrum = torch.stft(
            error.reshape(-1, error.shape[-1]),
            n_fft=max(length, self.n_fft_min),
            hop_length=self.hop,
            win_length=length,
            window=window,
            return_complex=True,
        )  # batch*stem*c f t
        return spectrum.abs().mean()
