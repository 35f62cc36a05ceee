"""Separate songs into stems.

    python -m separation.separate song.wav --checkpoint runs/x/checkpoints/best.pt -o separated/

writes separated/song/vocals.wav and separated/song/instrumental.wav (the mixture minus vocals) at
the rate, length and channels of song.wav, as float wav: stems sum to the song.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from models.errors import InputError, run_command
from separation.audio import load_audio, write_wav
from separation.separator import DEVICES, DTYPES, Separator, separate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m separation.separate", description="Separate songs into stems."
    )
    parser.add_argument("songs", nargs="+", type=Path, metavar="FILE", help="audio files")
    parser.add_argument("--checkpoint", required=True, type=Path, help="weights of a BSMamba2")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("separated"), help="folder (default: separated)"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA")
    parser.add_argument(
        "--overlap", type=float, default=0.25, help="share of a chunk that the next repeats"
    )
    parser.add_argument("--chunk-seconds", type=float, default=8.0, help="length of a chunk")
    parser.add_argument("--batch-size", type=int, default=1, help="chunks at once")
    return parser.parse_args(argv)


def plan_outputs(songs: list[Path], output: Path) -> dict[Path, Path]:
    """Each song's folder. Raises InputError if two would share one."""
    folders: dict[Path, Path] = {}
    for song in songs:
        folder = output / song.stem
        if folder in folders.values():
            other = next(path for path, taken in folders.items() if taken == folder)
            raise InputError(f"{song} and {other}: both would write {folder}; rename one")
        folders[song] = folder
    return folders


def require_file_names(stems: tuple[str, ...]) -> None:
    """Raise InputError if a stem, named by a checkpoint, would be written outside its folder."""
    for stem in stems:
        if not stem or Path(stem).name != stem:
            raise InputError(f"stem {stem!r} of the checkpoint: not usable as a file name")


def require_writable(output: Path) -> None:
    """Raise InputError, before any work, if nothing can be written under the folder."""
    probe = output / f".write-test-{time.time_ns()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from error


def separate_song(separator: Separator, song: Path, folder: Path) -> str:
    """Separate one file, write its stems into `folder`; returns what was done, for people."""
    start = time.perf_counter()
    audio, rate = load_audio(song)
    seconds = audio.shape[-1] / rate
    frames = round(seconds * separator.model.config.sample_rate)
    with tqdm(total=frames, desc=song.name, unit=" samples", unit_scale=True, disable=None) as bar:
        try:
            stems = separator.separate_audio(audio, rate, bar.update)
        except InputError as error:
            raise InputError(f"{song}: {error}") from error
    lines = []
    for name, stem in stems.items():
        write_wav(folder / f"{name}.wav", stem, rate)
        lines.append(f"  {folder / name}.wav")
    spent = time.perf_counter() - start
    head = f"{song}: {seconds:.1f} s in {spent:.1f} s (real-time factor {spent / seconds:.2f})"
    return "\n".join([head, *lines])


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    folders = plan_outputs(arguments.songs, arguments.output)
    require_writable(arguments.output)
    separator = Separator.from_checkpoint(
        arguments.checkpoint,
        arguments.device,
        chunk_seconds=arguments.chunk_seconds,
        overlap=arguments.overlap,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
    )
    require_file_names(separator.stem_names)
    failed = 0
    for song, folder in folders.items():
        try:
            print(separate_song(separator, song, folder))
        except InputError as error:
            if len(folders) == 1:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"{len(folders) - failed} of {len(folders)} songs separated")
    return 2 if failed else 0


class _CallableModule(ModuleType):
    """Importing this module makes `separation.separate` it, in place of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return separate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run_command(main)
