"""BSMamba2: a band-split, dual-path network of bidirectional Mamba-2 blocks (arXiv 2508.14556).

waveform -> STFT -> 62 bands -> (time block, band block) x depth -> complex masks -> iSTFT
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import InputError
from models.mamba2 import Mamba2Block, stacked

# Widths in bins from DC upwards, 1025 in all: (bands, bins each).
PAPER_BANDS = ((24, 2), (12, 4), (8, 12), (8, 24), (8, 48), (1, 128), (1, 129))
TIME_AXIS, BAND_AXIS = 1, 2  # of b t k d
MAX_CHUNK_SECONDS = 3600  # at once: a longer one is a slip of the hand


@dataclass(frozen=True)
class BSMamba2Config:
    """Shape of the network; the defaults are the paper's (48,098,188 parameters).

    Attributes:
        dim: features d of a band and frame.
        depth: pairs of time and band blocks.
        d_state, d_conv, expand, headdim: see `Mamba2Mixer`.
        num_stems: stems estimated from one mixture.
        audio_channels: channels of the waveform.
        n_fft, hop_length: STFT in samples; Hann window of n_fft.
        mask_estimator_depth: linear layers of a mask estimator.
        scan_backend: see `models.dispatch.SCAN_BACKENDS`.
        gradient_checkpointing: recompute every block in the backward pass, to save memory.
        sample_rate: in Hz, what the network is trained at.
        stem_names: one name a stem.
        band_widths: bins of each band; their sum is n_fft // 2 + 1.

    Raises:
        InputError: a value is impossible; the message names the field.
    """

    dim: int = 256
    depth: int = 6
    d_state: int = 128
    d_conv: int = 4
    expand: int = 4
    headdim: int = 64
    num_stems: int = 1
    audio_channels: int = 2
    n_fft: int = 2048
    hop_length: int = 441
    mask_estimator_depth: int = 2
    scan_backend: str = "auto"
    gradient_checkpointing: bool = False
    sample_rate: int = 44100
    stem_names: tuple[str, ...] = ("vocals",)
    band_widths: tuple[int, ...] = tuple(w for count, w in PAPER_BANDS for _ in range(count))

    def __post_init__(self) -> None:
        for name in ("stem_names", "band_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.hop_length > self.n_fft // 2:
            raise InputError(f"hop_length {self.hop_length} is more than half of n_fft")
        if (self.expand * self.dim) % self.headdim:
            raise InputError(
                f"headdim {self.headdim} does not divide expand * dim = {self.expand * self.dim}"
            )
        if len(self.stem_names) != self.num_stems or len(set(self.stem_names)) < self.num_stems:
            raise InputError(
                f"stem_names must hold num_stems = {self.num_stems} different names, "
                f"not {list(self.stem_names)}"
            )
        if sum(self.band_widths) != self.n_fft // 2 + 1 or min(self.band_widths) < 1:
            raise InputError(
                f"band_widths sum to {sum(self.band_widths)} bins, "
                f"n_fft // 2 + 1 = {self.n_fft // 2 + 1} are needed"
            )

    @property
    def band_features(self) -> tuple[int, ...]:
        """Real numbers a band and frame: bins x channels x (real, imaginary)."""
        return tuple(2 * self.audio_channels * width for width in self.band_widths)


class BandNorm(nn.Module):
    """gamma sqrt(n) u / max(|u|, 1e-12) over the last axis: no epsilon under the root.

    The scale of quiet frames cancels as that of loud ones does; zeros stay zeros.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, u: Tensor) -> Tensor:
        return unit_rms(u) * self.gamma


def unit_rms(u: Tensor) -> Tensor:
    """sqrt(n) u / max(|u|, 1e-12) over the last axis, in float32 or better."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=1e-12) * u.shape[-1] ** 0.5


def equal_runs(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbours of equal size: (index of the first, how many, their size)."""
    runs, start = [], 0
    for size, members in groupby(sizes):
        count = len(list(members))
        runs.append((start, count, size))
        start += count
    return runs


def grouped_linear(rows: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """One linear layer of its own for every index of k, as one product. k r i -> k r o"""
    weight, bias = stacked(layers, "weight"), stacked(layers, "bias")  # k o i, k o
    return torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))


class BandSplit(nn.Module):
    """Features of every bin -> d features of every band (paper, section 2.1)."""

    def __init__(self, config: BSMamba2Config) -> None:
        super().__init__()
        self.sizes = config.band_features
        self.to_features = nn.ModuleList(
            nn.Sequential(BandNorm(size), nn.Linear(size, config.dim)) for size in self.sizes
        )

    def forward(self, features: Tensor) -> Tensor:
        """`[b, t, f c 2]` -> `[b, t, k, d]`"""
        runs = equal_runs(self.sizes)
        parts = features.split([count * size for _, count, size in runs], dim=-1)
        bands = []
        for (first, count, size), part in zip(runs, parts, strict=True):
            norms, linears = zip(*self.to_features[first : first + count], strict=True)
            normal = unit_rms(part.unflatten(-1, (count, size)))  # b t k i
            normal = (normal * stacked(norms, "gamma")).flatten(0, 1).transpose(0, 1)  # k bt i
            bands.append(grouped_linear(normal, linears).transpose(0, 1))  # bt k d
        return torch.cat(bands, dim=1).unflatten(0, features.shape[:2])


class MaskEstimator(nn.Module):
    """d features of every band -> a complex mask of every bin (paper, section 2.3)."""

    def __init__(self, config: BSMamba2Config) -> None:
        super().__init__()
        self.sizes = config.band_features
        hidden = 4 * config.dim
        widths = [config.dim] + [hidden] * (config.mask_estimator_depth - 1)

        def perceptron(size: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for wide_in, wide_out in zip(widths, widths[1:], strict=False):
                layers += [nn.Linear(wide_in, wide_out), nn.Tanh()]
            return nn.Sequential(*layers, nn.Linear(widths[-1], 2 * size))

        self.to_freqs = nn.ModuleList(
            nn.Sequential(perceptron(size), nn.GLU(dim=-1)) for size in self.sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, k, d]` -> `[b, t, f c 2]`"""
        perceptrons, _ = zip(*self.to_freqs, strict=True)
        *hidden, outputs = list(zip(*perceptrons, strict=True))  # layer by layer, all bands
        # Bands first throughout: any other order costs copies of the widest layer.
        rows = x.flatten(0, 1).transpose(0, 1)  # k bt d
        for layers in hidden[::2]:  # Linear, Tanh, Linear, Tanh ...
            rows = torch.tanh(grouped_linear(rows, layers))  # k bt 4d
        runs = equal_runs(self.sizes)
        # One split: the gradient of a slice would be as large as rows, for every slice.
        parts = rows.split([count for _, count, _ in runs])
        masks = []
        for (first, count, _), part in zip(runs, parts, strict=True):
            gated = F.glu(grouped_linear(part, outputs[first : first + count]), dim=-1)  # k bt fc2
            masks.append(gated.transpose(0, 1).flatten(1))
        return torch.cat(masks, dim=-1).unflatten(0, x.shape[:2])


class BSMamba2(nn.Module):
    """Mixture in, stems out."""

    window: Tensor

    def __init__(self, config: BSMamba2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or BSMamba2Config()

        def block() -> Mamba2Block:
            return Mamba2Block(
                config.dim,
                config.d_state,
                config.d_conv,
                config.expand,
                config.headdim,
                config.scan_backend,
            )

        self.layers = nn.ModuleList(nn.ModuleList([block(), block()]) for _ in range(config.depth))
        # The backward pass begins with the last block, whose work then lies in memory anyway.
        last = self.layers[-1].get_submodule("1")
        assert isinstance(last, Mamba2Block)
        last.keeps_work = not config.gradient_checkpointing
        self.final_norm = BandNorm(config.dim)
        self.band_split = BandSplit(config)
        self.mask_estimators = nn.ModuleList(MaskEstimator(config) for _ in range(config.num_stems))
        window = torch.hann_window(config.n_fft)
        self.register_buffer("window", window, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Separate `[b, c, t]` of any length -> `[b, n, c, t]`.

        Raises:
            InputError: the shape is not `[b, audio_channels, t >= 1]`.
        """
        stems = self.forward_spectrogram(self.stft(waveform))
        return self.istft(stems, waveform.shape[-1])

    def forward_spectrogram(self, spec: Tensor) -> Tensor:
        """Complex mixture `[b, c, f, t]` -> complex stems `[b, n, c, f, t]`.

        Raises:
            InputError: channels or bins are not the network's.
        """
        config = self.config
        wanted = (config.audio_channels, config.n_fft // 2 + 1)
        if spec.ndim != 4 or tuple(spec.shape[1:3]) != wanted:
            raise InputError(
                f"a spectrogram [batch, {wanted[0]}, {wanted[1]}, frames] is needed, "
                f"not {list(spec.shape)}"
            )
        features = torch.view_as_real(spec.permute(0, 3, 2, 1)).flatten(2)  # b t fc2
        stems = [self._apply_mask(mask, spec) for mask in self.masks(features)]
        return torch.stack(stems, dim=1)  # b n c f t

    def masks(self, features: Tensor) -> Iterator[Tensor]:
        """Features of the mixture `[b, t, f c 2]` -> a complex mask of every stem, of that form."""
        x = self.band_split(features)  # b t k d
        for pair in self.layers:
            for block, axis in zip(pair.children(), (TIME_AXIS, BAND_AXIS), strict=True):
                x = self._run(block, x, axis)
        x = self.final_norm(x)
        return (estimator(x) for estimator in self.mask_estimators)

    def _run(self, block: nn.Module, x: Tensor, axis: int) -> Tensor:
        if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, axis, use_reentrant=False)
        return block(x, axis)

    def _apply_mask(self, mask: Tensor, spec: Tensor) -> Tensor:
        """Complex product of every bin; mask `[b, t, f c 2]`, spec and result `[b, c, f, t]`."""
        pairs = mask.to(spec.real.dtype).unflatten(-1, (-1, self.config.audio_channels, 2))
        return torch.view_as_complex(pairs.contiguous()).permute(0, 3, 2, 1) * spec

    def stft(self, waveform: Tensor) -> Tensor:
        """`[b, c, t]` -> complex `[b, c, f, t]`: centred, reflected edges, not normalised."""
        config = self.config
        if waveform.ndim != 3 or waveform.shape[1] != config.audio_channels:
            raise InputError(
                f"a waveform [batch, {config.audio_channels}, time] is needed, "
                f"not {list(waveform.shape)}"
            )
        if waveform.shape[-1] == 0:
            raise InputError("the waveform has no samples")
        wide = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
        short = config.n_fft // 2 + 1 - wide.shape[-1]
        if short > 0:  # too little to reflect
            wide = F.pad(wide, [0, short])
        rest = wide.shape[-1] % config.hop_length
        if rest > 3 * config.n_fft // 8:  # under the last window's edge, where istft divides by it
            wide = F.pad(wide, [0, config.hop_length - rest])
        spec = torch.stft(
            wide.flatten(0, 1),
            config.n_fft,
            config.hop_length,
            window=self.window.to(wide.dtype),
            return_complex=True,
        )
        return spec.unflatten(0, waveform.shape[:2])

    def istft(self, spec: Tensor, length: int) -> Tensor:
        """Complex `[..., f, t]` -> `[..., length]`, the least-squares inverse of `stft`."""
        config = self.config
        wave = torch.istft(
            spec.flatten(0, -3),
            config.n_fft,
            config.hop_length,
            window=self.window.to(spec.real.dtype),
            length=max(length, config.n_fft // 2 + 1),
        )
        return wave[..., :length].unflatten(0, spec.shape[:-2])
