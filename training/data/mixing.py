"""Training and validation examples: random mixes of unrelated stems, and aligned segments.

The recipe of BSMamba2 (EuiYeonKim/BSMamba2@42eb8c8): every stem of a training example comes from
a song of its own, is silenced now and then, and is scaled by a gain of its own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from models.errors import InputError
from training.data.activity import ActivityIndex
from training.data.track import AUDIO_CHANNELS, CorruptAudioError, Track

logger = logging.getLogger(__name__)

Example = dict[str, torch.Tensor]
_MAX_REDRAWS = 50


class RandomMixes(Dataset[Example]):
    """An endless stream of random mixes; example `i` depends on `seed` and `i` alone.

    Any `i >= 0` works, in any process: indices from `ExampleCounter` make the stream the same for
    any number of workers and ranks.

    An example is `{"mixture": [c, t], "target": [n, c, t]}`, float32, n = target stems. The
    mixture is the sum of the scaled stems, added in the order of `stems`; targets are scaled too.

    Args:
        tracks: what `index` was built from.
        index: the active windows; its stems are those that are mixed.
        target_stems: which stems the model learns to give, in its order.
        seed: of the whole stream.
        silent_prob: probability that a stem is all zeros.
        gain: bounds of the uniform linear gain of a stem.

    Raises:
        InputError: a stem has no active window at all, or is unknown.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        index: ActivityIndex,
        target_stems: Sequence[str],
        *,
        seed: int,
        silent_prob: float = 0.1,
        gain: tuple[float, float] = (0.5, 1.5),
    ) -> None:
        _check_index(tracks, index, target_stems, required=list(index.windows))
        self.tracks = tracks
        self.windows = index.windows
        self.segment_frames = index.segment_frames
        self.stems = tuple(index.windows)
        self.target_numbers = [self.stems.index(stem) for stem in target_stems]
        self.seed = seed
        self.silent_prob = silent_prob
        self.gain = gain
        # Shared with the workers, so that a broken file is reported by one of them only.
        self.broken = torch.zeros(len(tracks), len(self.stems), dtype=torch.uint8).share_memory_()

    def __getitem__(self, i: int) -> Example:
        scaled = torch.from_numpy(np.stack([self._draw(i, n) for n in range(len(self.stems))]))
        return {"mixture": _mix(scaled), "target": scaled[self.target_numbers]}

    def _draw(self, i: int, stem_number: int) -> np.ndarray:
        """One stem of example `i`, silenced or scaled: [c, t]."""
        # A generator per example and stem: a redraw of one stem changes no other.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stem_number, i]))
        gain = np.float32(rng.uniform(*self.gain))
        if rng.random() < self.silent_prob:
            return np.zeros((AUDIO_CHANNELS, self.segment_frames), dtype=np.float32)
        return gain * self._read_random_window(rng, stem_number)

    def _read_random_window(self, rng: np.random.Generator, stem_number: int) -> np.ndarray:
        stem = self.stems[stem_number]
        rows = self.windows[stem]
        for _ in range(_MAX_REDRAWS):
            track_number, start = rows[rng.integers(len(rows))]
            try:
                return self.tracks[track_number].read(stem, int(start), self.segment_frames)
            except CorruptAudioError as error:
                # Never remembered to skip the next read: examples would depend on their order.
                if not self.broken[track_number, stem_number]:
                    self.broken[track_number, stem_number] = 1
                    logger.warning("file skipped: %s", error)
        raise InputError(f"{_MAX_REDRAWS} reads of '{stem}' failed in a row: check the data root")


class ExampleCounter(Sampler[int]):
    """The indices of `RandomMixes` for one rank: start + rank, start + rank + world_size, ...

    Args:
        start: examples that all ranks together consumed before, so that a resumed run goes on.
        stop: first index not to give, None for no end.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size or start < 0:
            raise ValueError(f"start {start}, rank {rank}, world_size {world_size}")
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __iter__(self) -> Iterator[int]:
        first = self.start + self.rank
        if self.stop is None:
            return itertools.count(first, self.world_size)
        return iter(range(first, self.stop, self.world_size))


class AlignedSegments(Dataset[Example]):
    """Validation examples: segments as they lie in their songs, the same ones every time.

    An example has the form of one of `RandomMixes`; its mixture is the sum of the song's stems.

    Args:
        tracks: what `index` was built from.
        index: windows in which a target stem is active become examples, in the order of the tracks.
        target_stems: which stems the model gives, in its order.
        max_segments: keep this many, evenly chosen; None keeps all.

    Raises:
        InputError: no target stem has an active window.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        index: ActivityIndex,
        target_stems: Sequence[str],
        max_segments: int | None = None,
    ) -> None:
        _check_index(tracks, index, target_stems, required=[])
        windows = np.unique(np.concatenate([index.windows[s] for s in target_stems]), axis=0)
        if len(windows) == 0:
            raise InputError(_no_windows(tracks, index, ", ".join(target_stems)))
        if max_segments is not None and max_segments < len(windows):
            windows = windows[np.linspace(0, len(windows) - 1, max_segments).round().astype(int)]
        self.tracks = tracks
        self.windows = windows
        self.segment_frames = index.segment_frames
        self.stems = tuple(index.windows)
        self.target_numbers = [self.stems.index(stem) for stem in target_stems]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Example:
        track_number, start = self.windows[i]
        track = self.tracks[track_number]
        read = [track.read(stem, int(start), self.segment_frames) for stem in self.stems]
        stems = torch.from_numpy(np.stack(read))  # s c t
        return {"mixture": _mix(stems), "target": stems[self.target_numbers]}


def _mix(stems: torch.Tensor) -> torch.Tensor:
    """[s, c, t] -> [c, t], one stem after the other: float sums depend on the order."""
    mixture = torch.zeros_like(stems[0])
    for stem in stems:
        mixture += stem
    return mixture


def _check_index(
    tracks: Sequence[Track],
    index: ActivityIndex,
    target_stems: Sequence[str],
    required: Sequence[str],
) -> None:
    unknown = [stem for stem in target_stems if stem not in index.windows]
    if unknown or not target_stems:
        raise InputError(
            f"unknown target stems {unknown or 'none'}: choose from {', '.join(index.windows)}"
        )
    for stem in required:
        if len(index.windows[stem]) == 0:
            raise InputError(_no_windows(tracks, index, stem))


def _no_windows(tracks: Sequence[Track], index: ActivityIndex, stem: str) -> str:
    seconds = index.segment_frames / tracks[0].sample_rate
    longest = max(track.frames / track.sample_rate for track in tracks)
    return (
        f"no active {seconds:g} s window of '{stem}' in {len(tracks)} tracks (the longest has"
        f" {longest:.1f} s): use shorter segments, or check that the stems are not silent"
    )
