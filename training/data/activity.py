"""Source activity detection: where in a track a stem is worth training on.

The recipe of BSMamba2 (arXiv 2508.14556; EuiYeonKim/BSMamba2@42eb8c8): windows of one segment,
half a segment apart; a window counts when, in both channels, more than half of its ten chunks are
louder than a threshold that follows the window's own level and never falls below -60 dBFS.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from training.data.activity_cache import Activity, load_activity, save_activity
from training.data.audio_files import AudioFile
from training.data.cache import cache_folders, locked, write_first
from training.data.parallel import in_threads
from training.data.track import CorruptAudioError, Track

logger = logging.getLogger(__name__)

_SILENT_RMS = 1e-5
_CHUNKS = 10  # of a window, whose RMS is measured
_QUANTILE = 0.15  # of a window's chunk RMS values: its threshold,
_FLOOR_RMS = 1e-3  # which is at least this
_ACTIVE_SHARE = 0.5  # of the chunks must exceed it
_PIECE_FRAMES = 2**20  # of a file that is read piece by piece

# A stem to search: its track, its name and its file.
Job = tuple[Track, str, AudioFile]
# Where its windows go: the number of the track in the list, and the stem.
Place = tuple[int, str]


def active_windows(audio: np.ndarray, window: int, hop: int) -> list[int]:
    """First samples of the windows in which a stem is active in every channel.

    Args:
        audio: [c, t].
        window: length of a window in samples; a shorter tail of the track is dropped, and up to
            nine samples at the end of a window are left out where ten chunks do not divide it.
        hop: samples between the starts of neighbouring windows.
    """
    return _decide(_block_energy(audio, _block(window, hop)), window, hop)


def _decide(energy: np.ndarray, window: int, hop: int) -> list[int]:
    """`active_windows` from the energies of its blocks, [c, block]."""
    rms = _chunk_rms(energy, window, hop)  # c window chunk
    threshold = np.maximum(np.quantile(rms, _QUANTILE, axis=-1, keepdims=True), _FLOOR_RMS)
    loud_chunks = (rms > threshold).sum(axis=-1)  # c window
    active = (loud_chunks > _ACTIVE_SHARE * _CHUNKS).all(axis=0)
    return [int(number) * hop for number in np.flatnonzero(active)]


def _block(window: int, hop: int) -> int:
    """Samples of a block. Overlapping windows share blocks, so squares are summed once."""
    if window < _CHUNKS or hop < 1:
        raise ValueError(f"window {window} and hop {hop} leave no {_CHUNKS} chunks")
    return math.gcd(window // _CHUNKS, hop)


def _block_energy(audio: np.ndarray, block: int) -> np.ndarray:
    """[c, t] -> sum of squares of every whole block, float64 [c, block]."""
    count = audio.shape[-1] // block
    blocks = audio[:, : count * block].reshape(audio.shape[0], count, block)
    return np.einsum("cnb,cnb->cn", blocks, blocks, dtype=np.float64)


def _chunk_rms(energy: np.ndarray, window: int, hop: int) -> np.ndarray:
    """RMS of every chunk of every window, [c, window, chunk], silence counted as 1e-5."""
    chunk, block = window // _CHUNKS, _block(window, hop)
    windows = max(0, (energy.shape[-1] * block - window) // hop + 1)
    if windows == 0:
        return np.empty((energy.shape[0], 0, _CHUNKS))
    starts = hop * np.arange(windows)[:, None] + chunk * np.arange(_CHUNKS)  # window chunk
    first = starts // block
    totals = np.cumsum(np.pad(energy, ((0, 0), (1, 0))), axis=-1)
    chunk_energy = np.maximum(totals[:, first + chunk // block] - totals[:, first], 0)
    rms = np.sqrt(chunk_energy / chunk)
    return np.where(rms == 0, _SILENT_RMS, rms)


@dataclass(frozen=True)
class ActivityIndex:
    """The active windows of a list of tracks.

    Attributes:
        segment_frames: length of every window in samples.
        windows: stem -> int64 [window, 2], each row a track's number and the first sample.
        broken: path -> reason, of the files that could not be read and have no windows.
    """

    segment_frames: int
    windows: dict[str, np.ndarray]
    broken: dict[str, str] = field(default_factory=dict)

    def part(self, first: int, stop: int) -> ActivityIndex:
        """The index of the tracks from number `first` to below `stop`, as a list of their own.

        `broken` stays that of all.
        """
        windows = {}
        for stem, rows in self.windows.items():
            inside = rows[(first <= rows[:, 0]) & (rows[:, 0] < stop)]
            windows[stem] = inside - np.array([first, 0])
        return ActivityIndex(self.segment_frames, windows, self.broken)


def build_activity_index(
    tracks: Sequence[Track],
    stems: Sequence[str],
    segment_frames: int,
    cache_dir: Path | None = None,
) -> ActivityIndex:
    """Find the active windows of every stem, or take from the cache those that are still true.

    The windows are half a segment apart. The cache lies beside the data (see `cache_folders`) and
    holds the size and time of every file: only files that are new or changed are read, several at
    once. Of several processes that ask for the index of a data root at the same time, one builds
    it and the others wait for it. A file that cannot be read is reported once by name and gets no
    windows; it is tried again the next time.

    Args:
        tracks: of one data root or of several.
        stems: those to find the windows of.
        segment_frames: length of a window in samples.
        cache_dir: as for `cache_folders`.
    """
    found: dict[Place, Activity] = {}
    for root in dict.fromkeys(track.root for track in tracks):
        numbers = [number for number, track in enumerate(tracks) if track.root == root]
        jobs = {
            (number, stem): (tracks[number], stem, file)
            for number in numbers
            for stem in stems
            if (file := tracks[number].file(stem)) is not None
        }
        found |= _find(root, jobs, segment_frames, cache_dir)
    broken = {}
    for (number, stem), activity in found.items():
        file = tracks[number].file(stem)
        if activity.reason and file is not None:
            broken[file.path] = file.path + activity.reason
    for reason in broken.values():
        logger.warning("file skipped: %s", reason)
    windows = {stem: _rows(found, stem) for stem in stems}
    return ActivityIndex(segment_frames, windows, broken)


def _find(
    root: Path, jobs: dict[Place, Job], segment_frames: int, cache_dir: Path | None
) -> dict[Place, Activity]:
    """The activity of the stems of one data root, from its cache where that is true."""
    folders = cache_folders(root, cache_dir)
    name = f"activity_{segment_frames}.npz"
    # Names relative to the root, so that a data set can move.
    prefix = os.path.join(root, "")  # noqa: PTH118 (texts: there are many)
    keys = {
        (number, stem): f"{file.path.removeprefix(prefix)}#{stem}"
        for (number, stem), (_, _, file) in jobs.items()
    }
    with locked(folders):
        known: dict[str, Activity] = {}
        for folder in reversed(folders):
            known |= load_activity(folder / name, segment_frames)
        new = {
            keys[place]: job
            for place, job in jobs.items()
            if keys[place] not in known or known[keys[place]].stamp != _stamp(job)
        }
        if new:
            try:
                work = partial(_search, segment_frames=segment_frames)
                for key, activity in in_threads(work, new, name="activity", unit="stem"):
                    known[key] = activity
            finally:  # an interrupted search goes on where it was
                _forget_deleted(root, known, keep=set(keys.values()))
                sound = {key: activity for key, activity in known.items() if not activity.reason}
                write_first(folders, name, lambda path: save_activity(path, segment_frames, sound))
    return {place: known[key] for place, key in keys.items()}


def _search(job: Job, segment_frames: int) -> Activity:
    track, stem, _ = job
    hop = max(1, segment_frames // 2)
    block = _block(segment_frames, hop)
    # Whole blocks at a time: a song of an hour would fill the memory.
    piece = max(1, _PIECE_FRAMES // block) * block if track.is_seekable else track.frames
    try:
        energy = [
            _block_energy(track.read(stem, start, min(piece, track.frames - start)), block)
            for start in range(0, track.frames, piece)
        ]
    except CorruptAudioError as error:
        return Activity(
            _stamp(job), np.empty(0, np.int64), str(error).removeprefix(str(error.path))
        )
    starts = _decide(np.concatenate(energy, axis=-1), segment_frames, hop)
    return Activity(_stamp(job), np.array(starts, np.int64))


def _stamp(job: Job) -> tuple[int, int]:
    return job[2].size, job[2].modified


def _rows(found: dict[Place, Activity], stem: str) -> np.ndarray:
    """The windows of a stem in all tracks, int64 [window, 2]."""
    starts = {number: activity.starts for (number, name), activity in found.items() if name == stem}
    counts = [len(of_track) for of_track in starts.values()]
    rows = np.empty((sum(counts), 2), np.int64)
    rows[:, 0] = np.repeat(np.array(list(starts), np.int64), counts)
    rows[:, 1] = np.concatenate([*starts.values(), np.empty(0, np.int64)])
    return rows


def _forget_deleted(root: Path, known: dict[str, Activity], keep: set[str]) -> None:
    for key in known.keys() - keep:
        if not (root / key.rpartition("#")[0]).exists():
            del known[key]
