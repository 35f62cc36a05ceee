"""Unpack the one real multitrack excerpt that the `stempeg` package ships, in MUSDB18-HQ layout.

    python -m training.data.excerpt OUT

Six seconds of a song with vocals, drums, bass and other: OUT/test/<track>/<stem>.wav. Needs ffmpeg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile

from models.errors import InputError, run_command
from models.files import whole_folder
from training.data.stem_files import SUFFIX, open_stem_file, require_ffmpeg
from training.data.track import MIXTURE, Expected


def write_excerpt(out: Path, sample_rate: int = 44_100) -> Path:
    """Decode the excerpt to 16-bit wav; an excerpt that is there already is left alone.

    Returns:
        The track's folder, `out/test/<track>`.

    Raises:
        InputError: ffmpeg is missing, or `out` is a file.
    """
    require_ffmpeg()
    import stempeg

    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder")
    source = Path(str(stempeg.example_stem_path()))
    folder = out / "test" / source.name.removesuffix(SUFFIX)
    if folder.is_dir():
        return folder
    track = open_stem_file(source.parent, source, Expected(sample_rate))
    with whole_folder(folder) as temporary:
        for stem in (*track.stems, MIXTURE):
            path = temporary / f"{stem}.wav"
            soundfile.write(str(path), track.read(stem).T, sample_rate, "PCM_16")
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.excerpt",
        description="Unpack the real excerpt of the stempeg package in MUSDB18-HQ layout.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write test/<track>/ in")
    args = parser.parse_args(argv)
    print(write_excerpt(args.out))  # noqa: T201
    return 0


if __name__ == "__main__":
    run_command(main)
