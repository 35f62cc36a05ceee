"""Get data sets ready ahead of training: copies of what is slow or unfit, and the activity index.

    python -m training.data.prepare ROOT...

Tracks in MUSDB18's `.stem.mp4` and tracks at another sample rate are decoded and resampled once, to
16-bit copies in `ROOT/.bsmamba2/prepared` (or `--cache-dir`), which training then reads in their
place. `--format npy --all` copies every track to arrays that training maps into memory. Run it
again after an interruption or when the data change: only what is missing is made. All broken tracks
are listed, and the others are made ready all the same.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.errors import InputError, log_level, run_command
from training.data.activity import ActivityIndex, build_activity_index
from training.data.cache import HeaderCache, cache_folders, locked
from training.data.parallel import in_threads
from training.data.prepared import FORMATS, copy_path, find_copy, remove_leavings, write_copy
from training.data.sources import open_track, open_tracks
from training.data.splits import list_everything
from training.data.track import STEMS, CorruptAudioError, Expected, Track

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A data root made ready.

    Attributes:
        tracks: the sound ones of every subset.
        copied: how many of them were copied now.
        index: activity of the tracks outside `test`.
        broken: what is wrong with the others, a line each.
    """

    tracks: list[Track]
    copied: int
    index: ActivityIndex
    broken: list[str]


def prepare(
    root: Path,
    expected: Expected,
    segment_frames: int,
    *,
    form: str = "wav",
    copy_all: bool = False,
    cache_dir: Path | None = None,
) -> Prepared:
    """Make the copies a data root needs and build its activity index.

    Args:
        root: the data root; its tracks of all subsets are made ready.
        expected: what training will ask of every track.
        segment_frames: length of a training segment in samples.
        form: of the copies: "wav", "flac" or "npy".
        copy_all: copy every track, not only those that need it.
        cache_dir: as for `cache_folders`.

    Raises:
        InputError: `root` is no data root, or a copy cannot be written.
    """
    subsets = list_everything(root)
    headers = HeaderCache(root, cache_folders(root, cache_dir))
    paths = [path for members in subsets.values() for path in members]
    with locked(headers.folders):
        copied, unreadable = _copy(root, paths, expected, headers, form, copy_all)
    opened = {name: open_tracks(root, paths, expected, headers) for name, paths in subsets.items()}
    headers.save()
    tracks = [track for found, _ in opened.values() for track in found]
    broken = [reason for _, reasons in opened.values() for reason in reasons]
    to_index = [track for name, (found, _) in opened.items() if name != "test" for track in found]
    index = build_activity_index(to_index, expected.stems, segment_frames, cache_dir)
    # A damaged .stem.mp4 opens well: the copy failed, and the index fails on it again.
    damaged = index.broken | unreadable
    sound = [track for track in tracks if not damaged.keys() & set(map(str, track.files))]
    return Prepared(sound, copied, index, [*broken, *damaged.values()])


def _copy(
    root: Path,
    paths: Sequence[Path],
    expected: Expected,
    headers: HeaderCache,
    form: str,
    copy_all: bool,
) -> tuple[int, dict[str, str]]:
    """Copy the tracks that need it and have no true copy.

    Returns:
        How many were copied, and path -> reason of those that could not be read.
    """
    rate = expected.sample_rate
    assert rate is not None  # copies are made for training
    as_they_are = Expected(None, expected.stems, expected.missing_stems)
    jobs: dict[Path, tuple[Path, Track]] = {}
    for path in paths:
        try:
            track = open_track(root, path, as_they_are, headers)
        except InputError:
            continue  # opened again, and then reported
        needed = copy_all or not track.is_seekable or track.sample_rate != rate
        wanted = form if copy_all else None
        if needed and find_copy(headers.folders, root, path, expected, wanted) is None:
            jobs[path] = (path, track)
    if not jobs:
        return 0, {}
    cache = _first_writable(headers.folders)
    remove_leavings(cache)
    work = partial(_copy_one, root=root, cache=cache, sample_rate=rate, form=form)
    unreadable = {}
    for path, (clipped, reason) in in_threads(work, jobs, name="copies", unit="track"):
        if clipped:
            logger.warning("%s: %d samples beyond full scale were clipped", path, clipped)
        if reason:
            unreadable[str(path)] = reason
    return len(jobs) - len(unreadable), unreadable


def _copy_one(
    job: tuple[Path, Track], root: Path, cache: Path, sample_rate: int, form: str
) -> tuple[int, str]:
    """Copy a track; how many samples were clipped, and why it could not be read."""
    path, track = job
    try:
        return write_copy(track, path, copy_path(cache, root, path), sample_rate, form), ""
    except CorruptAudioError as error:
        return 0, str(error)


def _first_writable(folders: Sequence[Path]) -> Path:
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".lock").touch()
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return folder
    raise InputError(f"no place for copies ({'; '.join(reasons)}): give one with --cache-dir")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.prepare",
        description="Decode, resample and index data sets ahead of training.",
    )
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="a data root")
    parser.add_argument(
        "--segment-seconds", type=float, default=8.0, help="as data.segment_seconds (%(default)s)"
    )
    parser.add_argument(
        "--sample-rate", type=int, default=44_100, help="as model.sample_rate (%(default)s)"
    )
    parser.add_argument("--stems", nargs="+", default=STEMS, help="as data.stems (MUSDB18's four)")
    parser.add_argument(
        "--missing-stems",
        choices=("error", "silence"),
        default="error",
        help="as data.missing_stems (%(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, help="as data.cache_dir (beside the data)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="wav",
        help="of the copies: wav, flac (half the space), npy (mapped into memory) (%(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="copy every track, not as needed")
    args = parser.parse_args(argv)
    if not (0 < args.segment_seconds < math.inf and args.sample_rate > 0):
        parser.error("--segment-seconds and --sample-rate must be above 0")
    return args


# What the index cannot read is in the list at the end.
@log_level(logging.ERROR, "training.data.activity")
def main(argv: list[str] | None = None) -> int:
    """The command; returns 2 where a track is broken."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    expected = Expected(args.sample_rate, tuple(args.stems), args.missing_stems)
    frames = round(args.segment_seconds * args.sample_rate)
    broken: list[str] = []
    for root in args.roots:
        done = prepare(
            root,
            expected,
            frames,
            form=args.format,
            copy_all=args.all,
            cache_dir=args.cache_dir,
        )
        broken += done.broken
        print(
            f"{root}: {len(done.tracks)} tracks ready, {done.copied} of them copied now,"
            f" {len(done.broken)} broken"
        )
        for stem, windows in done.index.windows.items():
            print(f"  {stem}: {len(windows)} active windows of {args.segment_seconds:g} s")
    for reason in broken:
        print(f"broken: {reason}", file=sys.stderr)
    return 2 if broken else 0


if __name__ == "__main__":
    run_command(main)
