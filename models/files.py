"""Writing so that an interruption leaves the old file or folder, or none, never a part."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

PARTS = ".*.partial*"  # names of files and folders that are being written
# What a write raises where there is no room for it: on the disk, by quota, by the file's limit.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a person can mend where a file cannot be written.
UNWRITABLE = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_NAMES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# The same of any file.
MENDABLE = (*UNWRITABLE, *_NAMES)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, which takes its place when the block ends well.

    The content reaches the disk before the name does. The suffix is kept, and folders are made.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # what a person knows it by
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, making its folder where needed."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def try_writing(folder: Path) -> None:
    """Make a folder where needed, and a file in it that goes at once.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    Its files reach the disk before it has its name.

    `path` must not exist then, or be an empty folder.
    """
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process with our number that was killed
    temporary.mkdir()
    try:
        yield temporary
        for member in temporary.rglob("*"):
            if member.is_file():
                with member.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's music or of a run's results.

    Names of songs do begin with dots: "...Baby One More Time".
    """
    return fnmatch(name, PARTS) or (name.startswith(".") and not name.startswith(".."))


def remove_left_parts(folder: Path) -> None:
    """Remove temporary files in a folder whose processes were killed; those at work keep theirs."""
    for part in folder.glob(PARTS):
        number = part.name.removeprefix(".").split(".partial")[0].rpartition(".")[2]
        if number.isdecimal() and not _is_alive(int(number)):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


def _temporary(path: Path) -> Path:
    """A free name beside `path`, hidden, in a folder that exists."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
