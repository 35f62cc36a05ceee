"""Sample rates and channels of a stream of blocks, float32 [channel, time]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import soxr

from models.errors import InputError

# Left and right shares of each channel in the order of WAV files; ITU-R BS.775, without LFE.
_H = 0.5**0.5
DOWNMIX = {
    3: ((1, 0, _H), (0, 1, _H)),  # L R C
    4: ((1, 0, _H, 0), (0, 1, 0, _H)),  # L R Ls Rs
    5: ((1, 0, _H, _H, 0), (0, 1, _H, 0, _H)),  # L R C Ls Rs
    6: ((1, 0, _H, 0, _H, 0), (0, 1, _H, 0, 0, _H)),  # L R C LFE Ls Rs
    8: ((1, 0, _H, 0, _H, 0, _H, 0), (0, 1, _H, 0, 0, _H, 0, _H)),  # ... and two more a side
}


def resampled_frames(frames: int, rate: int, new_rate: int) -> int:
    """Length at the new rate, at least one sample of a signal that has any."""
    return max(min(frames, 1), round(frames * new_rate / rate))


def resample_blocks(
    blocks: Iterable[np.ndarray], rate: int, new_rate: int, frames: Callable[[], int]
) -> Iterator[np.ndarray]:
    """Resample a stream in soxr's very high quality, without a delay.

    frames: called once `blocks` has ended: the length of the result, which is cut or filled up
    with zeros to it.
    """
    if rate == new_rate:
        yield from blocks
        return
    stream: soxr.ResampleStream | None = None
    done = 0
    for block in blocks:
        if stream is None:
            stream = soxr.ResampleStream(rate, new_rate, len(block), "float32", quality="VHQ")
        piece = stream.resample_chunk(np.ascontiguousarray(block.T, dtype=np.float32)).T
        if piece.shape[1]:
            done += piece.shape[1]
            yield np.ascontiguousarray(piece)
    if stream is None:
        return
    channels = len(block)
    rest = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T
    missing = max(0, frames() - done)
    rest = np.pad(rest[:, :missing], [(0, 0), (0, max(0, missing - rest.shape[1]))])
    if rest.shape[1]:
        yield np.ascontiguousarray(rest, dtype=np.float32)


def match_channels(channels: int, wanted: int, downmix: bool) -> tuple[np.ndarray | None, int]:
    """How `channels` of a song become the signal that is separated: (matrix or None, its channels).

    Mono stays mono (the model hears it on all its channels). Raises InputError for more channels
    than the model has, without `downmix`.
    """
    if channels in (1, wanted):
        return None, channels
    if not downmix:
        raise InputError(
            f"{channels} channels: the model takes 1 or {wanted}; --downmix mixes them down"
        )
    if wanted != 2 or channels not in DOWNMIX:
        return np.full((1, channels), 1 / channels, np.float32), 1
    shares = np.array(DOWNMIX[channels])
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32), 2
