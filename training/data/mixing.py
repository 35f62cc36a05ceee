"""Training and validation examples: random mixes of unrelated stems, and aligned segments.

The recipe of BSMamba2 (EuiYeonKim/BSMamba2@42eb8c8): every stem of a training example comes from
a song of its own, is silenced now and then, and is scaled by a gain of its own. What `augment.py`
adds to it is off by default.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

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
_WHOLE = 8  # the purpose of random numbers of an example rather than a stem


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
        self.pieces = 1  # of a window, of which an example has one
        self.stems = tuple(index.windows)
        self.target_numbers = [self.stems.index(stem) for stem in target_stems]
        self.seed = seed
        self.silent_prob = silent_prob
        self.gain = gain
        self.augmentation = augmentation or Augmentation()
        self.failures = ReadFailures(max_failed_share)
        # Shared with the workers, so that a broken file is reported by one of them only.
        self.broken = torch.zeros(len(tracks), len(self.stems), dtype=torch.uint8).share_memory_()

    def in_pieces(self, pieces: int) -> RandomMixes:
        """The stream in `pieces` times as many examples, each of one piece of its windows.

        It counts failed reads together with this one, and begins to augment at the same time.
        """
        short = copy.copy(self)
        short.pieces = pieces
        short.segment_frames = self.segment_frames // pieces
        after = self.augmentation.augment_after * pieces
        short.augmentation = replace(self.augmentation, augment_after=after)
        return short

    def __getitem__(self, i: int) -> Example:
        rng = self._generator(i, 0, _WHOLE)
        augmentation = self.augmentation if self.augmentation.applies(i, rng.random()) else _NONE
        if rng.random() < augmentation.aligned_prob:
            stems = self._song(i, rng, augmentation)
        else:
            stems = self._silence()
            for number, stem in enumerate(stems):
                self._draw(i, number, augmentation, stem)
        scaled = torch.from_numpy(stems)  # s c t
        return {"mixture": _mix(scaled), "target": scaled[self.target_numbers]}

    def _silence(self) -> np.ndarray:
        return np.zeros((len(self.stems), AUDIO_CHANNELS, self.segment_frames), np.float32)

    def _generator(self, i: int, stem_number: int, purpose: int = 0) -> np.random.Generator:
        # A generator per example and stem: a redraw of one stem changes no other. What is drawn
        # for augmentation has others, and the plain recipe's stream stays the same.
        counter = [0, purpose, stem_number, i]
        # A stream of their own for pieces, or whole windows would repeat what these drew.
        key = self.seed + ((self.pieces - 1) << 64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _draw_gain(self, rng: np.random.Generator) -> np.float32:
        """The gain of a stem, 0 where it is to be silent."""
        gain = rng.uniform(*self.gain)
        return np.float32(gain if rng.random() >= self.silent_prob else 0)

    def _draw(self, i: int, number: int, augmentation: Augmentation, out: np.ndarray) -> None:
        """A stem of example `i`, of any songs, into the zeros of `out` [c, t]."""
        rng, changes = self._generator(i, number), self._generator(i, number, 1)
        gain = self._draw_gain(rng)
        if not gain:
            return
        for layer in range(1, _MAX_LAYERS + 1):
            change = augmentation.draw(changes, self.tracks[0].sample_rate)
            self._add_window(rng, number, change, gain, out)
            if changes.random() >= augmentation.same_stem_prob:
                return
            rng = self._generator(i, number, 1 + layer)
            gain = np.float32(rng.uniform(*self.gain))

    def _add_window(
        self,
        rng: np.random.Generator,
        number: int,
        change: Change,
        gain: np.float32,
        out: np.ndarray,
    ) -> None:
        """Add a random active window of a stem to `out` [c, t]; where it fails, another one."""
        for _ in range(_MAX_REDRAWS):
            audio = self._read(self._window(self.stems[number], rng), number, change)
            if audio is not None:
                audio *= gain
                out += audio
                return
        raise InputError(
            f"{_MAX_REDRAWS} reads of '{self.stems[number]}' failed in a row: check the data root"
        )

    def _song(self, i: int, rng: np.random.Generator, augmentation: Augmentation) -> np.ndarray:
        """All stems of one place of one song, with the gains that they have in `_draw`."""
        gains = [self._draw_gain(self._generator(i, number)) for number in range(len(self.stems))]
        target = self.stems[rng.choice(self.target_numbers)]
        change = augmentation.draw(rng, self.tracks[0].sample_rate)
        for _ in range(_MAX_REDRAWS):
            stems = self._read_all(self._window(target, rng), change, gains)
            if stems is not None:
                return stems
        raise InputError(f"{_MAX_REDRAWS} songs in a row could not be read: check the data root")

    def _window(self, stem: str, rng: np.random.Generator) -> tuple[int, int]:
        """Track number and first sample of a random active window, or of a piece of it."""
        rows = self.windows[stem]
        track_number, start = rows[rng.integers(len(rows))].tolist()
        piece = int(rng.integers(self.pieces))  # of one: draws nothing
        return track_number, start + piece * self.segment_frames

    def _read_all(
        self, window: tuple[int, int], change: Change, gains: Sequence[np.float32]
    ) -> np.ndarray | None:
        """All stems at one window [s, c, t], those with a gain; None where one of them fails."""
        stems = self._silence()
        for number, gain in enumerate(gains):
            audio = self._read(window, number, change) if gain else 0
            if audio is None:
                return None
            stems[number] = gain * audio
        return stems

    def _read(self, window: tuple[int, int], number: int, change: Change) -> np.ndarray | None:
        """The window of a stem, changed, [c, t]; None where it fails, which is noted."""
        track_number, start = window
        track = self.tracks[track_number]
        place = change.place(start, self.segment_frames, track.frames)
        try:
            audio = track.read(self.stems[number], *place)
        except CorruptAudioError as error:
            self.failures.failure(error, self.broken[track_number, number])
            return None
        self.failures.succeeded()
        return change.apply(audio, self.segment_frames, track.sample_rate)


class ShortFirst(Dataset[list[Example]]):
    """Random mixes of which the first are several short ones each, of as much music in all.

    An example is a list of those of `RandomMixes`, for `collate_pieces` to join: `pieces` of them
    before example `until`, one from there on.

    Args:
        mixes: the examples of full length.
        until: number of the first of them.
        pieces: how many short mixes stand in for one before.
    """

    def __init__(self, mixes: RandomMixes, until: int, pieces: int) -> None:
        self.mixes, self.short = mixes, mixes.in_pieces(pieces)
        self.until, self.pieces = until, pieces

    def __getitem__(self, i: int) -> list[Example]:
        if i >= self.until:
            return [self.mixes[i]]
        first = i * self.pieces
        return [self.short[k] for k in range(first, first + self.pieces)]


def collate_pieces(examples: Sequence[list[Example]]) -> Example:
    """A batch of what `ShortFirst` gives; next to short mixes the long ones are cut."""
    mixes = [mix for example in examples for mix in example]
    frames = min(mix["mixture"].shape[-1] for mix in mixes)
    return default_collate([piece for mix in mixes for piece in _cut(mix, frames)])


def _cut(mix: Example, frames: int) -> list[Example]:
    """The whole pieces of an example, without copies."""
    length = mix["mixture"].shape[-1]
    return [
        {key: wave[..., start : start + frames] for key, wave in mix.items()}
        for start in range(0, length - frames + 1, frames)
    ]


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
