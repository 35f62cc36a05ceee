"""One song on its way through a separator, block by block: memory for a few chunks, any length.

    inputs    batches of chunks of the song, checked, at the model's rate and channels
    network   the chunks, separated
    outputs   stems, cross-faded, at the song's own rate, channels and length

Each stage is a generator over the one before; they may run in threads of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from separation.audio import check_finite
from separation.overlap_add import (
    Chunk,
    Network,
    Progress,
    Stack,
    batched,
    crossfade,
    hop_frames,
    separate_batches,
    split_chunks,
)
from separation.reader import AudioStream
from separation.resampling import match_channels, resample_blocks, resampled_frames

if TYPE_CHECKING:
    from separation.separator import Separator

INSTRUMENTAL = "instrumental"


def available_stems(separator: Separator) -> tuple[str, ...]:
    """The model's stems and, if it has vocals, `instrumental`: the mixture minus vocals."""
    names = separator.stem_names
    if "vocals" in names and INSTRUMENTAL not in names:
        return (*names, INSTRUMENTAL)
    return names


def choose_stems(separator: Separator, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """`wanted` stems, or all. Raises InputError if one is not available, or named twice."""
    available = available_stems(separator)
    if wanted is None:
        return available
    for name in wanted:
        if name not in available:
            raise InputError(f"stem {name!r}: the model gives {', '.join(available)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"stems {', '.join(wanted) or 'none'}: name each at most once")
    return tuple(wanted)


class SongSeparation:
    """The three stages for one song.

    Args:
        separator: model, device, chunks.
        stream: the open song.
        stems: names to give, in this order; see `choose_stems`.
        downmix: mix songs of more channels than the model has down to stereo.

    Raises:
        InputError: too many channels, or (from a stage) no samples, NaN or infinity.
    """

    def __init__(
        self,
        separator: Separator,
        stream: AudioStream,
        stems: Sequence[str],
        downmix: bool = False,
    ) -> None:
        self.separator = separator
        self.stream = stream
        self.stems = stems
        wanted = separator.model.config.audio_channels
        try:
            self._matrix, self.channels = match_channels(stream.channels, wanted, downmix)
        except InputError as error:
            raise InputError(f"{stream.name}: {error}") from error
        self.frames = 0  # read so far, at the song's rate
        self.network_seconds = 0.0
        self._hop = hop_frames(separator.chunk_frames, separator.overlap)
        self._mixture: deque[np.ndarray] = deque()  # read, not yet returned
        self._needs_mixture = INSTRUMENTAL in stems and INSTRUMENTAL not in separator.stem_names

    def inputs(self) -> Iterator[Stack]:
        """What goes through the network together, at the model's rate."""
        separator = self.separator
        if separator.protocol == "paper":  # pads the end of a whole song: one chunk for us
            whole = torch.cat(list(self._blocks()), dim=-1)
            yield [Chunk(whole, 0, is_first=True, is_last=True)], whole[None]
            return
        chunks = split_chunks(self._blocks(), separator.chunk_frames, self._hop)
        yield from batched(chunks, separator.batch_size)

    def _blocks(self) -> Iterator[Tensor]:
        """Blocks [channel, time] at the model's rate, as many as the song has."""
        config = self.separator.model.config
        rate = self.stream.rate

        def model_frames() -> int:
            return resampled_frames(self.frames, rate, config.sample_rate)

        resampled = resample_blocks(self._checked(), rate, config.sample_rate, model_frames)
        for block in resampled:
            if self.channels < config.audio_channels:
                block = np.repeat(block, config.audio_channels, axis=0)
            yield torch.from_numpy(block)  # c t
        if not self.frames:
            raise InputError(f"{self.stream.name}: has 0 samples; nothing to separate")

    def network(self, inputs: Iterable[Stack]) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks and their outputs [stem, channel, time] at the model's rate."""
        if self.separator.protocol == "paper":
            for (whole,), _ in inputs:
                yield whole, self._timed(self.separator, whole.audio)
            return
        yield from separate_batches(partial(self._timed, self.separator.network), inputs)

    def outputs(
        self, chunks: Iterable[tuple[Chunk, Tensor]], progress: Progress | None = None
    ) -> Iterator[np.ndarray]:
        """Blocks [stem, channel, time] of the chosen stems at the song's rate; their lengths sum
        to the song's.

        progress: called with the samples finished, at the model's rate.
        """
        config = self.separator.model.config
        names = self.separator.stem_names

        def flat() -> Iterator[np.ndarray]:
            for piece in crossfade(chunks, self.separator.chunk_frames, self._hop):
                if self.channels < config.audio_channels:
                    piece = piece.mean(dim=1, keepdim=True)
                yield piece.flatten(0, 1).numpy()  # n*c t
                if progress is not None:
                    progress(piece.shape[-1])

        rate = self.stream.rate
        resampled = resample_blocks(flat(), config.sample_rate, rate, lambda: self.frames)
        done = 0
        for block in resampled:
            stems = dict(zip(names, block.reshape(len(names), -1, block.shape[1]), strict=True))
            if not np.isfinite(block).all():
                raise InputError(
                    f"{self.stream.name}: the network gave NaN or infinity after "
                    f"{done / rate:.1f} s; try --dtype float32, or other weights"
                )
            if self._needs_mixture:
                stems[INSTRUMENTAL] = self._take_mixture(block.shape[1]) - stems["vocals"]
            done += block.shape[1]
            yield np.stack([stems[name] for name in self.stems])  # n c t

    def _checked(self) -> Iterator[np.ndarray]:
        for block in self.stream.blocks:
            check_finite(block, self.stream.rate, self.stream.name, self.frames)
            if self._matrix is not None:
                block = self._matrix @ block
            self.frames += block.shape[1]
            if self._needs_mixture:
                self._mixture.append(block)
            yield block

    def _take_mixture(self, frames: int) -> np.ndarray:
        """The next samples [channel, time] of the mixture."""
        taken: list[np.ndarray] = []
        while frames:
            block = self._mixture.popleft()
            if block.shape[1] > frames:
                self._mixture.appendleft(block[:, frames:])
                block = block[:, :frames]
            taken.append(block)
            frames -= block.shape[1]
        return np.concatenate(taken, axis=1)

    def _timed(self, network: Network, audio: Tensor) -> Tensor:
        start = time.perf_counter()
        output = network(audio)
        self.network_seconds += time.perf_counter() - start
        return output
