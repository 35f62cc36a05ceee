"""Separate songs into stems.

    python -m separation.separate song.mp3 music/ --checkpoint runs/x/checkpoints/best.pt -o stems/

writes stems/song/vocals.wav and stems/song/instrumental.wav (the mixture minus vocals), and the
same for every song in music/, mirroring its folders, at each song's own rate, length and
channels, as float wav: the two sum to the song. Songs of any length pass in the memory of a few
chunks. "-" is standard input or output:

    curl -s $URL | python -m separation.separate - -c best.pt -o - --stems vocals | ffplay -

Many GPUs, restartable: torchrun --nproc-per-node 8 -m separation.separate ... --skip-existing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from models.device import DEVICE_HELP
from models.errors import InputError, one_line_warnings, run_command
from separation.batch import Batch
from separation.plan import (
    DEFAULT_NAME,
    STANDARD_INPUT,
    Job,
    Problem,
    check_template,
    find_songs,
    plan_jobs,
    require_writable,
)
from separation.separator import DTYPES, Separator, separate
from separation.sharding import Shard
from separation.streaming import choose_stems
from separation.writer import FORMATS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m separation.separate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("songs", nargs="+", metavar="FILE|DIR", help='audio files, folders of them, or "-"')
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("-c", "--checkpoint", type=Path, help="weights of a BSMamba2")
    weights.add_argument("--model", metavar="NAME", help="known weights: models/registry.json")
    add("-o", "--output", default="separated", metavar="DIR", help="(default: separated)")
    add("--stems", metavar="A,B", help="only these, as vocals,instrumental (default: all)")
    add("--format", default="float", choices=FORMATS, help="(default: float, a 32-bit wav)")
    add("--name", default=DEFAULT_NAME, metavar="TEMPLATE",
        help="of {track} {stem} {ext} {suffix} (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help=DEVICE_HELP)
    add("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA")
    add("--overlap", type=float, default=0.25, help="share of a chunk that the next repeats")
    add("--chunk-seconds", type=float, default=8.0, help="length of a chunk (default: 8)")
    add("--batch-size", type=batch_size, default="auto", metavar="N",
        help="chunks at once; halves when memory runs out (default: auto)")  # fmt: skip
    add("--downmix", action="store_true", help="take songs of more than two channels, mixed down")
    add("--skip-existing", action="store_true", help="leave out songs whose stems are all there")
    add("--dry-run", action="store_true", help="print what would be written, and stop")
    return parser.parse_args(argv)


def batch_size(text: str) -> int | str:
    """`auto` or a number; argparse turns a ValueError into its usage message."""
    return text if text == "auto" else int(text)


def load_separator(arguments: argparse.Namespace, shard: Shard) -> Separator:
    checkpoint = arguments.checkpoint
    if arguments.model is not None:
        from models.registry import fetch

        checkpoint = fetch(arguments.model)
    return Separator.from_checkpoint(
        checkpoint,
        shard.device(arguments.device),
        chunk_seconds=arguments.chunk_seconds,
        overlap=arguments.overlap,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
    )


def plan(
    arguments: argparse.Namespace, separator: Separator, stems: tuple[str, ...]
) -> tuple[list[Job], list[Problem]]:
    """The jobs of all processes, and one line for every song that cannot be one."""
    songs, problems = find_songs(arguments.songs, Path(arguments.output))
    if arguments.output == STANDARD_INPUT:
        if len(songs) != 1 or problems:
            raise InputError("standard output takes one song; give --output a folder")
        if len(stems) != 1:
            raise InputError(f"standard output takes one stem: --stems {stems[0]}")
        return [Job(songs[0], ())], []
    extension = FORMATS[arguments.format].extension
    jobs, collisions = plan_jobs(songs, stems, Path(arguments.output), arguments.name, extension)
    return jobs, problems + collisions


def print_plan(jobs: list[Job], problems: list[Problem], skips: bool) -> int:
    """--dry-run: every file that would be written; returns the exit code."""
    for job in jobs:
        print(f"{job.song.source}:" + (" exists, skipped" if skips and job.is_done else ""))
        for path in job.paths:
            print(f"  {path}")
    for problem in problems:
        print(f"error: {problem.text}", file=sys.stderr)
    return 2 if problems else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_line_warnings():
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    shard = Shard.from_environment()
    check_template(arguments.name, FORMATS[arguments.format].extension)
    to_standard_output = arguments.output == STANDARD_INPUT
    if not to_standard_output and not arguments.dry_run:
        require_writable(Path(arguments.output))
    separator = load_separator(arguments, shard)
    wanted = arguments.stems.split(",") if arguments.stems is not None else None
    stems = choose_stems(separator, wanted)
    jobs, problems = plan(arguments, separator, stems)
    if arguments.dry_run:
        return print_plan(shard.take(jobs), problems * shard.is_first, arguments.skip_existing)
    shard.join()
    batch = Batch(separator, stems, FORMATS[arguments.format], arguments.downmix, shard)
    return batch.run(shard.take(jobs), problems, arguments.skip_existing)


class _CallableModule(ModuleType):
    """Importing this module makes `separation.separate` it, in place of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return separate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    run_command(main)
