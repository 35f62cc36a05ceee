"""Source activity detection: where in a track a stem is worth training on.

The recipe of BSMamba2 (arXiv 2508.14556; EuiYeonKim/BSMamba2@42eb8c8): windows of one segment,
half a segment apart; a window counts when, in both channels, more than half of its ten chunks are
louder than a threshold that follows the window's own level and never falls below -60 dBFS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from models.errors import InputError
from models.files import write_text
from training.data.track import CorruptAudioError, Track

logger = logging.getLogger(__name__)

_FORMAT = 1
_SILENT_RMS = 1e-5


def active_windows(
    audio: np.ndarray,
    window: int,
    hop: int,
    chunks: int = 10,
    quantile: float = 0.15,
    floor: float = 1e-3,
    active_share: float = 0.5,
) -> list[int]:
    """First samples of the windows in which a stem is active in every channel.

    Args:
        audio: [c, t].
        window: length of a window in samples; a shorter tail of the track is dropped.
        hop: samples between the starts of neighbouring windows.
        chunks: equal parts of a window whose RMS is measured; up to `chunks - 1` samples at the end
            of a window are left out where they do not divide it.
        quantile: the threshold is this quantile of the window's chunk RMS values,
        floor: but at least this RMS.
        active_share: more than this share of the chunks must exceed the threshold.
    """
    rms = _chunk_rms(audio, window, hop, chunks)  # c window chunk
    threshold = np.maximum(np.quantile(rms, quantile, axis=-1, keepdims=True), floor)
    loud_chunks = (rms > threshold).sum(axis=-1)  # c window
    active = (loud_chunks > active_share * chunks).all(axis=0)
    return [int(number) * hop for number in np.flatnonzero(active)]


def _chunk_rms(audio: np.ndarray, window: int, hop: int, chunks: int) -> np.ndarray:
    """RMS of every chunk of every window, [c, window, chunk], silence counted as 1e-5."""
    chunk = window // chunks
    if chunk < 1 or hop < 1:
        raise ValueError(f"window {window} and hop {hop} leave no {chunks} chunks")
    windows = max(0, (audio.shape[-1] - window) // hop + 1)
    # Overlapping windows share blocks: sum the squares once, over the largest common block.
    block = math.gcd(chunk, hop)
    usable = audio.shape[-1] // block
    blocks = audio[:, : usable * block].reshape(audio.shape[0], usable, block)
    energy = np.einsum("cnb,cnb->cn", blocks, blocks, dtype=np.float64)
    if windows == 0:
        return np.empty((audio.shape[0], 0, chunks))
    starts = hop * np.arange(windows)[:, None] + chunk * np.arange(chunks)  # window chunk
    chunk_energy = sliding_window_view(energy, chunk // block, axis=-1)[:, starts // block].sum(-1)
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


def build_activity_index(
    tracks: Sequence[Track],
    stems: Sequence[str],
    segment_frames: int,
    cache_path: Path | None = None,
) -> ActivityIndex:
    """Find the active windows of every stem, or take them from `cache_path` when still true.

    The windows are half a segment apart. A file that cannot be read is reported once by name and
    gets no windows. The cache is JSON with a fingerprint of the tracks (names, sizes, times): where
    it does not match, or is no longer readable, the index is built and written anew.
    """
    fingerprint = _fingerprint(tracks, stems, segment_frames)
    index = _load(cache_path, fingerprint) if cache_path else None
    if index is None:
        index = _scan(tracks, stems, segment_frames)
        if cache_path:
            _save(cache_path, fingerprint, index)
    for reason in index.broken.values():
        logger.warning("file skipped: %s", reason)
    return index


def _scan(tracks: Sequence[Track], stems: Sequence[str], segment_frames: int) -> ActivityIndex:
    rows: dict[str, list[tuple[int, int]]] = {stem: [] for stem in stems}
    broken: dict[str, str] = {}
    hop = max(1, segment_frames // 2)
    for number, track in enumerate(tqdm(tracks, desc="activity", unit="track", disable=None)):
        for stem in stems:
            try:
                starts = active_windows(track.read(stem), segment_frames, hop)
            except CorruptAudioError as error:
                broken[str(error.path)] = str(error)
                continue
            rows[stem].extend((number, start) for start in starts)
    windows = {stem: np.array(found, np.int64).reshape(-1, 2) for stem, found in rows.items()}
    return ActivityIndex(segment_frames, windows, broken)


def _fingerprint(tracks: Sequence[Track], stems: Sequence[str], segment_frames: int) -> str:
    """A digest of everything the index depends on, without reading any audio."""
    listing: list[object] = [_FORMAT, list(stems), segment_frames]
    for track in tracks:
        listing.append([track.name, track.frames, track.sample_rate])
        for path in track.files:
            try:
                status = path.stat()
            except FileNotFoundError as error:
                raise InputError(f"{path} has disappeared: restore it") from error
            listing.append([path.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _save(path: Path, fingerprint: str, index: ActivityIndex) -> None:
    content = {
        "fingerprint": fingerprint,
        "segment_frames": index.segment_frames,
        "windows": {stem: rows.tolist() for stem, rows in index.windows.items()},
        "broken": index.broken,
    }
    write_text(path, json.dumps(content))


def _load(path: Path, fingerprint: str) -> ActivityIndex | None:
    """The index in a cache file, None when it is absent, of other data, or damaged."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint:
            logger.info("data changed since %s was written: building the index anew", path)
            return None
        windows = {
            stem: np.array(rows, np.int64).reshape(-1, 2)
            for stem, rows in content["windows"].items()
        }
        return ActivityIndex(content["segment_frames"], windows, content["broken"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("activity index %s is damaged (%s): building it anew", path, error)
        return None
