"""Fetch the free sample of MUSDB18: 7 seconds of each of 144 tracks, as `.stem.mp4` files.

    python -m training.data.musdb_sample OUT

OUT is then a data root with MUSDB18's own split. Seven seconds are less than the 8 s of a segment
in configs/bsmamba2.yaml, so train with shorter segments. Needs ffmpeg.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from models.errors import InputError, run_command
from models.files import whole_folder
from training.data.stem_files import require_ffmpeg


def fetch_musdb_sample(root: Path) -> None:
    """Download the sample into `root` with `musdb.DB(download=True)`, the whole of it or nothing.

    Raises:
        InputError: `root` is not empty, ffmpeg is missing, or the download failed.
    """
    require_ffmpeg()
    import musdb

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} is not an empty folder: name another")
    try:
        with whole_folder(root) as temporary:
            musdb.DB(root=str(temporary), download=True)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the MUSDB18 sample could not be downloaded ({error}): check the connection, or make a"
            " synthetic set with python -m training.data.synthetic"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.musdb_sample",
        description="Fetch the 7-second sample of MUSDB18.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make the data root in")
    args = parser.parse_args(argv)
    fetch_musdb_sample(args.out)
    print(f"MUSDB18 sample in {args.out}")  # noqa: T201
    return 0


if __name__ == "__main__":
    run_command(main)
