"""A data set on disk -> its tracks: folders of stems, or MUSDB18 `.stem.mp4` files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from models.errors import InputError
from training.data.cache import HeaderCache, cache_folders
from training.data.folders import open_folder
from training.data.prepared import copies_folder, find_copy
from training.data.splits import MUSDB_VALIDATION_TRACKS, SUBSETS, Split, select, track_name
from training.data.stem_files import open_stem_file
from training.data.track import (
    MIXTURE,
    STEMS,
    CorruptAudioError,
    Expected,
    MissingStems,
    Track,
)

__all__ = [
    "MIXTURE",
    "MUSDB_VALIDATION_TRACKS",
    "STEMS",
    "SUBSETS",
    "CorruptAudioError",
    "Split",
    "Track",
    "open_dataset",
    "open_track",
    "open_tracks",
]

_MAX_LISTED = 20

logger = logging.getLogger(__name__)


def open_dataset(
    roots: Path | Sequence[Path],
    subset: str,
    *,
    sample_rate: int | None = 44_100,
    stems: tuple[str, ...] = STEMS,
    missing_stems: MissingStems = "error",
    split: Split | None = None,
    cache_dir: Path | None = None,
    skip_broken: bool = False,
    headers: dict[Path, HeaderCache] | None = None,
    use_copies: bool = True,
) -> list[Track]:
    """The tracks of a subset, root after root and sorted by name, opened by their headers alone.

    Args:
        roots: one folder or several. A root holds `train` and `test`, and maybe `valid`, with a
            folder or a `.stem.mp4` a track; or its tracks themselves, which then train.
        subset: "train", "valid" or "test".
        sample_rate: what every file must have, in Hz; None takes every track at its own rate.
        stems: what every track folder must have. A file `mixture` may be missing in `train` and
            `valid`: the mixture is then the sum of the stems.
        missing_stems: "silence" lets a track lack some of the stems.
        split: how to choose validation tracks where there is no folder `valid`.
        cache_dir: where headers and prepared copies are kept; None for beside the data.
        skip_broken: log broken tracks by name and go on with the others.
        headers: those known by root, to share between calls and to save; filled where empty.
        use_copies: take prepared 16-bit copies in the place of the originals; scoring must not.

    Raises:
        InputError: no such folder, no tracks, or broken tracks, all of them in one message.
    """
    roots = [roots] if isinstance(roots, Path) else list(roots)
    split = split or Split()
    headers = {} if headers is None else headers
    selected = {root: select(root, subset, split) for root in roots}
    if subset == "valid":
        _check_names(split, selected)
    expected = Expected(sample_rate, stems, missing_stems)
    tracks: list[Track] = []
    broken: list[str] = []
    for root, paths in selected.items():
        if root not in headers:
            headers[root] = HeaderCache(root, cache_folders(root, cache_dir))
        opened, reasons = open_tracks(
            root, paths, expected, headers[root], subset == "test", use_copies
        )
        tracks += opened
        broken += reasons
    _check_opened(" and ".join(map(str, roots)), subset, tracks, broken, skip_broken)
    return tracks


def open_tracks(
    root: Path,
    paths: Sequence[Path],
    expected: Expected,
    headers: HeaderCache,
    need_mixture: bool = False,
    use_copies: bool = True,
) -> tuple[list[Track], list[str]]:
    """Open the tracks at `paths`, or with `use_copies` their copies where these are true.

    Returns:
        The sound tracks, and what is wrong with the others.
    """
    with_copies = [cache for cache in headers.folders if copies_folder(cache).is_dir()]
    tracks: list[Track] = []
    broken: list[str] = []
    for path in paths:
        try:
            copy = None
            if use_copies and with_copies and expected.sample_rate is not None:
                copy = find_copy(with_copies, root, path, expected)
            tracks.append(open_track(root, copy or path, expected, headers, need_mixture))
        except InputError as error:
            broken.append(str(error))
    return tracks, broken


def open_track(
    root: Path, path: Path, expected: Expected, headers: HeaderCache, need_mixture: bool = False
) -> Track:
    """Open a track folder or a `.stem.mp4`; raises InputError, naming the file and the remedy."""
    if path.is_dir():
        return open_folder(root, path, expected, headers, need_mixture)
    return open_stem_file(root, path, expected)


def _check_names(split: Split, selected: dict[Path, list[Path]]) -> None:
    known = {track_name(path) for paths in selected.values() for path in paths}
    unknown = sorted(set(split.valid_tracks) - known)
    if unknown:
        raise InputError(
            f"data.valid_tracks: no track '{unknown[0]}' in {' or '.join(map(str, selected))}"
        )


def _check_opened(
    where: str, subset: str, tracks: list[Track], broken: list[str], skip_broken: bool
) -> None:
    """Raise or warn of broken tracks, and raise where no track is left."""
    if broken and not skip_broken:
        raise InputError(_report(where, broken))
    for message in broken:
        logger.warning("track skipped: %s", message)
    if not tracks and broken:
        raise InputError(f"data root {where}: every track of '{subset}' is broken: {broken[0]}")
    if not tracks:
        raise InputError(
            f"data root {where} has no track left for '{subset}': add tracks, a folder 'valid'"
            " beside 'train', or change data.valid_tracks or data.valid_fraction"
        )


def _report(where: str, broken: list[str]) -> str:
    if len(broken) == 1:
        return broken[0]
    listed = "; ".join(broken[:_MAX_LISTED])
    more = f"; and {len(broken) - _MAX_LISTED} more" if len(broken) > _MAX_LISTED else ""
    return f"data root {where} has {len(broken)} broken tracks: {listed}{more}"
