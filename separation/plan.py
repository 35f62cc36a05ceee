"""Which songs are separated, and into which files: decided before any work."""

from __future__ import annotations

import os
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from models.files import is_hidden, try_writing
from separation.reader import STANDARD_INPUT

DEFAULT_NAME = "{track}/{stem}.{ext}"
TEMPLATE_FIELDS = ("track", "stem", "ext", "suffix")
# What is taken from a folder; a file that is named itself may have any suffix.
AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        ("wav", "wave", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "aifc", "au", "caf"),
        ("w64", "rf64", "m4a", "mp4", "aac", "wma", "ac3", "mka", "webm", "wv", "ape"),
    )
    for name in names
)


@dataclass(frozen=True)
class Song:
    """A file, or "-" for standard input, and the folder under which its stems are mirrored."""

    source: str
    folder: Path = Path()

    @property
    def is_standard_input(self) -> bool:
        return self.source == STANDARD_INPUT

    @property
    def track(self) -> str:
        return "stdin" if self.is_standard_input else Path(self.source).stem

    @property
    def suffix(self) -> str:
        return "" if self.is_standard_input else Path(self.source).suffix.removeprefix(".")


@dataclass(frozen=True)
class Job:
    """A song and the file of each of its stems, in their order."""

    song: Song
    paths: tuple[Path, ...]

    @property
    def is_done(self) -> bool:
        return bool(self.paths) and all(path.is_file() for path in self.paths)


@dataclass(frozen=True)
class Problem:
    """Why inputs cannot be separated: one line for people."""

    sources: tuple[str, ...]
    text: str


def find_songs(inputs: Sequence[str], output: Path) -> tuple[list[Song], list[Problem]]:
    """Files as they are given, folders recursively in alphabetical order -> (songs, problems).

    Hidden files, other suffixes than AUDIO_SUFFIXES and what lies in `output` are left out of
    folders. Problems: a folder without songs or that cannot be read, a file that is not there.

    Raises InputError if `output` is one of the folders.
    """
    songs: list[Song] = []
    problems: list[Problem] = []
    for given in inputs:
        path = Path(given)
        if given == STANDARD_INPUT or path.is_file():
            songs.append(Song(given))
        elif path.is_dir():
            found, unreadable = _songs_of(path, output.resolve())
            songs += found
            problems += [Problem((given,), text) for text in unreadable]
            if not found and not unreadable:
                problems.append(Problem((given,), f"{path}: no audio files in this folder"))
        elif path.exists():
            problems.append(Problem((given,), f"{path}: no file; give it to standard input as -"))
        else:
            problems.append(Problem((given,), f"{path}: no such file or folder"))
    return list(dict.fromkeys(songs)), problems


def _songs_of(folder: Path, output: Path) -> tuple[list[Song], list[str]]:
    """The songs of a folder, and what of it cannot be read."""
    if output == folder.resolve():
        raise InputError(
            f"--output {folder}: is a folder of songs, and the stems would be the next time;"
            " choose another"
        )
    songs: list[Song] = []
    failures: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=failures.append):
        here = Path(root)
        folders[:] = sorted(
            name for name in folders if not is_hidden(name) and (here / name).resolve() != output
        )
        for name in sorted(files):
            if not is_hidden(name) and Path(name).suffix.lower() in AUDIO_SUFFIXES:
                songs.append(Song(str(here / name), here.relative_to(folder)))
    return songs, [f"{error.filename}: cannot be read ({error.strerror})" for error in failures]


def check_template(template: str, extension: str) -> None:
    """Raise InputError if a template has fields that are not TEMPLATE_FIELDS, leaves its folder,
    or does not end in the extension of what is written.

    Without {stem} the stems would overwrite each other.
    """
    try:
        fields = [(name, spec, kind) for _, name, spec, kind in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"--name {template!r}: {error}") from error
    used = {name for name, _, _ in fields if name is not None}
    unknown = sorted(used - set(TEMPLATE_FIELDS))
    if unknown or any(spec or kind for _, spec, kind in fields):
        known = ", ".join(f"{{{field}}}" for field in TEMPLATE_FIELDS)
        raise InputError(f"--name {template!r}: takes {known} and nothing else in braces")
    if "stem" not in used:
        raise InputError(f"--name {template!r}: needs {{stem}}, which tells the files apart")
    _require_inside(Path(template), f"--name {template!r}")
    example = template.format(track="track", stem="stem", ext=extension, suffix="suffix")
    if Path(example).suffix.lower() != f".{extension}":
        raise InputError(
            f"--name {template!r}: the files will be {extension}; end it in .{{ext}}, or choose"
            " another --format"
        )


def plan_jobs(
    songs: Sequence[Song], stems: Sequence[str], output: Path, template: str, extension: str
) -> tuple[list[Job], list[Problem]]:
    """The files of every song -> (jobs, problems).

    Songs that would write the same file, or over a song, are problems and no jobs.
    Raises InputError if a stem, named by a checkpoint, is no file name.
    """
    for stem in stems:
        if not stem or Path(stem).name != stem:
            raise InputError(f"stem {stem!r} of the checkpoint: not usable as a file name")
    problems: list[Problem] = []
    jobs: list[Job] = []
    for song in songs:
        names = [
            template.format(track=song.track, stem=stem, ext=extension, suffix=song.suffix)
            for stem in stems
        ]
        try:
            for name in names:
                _require_inside(Path(name), song.source)
        except InputError as error:
            problems.append(Problem((song.source,), str(error)))
            continue
        jobs.append(Job(song, tuple(output / song.folder / name for name in names)))
    kept, collisions = _without_collisions(jobs, songs)
    return kept, problems + collisions


def _without_collisions(jobs: list[Job], songs: Sequence[Song]) -> tuple[list[Job], list[Problem]]:
    problems: list[Problem] = []
    writers: dict[Path, list[Job]] = defaultdict(list)
    for job in jobs:
        for path in job.paths:
            writers[path].append(job)
    sources = {Path(song.source).resolve() for song in songs if not song.is_standard_input}
    refused: set[Job] = set()
    for path, sharing in writers.items():
        if refused.issuperset(sharing):
            continue
        names = tuple(dict.fromkeys(job.song.source for job in sharing))
        if len(sharing) > 1:
            text = (
                f"{' and '.join(names)}: both would write {path}; rename one, "
                "or use --name '{track}.{suffix}/{stem}.{ext}'"
            )
        elif path.resolve() in sources:
            text = f"{names[0]}: would write over the song {path}; choose another --output"
        else:
            continue
        problems.append(Problem(names, text))
        refused.update(sharing)
    return [job for job in jobs if job not in refused], problems


def _require_inside(name: Path, what: str) -> None:
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise InputError(f"{what}: its stems would leave the output folder ({name})")


def require_writable(output: Path) -> None:
    """Raise InputError, before any work, if nothing can be written under the folder."""
    try:
        try_writing(output)
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error
