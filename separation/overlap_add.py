"""Separate signals longer than the network can take at once: pure functions over a network.

A network is any callable [batch, channel, time] -> [batch, stem, channel, time]. Chunks are
its input windows. Neighbours share `overlap` of their length: the outer quarter of the shared
part is context whose output is discarded, the rest is a raised-cosine cross-fade, so that the
weights of all chunks sum to one. The true start and end of a signal are not faded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from models.errors import InputError

Network = Callable[[Tensor], Tensor]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Chunk:
    """Input window of the network. Of its output, the first `skip` samples are only context."""

    audio: Tensor  # c t
    skip: int
    is_first: bool
    is_last: bool


Stack = tuple[list[Chunk], Tensor]  # chunks that go through the network together; b c t


def hop_frames(chunk_frames: int, overlap: float) -> int:
    """Samples between the starts of neighbouring chunks.

    Raises InputError if the chunk is empty or overlap is outside [0, 1).
    """
    if chunk_frames < 1:
        raise InputError(f"chunk of {chunk_frames} samples: must be at least one")
    if not 0 <= overlap < 1:
        raise InputError(f"overlap {overlap}: must be at least 0 and below 1 (0.25 is usual)")
    return max(1, chunk_frames - round(chunk_frames * overlap))


@lru_cache(maxsize=8)
def chunk_window(frames: int, shared: int, is_first: bool, is_last: bool) -> Tensor:
    """Weights [time] of a chunk of `frames` samples that shares `shared` with its neighbours.

    Kept for the next chunk: not to be changed in place.
    """
    window = torch.ones(frames, dtype=torch.float64)
    context = shared // 4
    steps = torch.arange(shared, dtype=torch.float64) + 0.5 - context
    phase = (steps / max(1, shared - 2 * context)).clamp(0, 1)
    fade_in = torch.sin(0.5 * math.pi * phase) ** 2
    if shared and not is_first:
        window[:shared] *= fade_in
    if shared and not is_last:
        window[-shared:] *= 1 - fade_in
    return window.float()


def split_chunks(blocks: Iterable[Tensor], chunk_frames: int, hop: int) -> Iterator[Chunk]:
    """Cut a signal that arrives as blocks [channel, time] of any size into chunks.

    Holds no more than two chunks and a block. Every chunk has `chunk_frames` samples, except
    when the whole signal is shorter: the last one reaches back for real context, never into
    padding.
    """
    pending: list[Tensor] = []  # from the start of the last chunk that was yielded
    frames = 0  # in them
    advance = 0  # from there to the start of the next
    for block in blocks:
        pending.append(block)
        frames += block.shape[-1]
        while frames > advance + chunk_frames:
            buffer = _join(pending)[:, advance:]
            yield Chunk(buffer[:, :chunk_frames], 0, is_first=advance == 0, is_last=False)
            pending, frames, advance = [buffer], buffer.shape[-1], hop
    if frames:
        audio = _join(pending)[:, -chunk_frames:]
        skip = audio.shape[-1] - (frames - advance)
        yield Chunk(audio, skip, is_first=advance == 0, is_last=True)


def _join(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def separate_blocks(
    network: Network,
    blocks: Iterable[Tensor],
    *,
    chunk_frames: int,
    overlap: float = 0.25,
    batch_size: int = 1,
) -> Iterator[Tensor]:
    """Separate a stream: blocks [channel, time] in, finished pieces [stem, channel, time] out.

    Pieces come in order and together have the length of the input. The memory used depends on
    the chunk and the batch, not on the length of the stream.
    """
    hop = hop_frames(chunk_frames, overlap)
    chunks = split_chunks(blocks, chunk_frames, hop)
    outputs = separate_batches(network, batched(chunks, batch_size))
    return crossfade(outputs, chunk_frames, hop)


def batched(chunks: Iterator[Chunk], batch_size: int) -> Iterator[Stack]:
    """Chunks as they go through the network together; the first does not wait for others.

    They are stacked here, where chunks are made, so that the network need not wait for it.
    """
    sizes = chain([1], repeat(max(1, batch_size)))
    while batch := list(islice(chunks, next(sizes))):
        audio = torch.stack([chunk.audio for chunk in batch])
        # Views of the stack: what the chunks were cut from can go.
        yield [replace(chunk, audio=one) for chunk, one in zip(batch, audio, strict=True)], audio


def separate_batches(network: Network, batches: Iterable[Stack]) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with the network's output for it [stem, channel, time]."""
    for chunks, audio in batches:
        yield from zip(chunks, network(audio), strict=True)  # n c t each


def crossfade(
    outputs: Iterable[tuple[Chunk, Tensor]], chunk_frames: int, hop: int
) -> Iterator[Tensor]:
    """Overlap-add: outputs of chunks [stem, channel, time] -> finished pieces of the signal."""
    total = weight = torch.zeros(0)
    for chunk, output in outputs:
        piece = output[..., chunk.skip :]
        frames = piece.shape[-1]
        window = chunk_window(frames, chunk_frames - hop, chunk.is_first, chunk.is_last)
        window = window.to(piece)
        if chunk.is_first:
            total, weight = piece.new_zeros(piece.shape), window.new_zeros(frames)
        total = _add(total, piece * window)
        weight = _add(weight, window)
        done = frames if chunk.is_last else hop
        yield total[..., :done] / weight[:done]
        total, weight = total[..., done:], weight[done:]


def separate_waveform(
    network: Network,
    waveform: Tensor,
    *,
    chunk_frames: int,
    overlap: float = 0.25,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Separate a whole signal [channel, time] -> [stem, channel, time] with cross-faded chunks.

    progress: called with the number of samples finished since its last call.
    Raises InputError for an empty signal or impossible chunks.
    """
    _require_samples(waveform)
    pieces = separate_blocks(
        network, [waveform], chunk_frames=chunk_frames, overlap=overlap, batch_size=batch_size
    )
    return torch.cat(list(_report(pieces, progress)), dim=-1)


def separate_paper(
    network: Network,
    waveform: Tensor,
    *,
    chunk_frames: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Separate a whole signal [channel, time] -> [stem, channel, time] as the authors evaluate.

    Chunks do not overlap, the last is padded with zeros, outputs are joined without a fade and
    cut to length (EuiYeonKim/BSMamba2@42eb8c8). Raises InputError like `separate_waveform`.
    """
    _require_samples(waveform)
    hop_frames(chunk_frames, 0.0)
    frames = waveform.shape[-1]
    padded = torch.nn.functional.pad(waveform, (0, -frames % chunk_frames))
    batches = padded.unflatten(-1, (-1, chunk_frames)).transpose(0, 1).split(max(1, batch_size))
    outputs = (output for batch in batches for output in network(batch))  # n c t
    starts = range(0, frames, chunk_frames)
    pieces = (out[..., : frames - start] for start, out in zip(starts, outputs, strict=True))
    return torch.cat(list(_report(pieces, progress)), dim=-1)


def _report(pieces: Iterable[Tensor], progress: Progress | None) -> Iterator[Tensor]:
    for piece in pieces:
        yield piece
        if progress is not None:
            progress(piece.shape[-1])


def _add(total: Tensor, piece: Tensor) -> Tensor:
    """Sum of two signals that start together, as long as the longer one."""
    if piece.shape[-1] < total.shape[-1]:
        total, piece = piece, total
    shared = total.shape[-1]
    return torch.cat([piece[..., :shared] + total, piece[..., shared:]], dim=-1)


def _require_samples(waveform: Tensor) -> None:
    if waveform.shape[-1] == 0:
        raise InputError("the signal has 0 samples: nothing to separate")
