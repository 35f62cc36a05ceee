"""Scores of a track as JSON: kept while a run goes on, read again by reports and experiments."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.energies import Energies
from evaluation.metrics import import_museval
from evaluation.scoring import (
    MIXTURE_ESTIMATE,
    Detail,
    StemScores,
    TrackScores,
    as_json,
    json_number,
)
from models.errors import InputError
from models.files import is_hidden, try_writing, write_text

logger = logging.getLogger(__name__)

IDENTITY = "identity.json"  # in a folder: what all it holds was made with

_FORMAT = 1
_DIGITS = 9  # of the energies: 1e-8 dB


class TrackStore:
    """A folder with one JSON file per scored track.

    Args:
        folder: made with the first track.
        identity: what the scores depend on; a file of another identity is not used.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity

    def load(self, track: str, key: str) -> TrackScores | None:
        """The scores of a track, None if there are none, or they have another key."""
        path = self.path(track)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != key:
                return None
            return track_from_json(content)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): scoring the track again", path, error)
            return None

    def save(self, scores: TrackScores, key: str) -> None:
        """Keep the scores of a track. Raises InputError if they cannot be written."""
        content = {"key": key, **track_to_json(scores)}
        write_json(self.path(scores.track), content, indent=None)

    def path(self, track: str) -> Path:
        return self.folder / f"{track}.json"

    def key(self, files: Iterable[Path]) -> str:
        """What tells scores of these files, as they are now, from those of any others."""
        listing: list[Any] = [_FORMAT, self.identity]
        for path in files:
            status = path.stat()
            listing.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def read_tracks(folder: Path) -> list[TrackScores]:
    """Every track of a `TrackStore`, sorted by name.

    Raises InputError if there is none, or a file is damaged.
    """
    paths = sorted(path for path in folder.glob("*.json") if not is_hidden(path.name))
    if not paths:
        raise InputError(f"{folder}: holds no scored tracks; name the --output of an evaluation")
    tracks = []
    for path in paths:
        try:
            tracks.append(track_from_json(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it and evaluate again") from error
    return tracks


def track_to_json(scores: TrackScores) -> dict[str, Any]:
    """Plain values; energies with nine digits, NaN and infinity as `json_number` writes them."""
    return {
        "track": scores.track,
        "seconds": scores.seconds,
        "sample_rate": scores.sample_rate,
        "excerpts": scores.excerpts,
        "remainder": _lists(scores.remainder),
        "rows": [
            as_json(row)
            | {
                "energies": _lists(asdict(detail.energies)),
                "reference_bins": _list(detail.reference_bins),
                "error_bins": _list(detail.error_bins),
                "museval": _lists(detail.museval),
            }
            for row, detail in zip(scores.rows, scores.details, strict=True)
        ],
    }


def track_from_json(content: dict[str, Any]) -> TrackScores:
    """The inverse of `track_to_json`. Raises KeyError, TypeError, ValueError for other content."""
    names = [field.name for field in fields(StemScores)]
    rows, details = [], []
    for row in content["rows"]:
        scores = {name: _float(row[name]) for name in names[3:]}
        rows.append(StemScores(row["track"], row["stem"], row["estimate"], **scores))
        details.append(
            Detail(
                Energies(**_arrays(row["energies"])),
                _array(row["reference_bins"]),
                _array(row["error_bins"]),
                _arrays(row["museval"]),
            )
        )
    return TrackScores(
        content["track"],
        content["seconds"],
        content["sample_rate"],
        rows,
        details,
        _arrays(content["remainder"]),
        {stem: (start, count) for stem, (start, count) in content["excerpts"].items()},
    )


def plain(content: Any) -> Any:
    """Nested dicts and lists with NaN and infinity as `json_number` writes them."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return json_number(content)


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write strict JSON atomically. Raises InputError, naming the file, if that fails."""
    try:
        write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def claim_folder(folder: Path, identity: dict[str, Any], option: str) -> None:
    """Mark a folder with what its content is made with, or find the same mark there.

    option: the command-line option that names the folder.
    Raises InputError if the mark is another's or damaged, or cannot be written.
    """
    mark = folder / IDENTITY
    if not mark.is_file():
        write_json(mark, identity)
        return
    try:
        kept = json.loads(mark.read_text(encoding="utf-8"))
        changed = [key for key in kept | identity if kept.get(key) != identity.get(key)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{mark}: damaged ({error}); name another {option}, or delete the folder"
        ) from error
    if changed:
        raise InputError(
            f"{folder}: holds another evaluation's files ({changed[0]} was {kept.get(changed[0])},"
            f" is {identity.get(changed[0])}); name another {option}, or delete the folder"
        )


def require_writable(path: Path) -> None:
    """Raise InputError, before any work, if the file `path` could not be written."""
    try:
        try_writing(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_museval_json(folder: Path, subset: str, scores: TrackScores) -> None:
    """Write `folder/<subset>/<track>.json` as museval does, for its tools and SiSEC's.

    Without museval's own frames, SDR is the closed form's (one source) and the rest is NaN. A
    model of vocals alone gets museval's second target, `accompaniment`, too.
    """
    import_museval()
    from museval import TrackStore as MusevalStore

    store = MusevalStore(win=1.0, hop=1.0, track_name=scores.track)
    targets = {}
    for row, detail in zip(scores.rows, scores.details, strict=True):
        if row.estimate != MIXTURE_ESTIMATE:
            sdr = detail.energies.sdr
            nothing = np.full(len(sdr), np.nan)
            closed_form = {"SDR": sdr, "ISR": nothing, "SIR": nothing, "SAR": nothing}
            targets[row.stem] = detail.museval or closed_form
    if scores.remainder and list(targets) == ["vocals"]:
        targets["accompaniment"] = scores.remainder
    for name, frames in targets.items():
        store.add_target(name, {key: values.tolist() for key, values in frames.items()})
    store.validate()
    try:
        write_text(folder / subset / f"{scores.track}.json", store.json)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def _list(values: np.ndarray) -> list[Any]:
    return [json_number(float(f"{value:.{_DIGITS}g}")) for value in values.tolist()]


def _lists(arrays: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: _list(values) for name, values in arrays.items()}


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _array(values: list[Any]) -> np.ndarray:
    return np.array([_float(value) for value in values])


def _arrays(lists: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    return {name: _array(values) for name, values in lists.items()}
