"""Copies of tracks that are too slow or unfit to train from, made once and kept in the cache.

A `.stem.mp4` decodes from its beginning at every read, and a track at another rate would have to be
resampled at every read. `python -m training.data.prepare` makes the copies, and `open_dataset`
takes them in the place of the originals for as long as these have not changed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr

from models.errors import InputError
from models.files import PARTS, whole_folder, write_text
from training.data.audio_files import ARRAY_SUFFIX
from training.data.folders import list_audio
from training.data.splits import track_name
from training.data.track import MIXTURE, Expected, Track

logger = logging.getLogger(__name__)

FORMATS = ("wav", "flac", "npy")
_FOLDER = "prepared"
_SOURCE = "source.json"


def copies_folder(cache: Path) -> Path:
    """Where the copies of a data root lie in one of its cache folders."""
    return cache / _FOLDER


def copy_path(cache: Path, root: Path, path: Path) -> Path:
    """Where the copy of the track at `path` belongs."""
    return copies_folder(cache) / path.parent.relative_to(root) / track_name(path)


def find_copy(
    caches: Sequence[Path],
    root: Path,
    path: Path,
    expected: Expected,
    form: str | None = None,
) -> Path | None:
    """The folder of a copy that is true to the track at `path`; None where there is none.

    Args:
        caches: the cache folders of the data root.
        root: the data root.
        path: of the track in it.
        expected: its rate, and the stems that were looked for when the copy was made.
        form: "wav", "flac" or "npy", None for any.
    """
    for cache in caches:
        folder = copy_path(cache, root, path)
        try:
            source = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
            is_true = source["files"] == _stamps(path)
            fits = (
                source["sample_rate"] == expected.sample_rate
                and set(expected.stems) <= set(source["stems"])
                and form in (None, source["format"])
            )
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s) and not used", folder, error)
            continue
        if not is_true:
            logger.warning(
                "%s has changed since it was copied, and its copy is not used:"
                " python -m training.data.prepare makes a new one",
                path,
            )
        elif fits:
            return folder
    return None


def write_copy(track: Track, path: Path, folder: Path, sample_rate: int, form: str) -> int:
    """Decode, resample and write a track as 16-bit stereo, the whole of it or nothing.

    Args:
        track: opened at its own rate.
        path: where it lies.
        folder: of the copy; what lies there is replaced.
        sample_rate: of the copy, in Hz.
        form: "wav", "flac", or "npy" for arrays [t, c] that training maps into memory.

    Returns:
        The number of samples beyond full scale, which 16 bits had to clip.

    Raises:
        CorruptAudioError: the track cannot be read.
        InputError: the copy cannot be written.
    """
    clipped = 0
    stamps = _stamps(path)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as temporary:
            for stem in (*track.stems, MIXTURE):
                if track.file(stem) is not None:
                    audio, over = _to_int16(track.read(stem), track.sample_rate, sample_rate)
                    _write(temporary / stem, audio, sample_rate, form)
                    clipped += over
            source = {
                "files": stamps,
                "sample_rate": sample_rate,
                "format": form,
                "stems": track.stems,
            }
            write_text(temporary / _SOURCE, json.dumps(source))
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputError(f"{folder} cannot be written ({error}): free some space") from error
    return clipped


def remove_leavings(cache: Path) -> None:
    """Delete what a copy left behind that was killed while it was made."""
    for left in copies_folder(cache).glob(f"**/{PARTS}"):
        shutil.rmtree(left, ignore_errors=True)


def _to_int16(audio: np.ndarray, rate: int, new_rate: int) -> tuple[np.ndarray, int]:
    """float32 [c, t] -> int16 [t, c] at another rate, and how many samples were clipped."""
    samples = audio.T  # t c
    if rate != new_rate:
        samples = soxr.resample(samples, rate, new_rate, quality="VHQ")
    scaled = np.rint(samples * 2.0**15)
    clipped = int(np.count_nonzero((scaled < -(2**15) - 1) | (scaled > 2**15)))
    return np.clip(scaled, -(2**15), 2**15 - 1).astype(np.int16), clipped


def _write(path: Path, samples: np.ndarray, rate: int, form: str) -> None:
    # A song's name may hold dots: no with_suffix here.
    if form == ARRAY_SUFFIX[1:]:
        np.save(f"{path}{ARRAY_SUFFIX}", samples)
    else:
        soundfile.write(f"{path}.{form}", samples, rate, "PCM_16")


def _stamps(path: Path) -> dict[str, list[int]]:
    """Name -> size and time of every file that a track is made of."""
    files = [path] if path.is_file() else [Path(e.path) for e in list_audio(path).values()]
    states = {file.name: file.stat() for file in files}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in sorted(states.items())}
