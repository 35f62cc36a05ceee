"""Chunks and their cross-fade, with networks whose exact output is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models.errors import InputError
from separation.overlap_add import (
    chunk_window,
    hop_frames,
    separate_blocks,
    separate_paper,
    separate_waveform,
    split_chunks,
)

CHUNK = 100


def identity(batch: Tensor) -> Tensor:
    return batch[:, None]


def two_stems(batch: Tensor) -> Tensor:
    return torch.stack([batch, -2 * batch], dim=1)


def noise(frames: int, channels: int = 2) -> Tensor:
    return torch.randn(channels, frames, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("overlap", [0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("frames", [1, 2, 37, 99, 100, 101, 150, 199, 200, 201, 500, 1033])
def test_identity_network_returns_its_input(frames: int, overlap: float) -> None:
    waveform = noise(frames)
    for batch_size in (1, 4):
        output = separate_waveform(
            identity, waveform, chunk_frames=CHUNK, overlap=overlap, batch_size=batch_size
        )
        assert output.shape == (1, 2, frames)
        assert (output[0] - waveform).abs().max() < 1e-6


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.33, 0.5])
def test_weights_of_neighbours_sum_to_one(overlap: float) -> None:
    hop = hop_frames(CHUNK, overlap)
    shared = CHUNK - hop
    window = chunk_window(CHUNK, shared, is_first=False, is_last=False)
    ends = window[hop:] + window[:shared]
    torch.testing.assert_close(ends, torch.ones(shared), atol=1e-7, rtol=0)
    assert torch.all(window[shared:hop] == 1)
    # The outer quarter of the shared part is context alone, and the weight never falls inwards.
    assert torch.all(window[: shared // 4] == 0)
    assert torch.all(window[: CHUNK // 2].diff() >= 0)


def test_the_ends_of_a_signal_are_not_faded() -> None:
    first = chunk_window(CHUNK, 40, is_first=True, is_last=False)
    last = chunk_window(CHUNK, 40, is_first=False, is_last=True)
    assert torch.all(first[:60] == 1)
    assert torch.all(last[40:] == 1)
    assert torch.equal(chunk_window(7, 40, is_first=True, is_last=True), torch.ones(7))


def test_context_at_chunk_edges_is_discarded() -> None:
    """A network that is wrong within 5 samples of its chunk's edges does no harm at 40 shared."""

    def wrong_at_edges(batch: Tensor) -> Tensor:
        wrong = batch.clone()
        wrong[..., :5] = 99
        wrong[..., -5:] = 99
        return wrong[:, None]

    waveform = noise(777)
    output = separate_waveform(wrong_at_edges, waveform, chunk_frames=CHUNK, overlap=0.4)[0]
    torch.testing.assert_close(output[:, 5:-5], waveform[:, 5:-5], atol=1e-6, rtol=0)
    assert torch.all(output[:, :5] == 99)
    assert torch.all(output[:, -5:] == 99)


def test_crossfade_is_the_weighted_mean_of_two_chunks() -> None:
    """Each chunk answers with its number; at 50 % overlap the join is the fade itself."""
    counter = itertools.count()

    def numbered(batch: Tensor) -> Tensor:
        return torch.full_like(batch, float(next(counter)))[:, None]

    output = separate_waveform(numbered, noise(150), chunk_frames=CHUNK, overlap=0.5)[0, 0]
    context, fade = 12, 26
    steps = (torch.arange(fade) + 0.5) / fade
    expected = torch.cat(
        [
            torch.zeros(50 + context),
            torch.sin(torch.pi / 2 * steps) ** 2,
            torch.ones(150 - 50 - context - fade),
        ]
    )
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("block_frames", [1, 7, 100, 333, 5000])
def test_blocks_of_any_size_give_the_same_result(block_frames: int) -> None:
    waveform = noise(1033)
    whole = separate_waveform(two_stems, waveform, chunk_frames=CHUNK, overlap=0.25)
    blocks = iter(waveform.split(block_frames, dim=-1))
    pieces = list(separate_blocks(two_stems, blocks, chunk_frames=CHUNK, overlap=0.25))
    assert torch.equal(torch.cat(pieces, dim=-1), whole)


def test_the_first_piece_needs_one_chunk_of_input() -> None:
    taken = 0

    def blocks():
        nonlocal taken
        for block in noise(1000).split(10, dim=-1):
            taken += 10
            yield block

    piece = next(separate_blocks(identity, blocks(), chunk_frames=CHUNK, overlap=0.25))
    assert piece.shape[-1] == 75
    assert taken == 110


def test_every_chunk_of_a_long_signal_is_full_of_signal() -> None:
    waveform = torch.arange(1, 282.0)[None]
    chunks = list(split_chunks([waveform], CHUNK, 75))
    starts = [int(chunk.audio[0, 0]) - 1 for chunk in chunks]
    assert starts == [0, 75, 150, 181]
    assert all(chunk.audio.shape == (1, CHUNK) for chunk in chunks)
    assert [chunk.skip for chunk in chunks] == [0, 0, 0, 225 - 181]
    assert [chunk.is_first for chunk in chunks] == [True, False, False, False]
    assert [chunk.is_last for chunk in chunks] == [False, False, False, True]


def test_paper_protocol_joins_padded_chunks_without_a_fade() -> None:
    sizes = []

    def sums(batch: Tensor) -> Tensor:
        sizes.append(batch.shape[0])
        return batch.sum(-1, keepdim=True).expand_as(batch)[:, None]

    waveform = noise(350)
    output = separate_paper(sums, waveform, chunk_frames=CHUNK, batch_size=3)
    assert output.shape == (1, 2, 350)
    assert sizes == [3, 1]
    for start in (0, 100, 200, 300):
        expected = waveform[:, start : start + 100].sum(-1, keepdim=True)
        piece = output[0, :, start : start + 100]
        torch.testing.assert_close(piece, expected.expand_as(piece))


@pytest.mark.parametrize("frames", [1, 100, 200, 350])
def test_paper_protocol_with_identity(frames: int) -> None:
    waveform = noise(frames)
    assert torch.equal(separate_paper(identity, waveform, chunk_frames=CHUNK)[0], waveform)


@pytest.mark.parametrize("separate", [separate_waveform, separate_paper])
@pytest.mark.parametrize("frames", [1, 100, 333])
def test_progress_counts_every_sample_once(separate, frames: int) -> None:
    counts: list[int] = []
    separate(identity, noise(frames), chunk_frames=CHUNK, progress=counts.append)
    assert sum(counts) == frames


def test_bad_arguments_name_the_value() -> None:
    with pytest.raises(InputError, match="0 samples"):
        separate_waveform(identity, noise(0), chunk_frames=CHUNK)
    with pytest.raises(InputError, match="0 samples"):
        separate_paper(identity, noise(0), chunk_frames=CHUNK)
    with pytest.raises(InputError, match=r"overlap 1\.0"):
        hop_frames(CHUNK, 1.0)
    with pytest.raises(InputError, match="overlap nan"):
        hop_frames(CHUNK, float("nan"))
    with pytest.raises(InputError, match="chunk of 0"):
        hop_frames(0, 0.25)
