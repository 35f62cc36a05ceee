"""The activity index on disk: one `.npz` a data root and segment length.

A row for every stem of every track: its name relative to the root, size and time of its file, and
the first samples of its active windows. A data set of 10,000 tracks has millions of windows, which
arrays load in no time.
"""

from __future__ import annotations

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.files import whole_file

logger = logging.getLogger(__name__)

# Goes up when the recipe of activity.py or the layout of the file changes.
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Activity:
    """What is known of one stem.

    Attributes:
        stamp: size in bytes and time in ns of its file when it was read.
        starts: first samples of its active windows, int64.
        reason: why the file could not be read, empty where it could; kept in no cache.
    """

    stamp: tuple[int, int]
    starts: np.ndarray
    reason: str = ""


def save_activity(path: Path, segment_frames: int, known: dict[str, Activity]) -> None:
    """Write the file in one step."""
    about = {
        "format": _FORMAT,
        "segment_frames": segment_frames,
        "keys": list(known),
    }
    starts = [activity.starts for activity in known.values()]
    with whole_file(path) as temporary:
        np.savez(
            temporary,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            stamps=np.array([a.stamp for a in known.values()], np.int64).reshape(-1, 2),
            counts=np.array([len(rows) for rows in starts], np.int64),
            starts=np.concatenate([*starts, np.empty(0, np.int64)]),
        )


def load_activity(path: Path, segment_frames: int) -> dict[str, Activity]:
    """Key -> activity; empty, with a warning, where the file is damaged (zip checks its sums)."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            stamps, counts, starts = (arrays[name] for name in ("stamps", "counts", "starts"))
        if (about["format"], about["segment_frames"]) != (_FORMAT, segment_frames):
            logger.info("%s is of another version: building the activity index anew", path)
            return {}
        keys = about["keys"]
        if len(keys) != len(stamps) or counts.sum() != len(starts):
            raise ValueError("its parts do not fit each other")
        ends = np.cumsum(counts)
        return {
            key: Activity((size, modified), starts[end - count : end])
            for key, (size, modified), count, end in zip(
                keys, stamps.tolist(), counts.tolist(), ends.tolist(), strict=True
            )
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("activity index %s is damaged (%s): building it anew", path, error)
        return {}
