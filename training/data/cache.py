"""Where what is derived from a data root is kept: headers, activity indices, prepared copies.

Beside the data in `ROOT/.bsmamba2`, so that it moves with them and every run and user shares it;
else in a folder of the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from models.files import write_text
from training.data.audio_files import AudioFile, read_header

logger = logging.getLogger(__name__)

FOLDER = ".bsmamba2"
_HEADERS = "headers.json"
_FORMAT = 1
_COLUMNS = 6  # of a row: the fields of AudioFile after its path


def cache_folders(root: Path, cache_dir: Path | None = None) -> list[Path]:
    """The folders to look in and, in this order, to try to write in.

    Args:
        root: the data root.
        cache_dir: a folder to use instead of `root/.bsmamba2`; each root gets one of its own in it.
    """
    root = root.resolve()
    label = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    if cache_dir is not None:
        return [cache_dir / label]
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [root / FOLDER, Path(user) / "bsmamba2" / label]


def write_first(folders: Sequence[Path], name: str, write: Callable[[Path], None]) -> Path | None:
    """Write `name` in the first folder that takes it; None, with a warning, where none does."""
    reasons = []
    for folder in folders:
        try:
            write(folder / name)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
        else:
            return folder / name
    logger.warning("%s is not kept for the next time (%s)", name, "; ".join(reasons))
    return None


@contextlib.contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of a data root: of several processes one works and the others wait.

    The lock goes with the process that holds it. Where no folder can be written to, or its file
    system knows no locks, each process works for itself; files are replaced whole, never shared.
    """
    for folder in folders:
        lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock)
        except (OSError, NotImplementedError):
            continue
        try:
            yield
        finally:
            lock.release()
        return
    yield


def _acquire(lock: FileLock) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process to prepare the data (%s)", lock.lock_file)
        lock.acquire()


class HeaderCache:
    """Headers of the audio files of a data root; a file whose size or time changed is read anew.

    Opening 40,000 headers takes seconds on a local disk and minutes on a network's.

    Args:
        root: file names are kept relative to it, so that the data set can move.
        folders: where the cache lies, as `cache_folders` gives them; none keeps nothing.
    """

    def __init__(self, root: Path, folders: Sequence[Path] = ()) -> None:
        self._prefix = os.path.join(root, "")  # noqa: PTH118
        self.folders = folders
        self._known: dict[str, list] = {}
        self._is_new = False
        for folder in reversed(folders):
            self._known.update(_load(folder / _HEADERS))

    def open(self, entry: os.DirEntry[str]) -> AudioFile:
        """The header of a file in a listed folder; raises InputError as `read_header` does."""
        status = entry.stat()
        key = entry.path.removeprefix(self._prefix)
        stamp = [status.st_size, status.st_mtime_ns]
        row = self._known.get(key)
        if row is not None and row[:2] == stamp and len(row) == _COLUMNS:
            return AudioFile(entry.path, *row)
        file = read_header(entry.path, *stamp)
        self._known[key] = [
            *stamp, file.frames, file.sample_rate, file.channels, file.subtype
        ]  # fmt: skip
        self._is_new = True
        return file

    def save(self) -> None:
        """Keep the headers that were read."""
        if self._is_new and self.folders:
            text = json.dumps({"format": _FORMAT, "files": self._known}, separators=(",", ":"))
            write_first(self.folders, _HEADERS, lambda path: write_text(path, text))
            self._is_new = False


def _load(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}
        return dict(content["files"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): reading the headers anew", path, error)
        return {}
