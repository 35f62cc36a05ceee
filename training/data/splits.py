"""Which tracks of a data root train, validate and test.

Two layouts: `root/{train,valid,test}/<track>`, and the tracks in `root` itself. MUSDB18 keeps its
usual 14 validation tracks; other sets validate on a folder `valid`, a list or a fraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.errors import InputError
from models.files import is_hidden
from training.data.folders import list_audio, list_folder
from training.data.stem_files import SUFFIX
from training.data.track import STEMS

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


@dataclass(frozen=True)
class Split:
    """How a root without a folder `valid` is split.

    Attributes:
        valid_tracks: names of the validation tracks; where none is given, those that MUSDB18
            names, and where there are none of these,
        valid_fraction: this share of the tracks, the last ones by name and at least one; 0 takes
            none.
    """

    valid_tracks: tuple[str, ...] = ()
    valid_fraction: float = 0.1


def select(root: Path, subset: str, split: Split) -> list[Path]:
    """Paths of the tracks of a subset, sorted by name; `train` never includes those of `valid`.

    Raises:
        InputError: `root` is no data root, or no such subset or no track is in it.
    """
    if subset not in SUBSETS:
        raise InputError(f"unknown subset '{subset}': choose one of {', '.join(SUBSETS)}")
    _check_root(root)
    is_split = any((root / name).is_dir() for name in SUBSETS)
    if is_split and (subset == "test" or (root / "valid").is_dir()):
        return _list_subset(root, subset)
    everything = _list_subset(root, "train") if is_split else _list_flat(root)
    if subset == "test":
        raise InputError(
            f"data root {root} has no folder 'test': its tracks lie in the root itself and train"
        )
    valid = _choose_valid(everything, split)
    if subset == "valid":
        return [path for path in everything if path in valid]
    return [path for path in everything if path not in valid]


def list_everything(root: Path) -> dict[str, list[Path]]:
    """Subset -> the paths of its tracks, for the folders a root has; "train" where it has none.

    Raises:
        InputError: `root` is no data root.
    """
    _check_root(root)
    subsets = [subset for subset in SUBSETS if (root / subset).is_dir()]
    if not subsets:
        return {"train": _list_flat(root)}
    return {subset: _list_subset(root, subset) for subset in subsets}


def track_name(path: Path) -> str:
    """Name of the track in a folder or a `.stem.mp4`."""
    return path.name.removesuffix(SUFFIX)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        reason = "is a file" if root.exists() else "does not exist"
        raise InputError(f"data root {root} {reason}: name the folder that holds train/ and test/")


def _choose_valid(everything: list[Path], split: Split) -> set[Path]:
    names = set(split.valid_tracks) or set(MUSDB_VALIDATION_TRACKS)
    valid = {path for path in everything if track_name(path) in names}
    if valid or split.valid_tracks or split.valid_fraction == 0:
        return valid
    return set(everything[-max(1, round(split.valid_fraction * len(everything))) :])


def _list_subset(root: Path, subset: str) -> list[Path]:
    folder = root / subset
    if not folder.is_dir():
        raise InputError(f"data root {root} has no folder '{subset}': expected MUSDB18 layout")
    tracks = _list_tracks(folder)
    if not tracks:
        raise InputError(
            f"{folder} holds no tracks: expected {subset}/<track>/{STEMS[0]}.wav (or .flac) or"
            f" {subset}/<track>{SUFFIX}"
        )
    return tracks


def _list_flat(root: Path) -> list[Path]:
    # Beside the tracks lie other folders here; one without audio is none of them.
    tracks = [path for path in _list_tracks(root) if path.name.endswith(SUFFIX) or list_audio(path)]
    if not tracks:
        raise InputError(
            f"data root {root} has no folder 'train' (MUSDB18 layout) and no <track>/<stem>.wav"
            " or .flac in it: name the folder that holds the tracks"
        )
    return tracks


def _list_tracks(folder: Path) -> list[Path]:
    """Folders and `.stem.mp4` files, without hidden ones; a folder hides the file of its name."""
    tracks: dict[str, Path] = {}
    for entry in list_folder(folder):
        if is_hidden(entry.name):
            continue
        path = Path(entry.path)
        if entry.is_dir():
            tracks[path.name] = path
        elif entry.name.endswith(SUFFIX):
            tracks.setdefault(track_name(path), path)
    return [tracks[name] for name in sorted(tracks)]
