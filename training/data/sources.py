"""A data set on disk -> its tracks: MUSDB18-HQ folders or MUSDB18 `.stem.mp4` files.

The split is MUSDB18's: `root/train` less the 14 usual validation tracks, those 14, and `root/test`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from models.errors import InputError
from training.data.folders import open_folder
from training.data.stem_files import SUFFIX, open_stem_file
from training.data.track import MIXTURE, STEMS, CorruptAudioError, Track

__all__ = [
    "MIXTURE",
    "MUSDB_VALIDATION_TRACKS",
    "STEMS",
    "SUBSETS",
    "CorruptAudioError",
    "Track",
    "open_dataset",
]

SUBSETS = ("train", "valid", "test")
# musdb 0.4 (configs/mus.yaml, validation_tracks). Listed here because importing musdb needs ffmpeg.
MUSDB_VALIDATION_TRACKS = (
    "Actions - One Minute Smile",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Johnny Lokke - Promises & Lies",
    "Patrick Talbot - A Reason To Leave",
    "Triviul - Angelsaint",
    "Alexander Ross - Goodbye Bolero",
    "Fergessen - Nos Palpitants",
    "Leaf - Summerghost",
    "Skelpolu - Human Mistakes",
    "Young Griffo - Pennies",
    "ANiMAL - Rockshow",
    "James May - On The Line",
    "Meaxic - Take A Step",
    "Traffic Experiment - Sirens",
)
_VALID_SHARE = 0.1
_MAX_LISTED = 20

logger = logging.getLogger(__name__)


def open_dataset(
    root: Path,
    subset: str,
    *,
    sample_rate: int = 44_100,
    stems: tuple[str, ...] = STEMS,
    skip_broken: bool = False,
) -> list[Track]:
    """The tracks of a subset, sorted by name, opened by their headers alone.

    Args:
        root: the folder that holds `train` and `test`, and maybe `valid`.
        subset: "train", "valid" or "test". Without a folder `valid`, the validation tracks are
            those of `train` that MUSDB18 names, else the last tenth (at least one) by name.
            `train` never includes them.
        sample_rate: what every file must have, in Hz.
        stems: what every track folder must have. `mixture.wav` may be missing in `train` and
            `valid`: the mixture is then the sum of the stems.
        skip_broken: log broken tracks by name and go on with the others.

    Raises:
        InputError: no such folder, no tracks, or broken tracks, all of them in one message.
    """
    if subset not in SUBSETS:
        raise InputError(f"unknown subset '{subset}': choose one of {', '.join(SUBSETS)}")
    tracks: list[Track] = []
    broken: list[str] = []
    for path in _select(root, subset):
        try:
            if path.is_dir():
                tracks.append(open_folder(path, sample_rate, stems, subset == "test"))
            else:
                tracks.append(open_stem_file(path, sample_rate))
        except InputError as error:
            broken.append(str(error))
    if broken and not skip_broken:
        raise InputError(_report(root, broken))
    for message in broken:
        logger.warning("track skipped: %s", message)
    if not tracks:
        raise InputError(f"data root {root}: every track of '{subset}' is broken: {broken[0]}")
    return tracks


def _select(root: Path, subset: str) -> list[Path]:
    """Paths of the tracks of a subset, sorted by name."""
    if not root.is_dir():
        reason = "is a file" if root.exists() else "does not exist"
        raise InputError(f"data root {root} {reason}: name the folder that holds train/ and test/")
    if subset == "test" or (root / "valid").is_dir():
        return _list_tracks(root, subset)
    everything = _list_tracks(root, "train")
    valid = [path for path in everything if _track_name(path) in MUSDB_VALIDATION_TRACKS]
    if not valid:
        valid = everything[-max(1, round(_VALID_SHARE * len(everything))) :]
    selected = valid if subset == "valid" else [path for path in everything if path not in valid]
    if not selected:
        raise InputError(
            f"{root / 'train'} has no track left to train on beside the {len(valid)} for"
            " validation: add tracks, or a folder 'valid' beside it"
        )
    return selected


def _list_tracks(root: Path, folder_name: str) -> list[Path]:
    folder = root / folder_name
    if not folder.is_dir():
        raise InputError(f"data root {root} has no folder '{folder_name}': expected MUSDB18 layout")
    tracks = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or path.name.endswith(SUFFIX))
    ]
    if not tracks:
        raise InputError(
            f"{folder} holds no tracks: expected {folder_name}/<track>/{STEMS[0]}.wav or"
            f" {folder_name}/<track>{SUFFIX}"
        )
    return sorted(tracks, key=_track_name)


def _track_name(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def _report(root: Path, broken: list[str]) -> str:
    if len(broken) == 1:
        return broken[0]
    listed = "; ".join(broken[:_MAX_LISTED])
    more = f"; and {len(broken) - _MAX_LISTED} more" if len(broken) > _MAX_LISTED else ""
    return f"data root {root} has {len(broken)} broken tracks: {listed}{more}"
