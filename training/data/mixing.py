"""Training and validation examples: random mixes of unrelated stems, and aligned segments.

The recipe of BSMamba2 (EuiYeonKim/BSMamba2@42eb8c8): every stem of a training example comes from
a song of its own, is silenced now and then, and is scaled by a gain of its own. What `augment.py`
adds to it is off by default.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from models.errors import InputError
from training.data.activity import ActivityIndex
from training.data.augment import Augmentation, Change
from training.data.failures import ReadFailures
from training.data.track import AUDIO_CHANNELS, CorruptAudioError, Track

logger = logging.getLogger(__name__)

Example = dict[str, torch.Tensor]
_MAX_REDRAWS = 50
_NONE = Augmentation()
_MAX_LAYERS = 3  # windows of one stem on top of each other
_WHOLE, _PLACE = 8, 9  # purposes of random numbers beside 0 for a stem and 1 for its changes


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
        augmentation: further changes to a stem; none by default.
        max_failed_share: as for `ReadFailures`.

    Raises:
        InputError: a stem has no active window at all, or is unknown; while reading: too many
            reads failed.
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
        augmentation: Augmentation | None = None,
        max_failed_share: float = 1.0,
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
        self.augmentation = augmentation or Augmentation()
        self.failures = ReadFailures(max_failed_share)
        # Shared with the workers, so that a broken file is reported by one of them only.
        self.broken = torch.zeros(len(tracks), len(self.stems), dtype=torch.uint8).share_memory_()

    def __getitem__(self, i: int) -> Example:
        stems = np.zeros((len(self.stems), AUDIO_CHANNELS, self.segment_frames), np.float32)
        rng = self._generator(i, 0, _WHOLE)
        augmentation = self.augmentation if self.augmentation.applies(i, rng.random()) else _NONE
        leader = self._leader(rng, augmentation.aligned_prob)
        for number, stem in enumerate(stems):
            self._draw(i, number, leader, augmentation, stem)
        scaled = torch.from_numpy(stems)  # s c t
        return {"mixture": _mix(scaled), "target": scaled[self.target_numbers]}

    def _leader(self, rng: np.random.Generator, aligned_prob: float) -> int | None:
        """The target stem whose window all stems of an example share; None if they share none."""
        if rng.random() >= aligned_prob:
            return None
        return self.target_numbers[rng.integers(len(self.target_numbers))]

    def _draw(
        self,
        i: int,
        stem_number: int,
        leader: int | None,
        augmentation: Augmentation,
        out: np.ndarray,
    ) -> None:
        """One stem of example `i`, scaled, into the zeros of `out` [c, t], if it is not silent."""
        rng = self._generator(i, stem_number)
        gain = rng.uniform(*self.gain)
        if rng.random() < self.silent_prob:
            return
        guide = stem_number if leader is None else leader  # whose draws and windows decide
        changes = self._generator(i, guide, 1)
        if leader is not None:
            rng = self._generator(i, guide, _PLACE)
        rows = self.windows[self.stems[guide]]
        for layer in range(1, _MAX_LAYERS + 1):
            change = augmentation.draw(changes, self.tracks[0].sample_rate)
            self._add_window(rng, rows, change, stem_number, np.float32(gain), out)
            if leader is not None or changes.random() >= augmentation.same_stem_prob:
                return
            rng = self._generator(i, stem_number, 1 + layer)
            gain = rng.uniform(*self.gain)

    def _generator(self, i: int, stem_number: int, purpose: int = 0) -> np.random.Generator:
        # A generator per example and stem: a redraw of one stem changes no other. What is drawn
        # for augmentation has others, and the plain recipe's stream stays the same.
        counter = [0, purpose, stem_number, i]
        return np.random.Generator(np.random.Philox(key=self.seed, counter=counter))

    def _add_window(
        self,
        rng: np.random.Generator,
        rows: np.ndarray,
        change: Change,
        stem_number: int,
        gain: np.float32,
        out: np.ndarray,
    ) -> None:
        """Add one of the windows `rows` of a stem to `out` [c, t]; where it fails, another one."""
        stem = self.stems[stem_number]
        for _ in range(_MAX_REDRAWS):
            track_number, start = rows[rng.integers(len(rows))]
            track = self.tracks[track_number]
            place = change.place(int(start), self.segment_frames, track.frames)
            try:
                audio = track.read(stem, *place)
            except CorruptAudioError as error:
                self.failures.failure(error, self.broken[track_number, stem_number])
                continue
            self.failures.succeeded()
            audio = change.apply(audio, self.segment_frames, track.sample_rate)
            audio *= gain
            out += audio
            return
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


class AlignedSegments(Dataset[Example | None]):
    """Validation examples: segments as they lie in their songs, the same ones every time.

    An example has the form of one of `RandomMixes`; its mixture is the sum of the song's stems. A
    segment that can no longer be read is None, with a warning, and marked in `unreadable`.

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
        self.unreadable = torch.zeros(len(windows), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Example | None:
        track_number, start = self.windows[i]
        track = self.tracks[track_number]
        try:
            read = [track.read(stem, int(start), self.segment_frames) for stem in self.stems]
        except CorruptAudioError as error:
            if not self.unreadable[i]:
                self.unreadable[i] = 1
                logger.warning("validation goes on without a segment: %s", error)
            return None
        self.unreadable[i] = 0
        stems = torch.from_numpy(np.stack(read))  # s c t
        return {"mixture": _mix(stems), "target": stems[self.target_numbers]}


def collate_readable(examples: Sequence[Example | None]) -> Example | None:
    """A batch of the examples that could be read, None where none could."""
    readable = [example for example in examples if example is not None]
    return default_collate(readable) if readable else None


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
