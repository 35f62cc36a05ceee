"""A checkpoint ready to separate: device, precision, chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import BSMamba2, load_checkpoint
from models.bsmamba2 import MAX_CHUNK_SECONDS
from models.device import pick_device
from models.errors import InputError, is_out_of_memory
from models.graphs import GraphedNetwork
from separation.audio import check_audio
from separation.overlap_add import Progress, hop_frames, separate_paper, separate_waveform
from separation.reader import BLOCK_FRAMES, AudioStream, open_audio
from separation.streaming import SongSeparation, choose_stems

PROTOCOLS = ("ours", "paper")
DTYPES = ("auto", "float32", "bfloat16")
AUTO_BATCH = {"cuda": 8}  # chunks at once; elsewhere one: more are no faster on a CPU


@dataclass(frozen=True)
class Separator:
    """Separates waveforms of any length with one model.

    protocol: `ours` cross-fades chunks that overlap; `paper` joins chunks that do not.
    batch_size: chunks at once; halved, with a warning, whenever memory runs out.
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
    _batch_limit: list[int] = field(init=False, repr=False, compare=False)
    _ran: set[int] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 < self.chunk_seconds <= MAX_CHUNK_SECONDS:
            raise InputError(
                f"chunk of {self.chunk_seconds} s: must be above 0 and at most"
                f" {MAX_CHUNK_SECONDS} (8 is usual)"
            )
        if self.batch_size < 1:
            raise InputError(f"batch size {self.batch_size}: must be at least 1")
        hop_frames(self.chunk_frames, self.overlap)
        # Chunks have one shape: on CUDA the network is recorded once and replayed.
        object.__setattr__(self, "_graphed", GraphedNetwork(self.model))
        object.__setattr__(self, "_batch_limit", [self.batch_size])

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", **options: Any) -> Separator:
        """Load a checkpoint in eval mode on `device`; `options` are the other fields.

        `batch_size` may be "auto": many chunks at once on CUDA, one elsewhere.
        Raises InputError if the file is no checkpoint of this network or the device is missing.
        """
        chosen = pick_device(device)
        if options.get("batch_size") == "auto":
            options["batch_size"] = AUTO_BATCH.get(chosen.type, 1)
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
            self.network,
            waveform,
            chunk_frames=self.chunk_frames,
            batch_size=self.batch_size,
            progress=progress,
        )

    def separate_audio(
        self,
        audio: np.ndarray,
        rate: int,
        progress: Progress | None = None,
        stems: Sequence[str] | None = None,
        downmix: bool = False,
        name: str = "waveform",
    ) -> dict[str, np.ndarray]:
        """Separate [channel, time] of any rate, mono or stereo -> stems of the same form.

        If the model has vocals, `instrumental` is the mixture minus vocals, sample by sample.
        stems: the ones wanted, of the model's and `instrumental`; None is all.
        downmix: take more than two channels too, mixed down.
        Raises InputError, naming `name`, for any other number of channels, no samples, NaN.
        """
        check_audio(audio, rate, name)
        blocks = (
            audio[:, start : start + BLOCK_FRAMES]
            for start in range(0, audio.shape[1], BLOCK_FRAMES)
        )
        stream = AudioStream(name, rate, audio.shape[0], audio.shape[1], blocks)
        return _collect(self, stream, progress, stems, downmix)

    def network(self, batch: Tensor) -> Tensor:
        """Separate chunks [batch, channel, time] -> float32 [batch, stem, channel, time], on the
        CPU. Raises InputError if not even one chunk fits into memory."""
        outputs: list[Tensor] = []
        done = 0
        while done < len(batch):
            size = self._batch_limit[0]
            part = batch[done : done + size]
            filled = self._filled(part)
            try:
                outputs.append(self._run(filled)[: len(part)])
                done += size
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_batch(len(filled))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _filled(self, part: Tensor) -> Tensor:
        """The end of a song as a whole batch, where such a one is recorded as a CUDA graph already:
        to record another shape would take longer."""
        missing = self._batch_limit[0] - len(part)
        if self.device.type != "cuda" or len(part) == 1 or len(part) + missing not in self._ran:
            return part
        return F.pad(part, (0, 0, 0, 0, 0, missing))

    def _run(self, batch: Tensor) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bfloat16)
        with torch.inference_mode(), autocast:
            output = self._graphed(batch.to(self.device)).float().cpu()
        self._ran.add(len(batch))
        return output

    def _halve_batch(self, size: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise InputError(
                f"out of memory on {self.device} with one chunk of {self.chunk_seconds:g} s; "
                "lower --chunk-seconds, or use --device cpu"
            )
        self._batch_limit[0] = size // 2
        warnings.warn(
            f"out of memory with {size} chunks at once; going on with {size // 2}", stacklevel=3
        )


def _collect(
    separator: Separator,
    stream: AudioStream,
    progress: Progress | None,
    stems: Sequence[str] | None,
    downmix: bool,
) -> dict[str, np.ndarray]:
    names = choose_stems(separator, stems)
    song = SongSeparation(separator, stream, names, downmix)
    blocks = list(song.outputs(song.network(song.inputs()), progress))  # n c t
    return dict(zip(names, np.concatenate(blocks, axis=-1), strict=True))


def separate(
    audio: str | Path | np.ndarray | Tensor,
    checkpoint: str | Path | Separator,
    *,
    sample_rate: int | None = None,
    progress: Progress | None = None,
    stems: Sequence[str] | None = None,
    downmix: bool = False,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Separate a song into its stems, float32 [channel, time] at its own rate and length.

    audio: a file, or a waveform [channel, time] or [time] with its `sample_rate` in Hz.
    checkpoint: a file, or a `Separator` that is already loaded.
    stems, downmix: see `Separator.separate_audio`.
    options: fields of `Separator` (`device`, `overlap`, ...), if `checkpoint` is a file.
    Raises InputError for bad audio, a bad checkpoint or an impossible option.
    """
    if not isinstance(checkpoint, Separator):
        checkpoint = Separator.from_checkpoint(checkpoint, **options)
    elif options:
        raise InputError(f"{next(iter(options))}: set it where the Separator is made")
    if isinstance(audio, (str, Path)):
        with open_audio(audio) as stream:
            return _collect(checkpoint, stream, progress, stems, downmix)
    if sample_rate is None:
        raise InputError("separate: give the sample_rate of the waveform")
    if not sample_rate > 0:
        raise InputError(f"sample_rate {sample_rate}: must be above 0")
    samples = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
    if not np.issubdtype(samples.dtype, np.floating):
        raise InputError(f"separate: {samples.dtype} samples; give floats, full scale being 1")
    waveform = np.atleast_2d(samples.astype(np.float32))
    return checkpoint.separate_audio(waveform, sample_rate, progress, stems, downmix)
