"""A checkpoint ready to separate: device, precision, chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import BSMamba2, load_checkpoint
from models.errors import InputError
from models.graphs import GraphedNetwork
from separation.audio import check_audio, load_audio, resample
from separation.overlap_add import Progress, hop_frames, separate_paper, separate_waveform

PROTOCOLS = ("ours", "paper")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises InputError if `name` is not available here."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, found in available.items() if found))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: expected one of {', '.join(DEVICES)}") from error
    if not available.get(device.type, False):
        raise InputError(f"device {name!r}: not available on this machine; use cpu or auto")
    return device


@dataclass(frozen=True)
class Separator:
    """Separates waveforms of any length with one model.

    protocol: `ours` cross-fades chunks that overlap; `paper` joins chunks that do not.
    dtype: of the matrix products, under autocast; weights stay float32. `auto` is what
    training uses: bfloat16 on CUDA, float32 elsewhere.
    Raises InputError, naming the field, for a value that cannot work.
    """

    model: BSMamba2
    device: torch.device
    chunk_seconds: float = 8.0
    overlap: float = 0.25
    batch_size: int = 1
    protocol: str = "ours"
    dtype: str = "auto"
    _graphed: GraphedNetwork = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 < self.chunk_seconds < math.inf:
            raise InputError(f"chunk of {self.chunk_seconds} s: must be above 0 (8 is usual)")
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size}: must be at least 1")
        hop_frames(self.chunk_frames, self.overlap)
        # Chunks have one shape: on CUDA the network is recorded once and replayed.
        object.__setattr__(self, "_graphed", GraphedNetwork(self.model))

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", **options: Any) -> Separator:
        """Load a checkpoint in eval mode on `device`; `options` are the other fields.

        Raises InputError if the file is no checkpoint of this network or the device is missing.
        """
        chosen = pick_device(device)
        return cls(load_checkpoint(path, device=chosen), chosen, **options)

    @property
    def chunk_frames(self) -> int:
        return round(self.chunk_seconds * self.model.config.sample_rate)

    @property
    def uses_bfloat16(self) -> bool:
        return self.dtype == "bfloat16" or (self.dtype == "auto" and self.device.type == "cuda")

    @property
    def stem_names(self) -> tuple[str, ...]:
        return tuple(self.model.config.stem_names)

    def __call__(self, waveform: Tensor, progress: Progress | None = None) -> Tensor:
        """Separate [channel, time] at the model's rate -> float32 [stem, channel, time]."""
        cut: Callable[..., Tensor]
        if self.protocol == "paper":
            cut = separate_paper
        else:
            cut = partial(separate_waveform, overlap=self.overlap)
        return cut(
            self._network,
            waveform,
            chunk_frames=self.chunk_frames,
            batch_size=self.batch_size,
            progress=progress,
        )

    def separate_audio(
        self, audio: np.ndarray, rate: int, progress: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """Separate [channel, time] of any rate, mono or stereo -> stems of the same form.

        If the model has vocals, `instrumental` is the mixture minus vocals, sample by sample.
        Raises InputError for any other number of channels.
        """
        config = self.model.config
        channels, frames = audio.shape
        if channels not in (1, config.audio_channels):
            raise InputError(
                f"{channels} channels: the model takes 1 or {config.audio_channels}; "
                "mix it down first"
            )
        model_frames = max(1, round(frames * config.sample_rate / rate))
        mixture = resample(audio, rate, config.sample_rate, model_frames)
        if channels < config.audio_channels:
            mixture = np.repeat(mixture, config.audio_channels, axis=0)
        outputs = self(torch.from_numpy(mixture), progress).numpy()  # n c t
        if channels < config.audio_channels:
            outputs = outputs.mean(axis=1, keepdims=True)
        stems = {
            name: resample(output, config.sample_rate, rate, frames)
            for name, output in zip(self.stem_names, outputs, strict=True)
        }
        if "vocals" in stems and "instrumental" not in stems:
            stems["instrumental"] = audio - stems["vocals"]
        return stems

    def _network(self, batch: Tensor) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bfloat16)
        with torch.inference_mode(), autocast:
            return self._graphed(batch.to(self.device)).float().cpu()


def separate(
    audio: str | Path | np.ndarray | Tensor,
    checkpoint: str | Path | Separator,
    *,
    sample_rate: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Separate a song into its stems, float32 [channel, time] at its own rate and length.

    audio: a file, or a waveform [channel, time] or [time] with its `sample_rate` in Hz.
    checkpoint: a file, or a `Separator` that is already loaded.
    options: fields of `Separator` (`device`, `overlap`, ...), if `checkpoint` is a file.
    Raises InputError for bad audio, a bad checkpoint or an impossible option.
    """
    if isinstance(audio, (str, Path)):
        name, (waveform, rate) = str(audio), load_audio(audio)
    else:
        if sample_rate is None:
            raise InputError("separate: give the sample_rate of the waveform")
        waveform = np.atleast_2d(np.asarray(audio, dtype=np.float32))
        name, rate = "waveform", sample_rate
        check_audio(waveform, rate, name)
    if not isinstance(checkpoint, Separator):
        checkpoint = Separator.from_checkpoint(checkpoint, **options)
    try:
        return checkpoint.separate_audio(waveform, rate, progress)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
