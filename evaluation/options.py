"""Command-line options that the evaluation commands share, and what they open."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.estimates import (
    ComputedSource,
    Source,
    model_source,
    open_folder_source,
    protocol_of,
)
from evaluation.hdemucs import separate_with_hdemucs
from evaluation.metrics import import_museval
from evaluation.oracles import MASKS, separate_with_oracle
from evaluation.scoring import SCORERS
from models.errors import InputError
from separation.separator import DEVICES, DTYPES, PROTOCOLS, Separator, pick_device
from training.data.sources import STEMS, SUBSETS, Track, open_dataset

BASELINES = (*MASKS, "hdemucs")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Which tracks, and how to score them."""
    parser.add_argument("--data", required=True, type=Path, help="root of a MUSDB18 layout")
    parser.add_argument("--subset", default="test", choices=SUBSETS)
    parser.add_argument("--tracks", type=int, metavar="N", help="only the first N tracks")
    parser.add_argument(
        "--stems", type=_stems, default=(), metavar="A,B", help="of --estimates and --baseline"
    )
    parser.add_argument(
        "--scorer",
        default="closed-form",
        choices=tuple(SCORERS),
        help="museval: SDR next to other stems, ISR, SIR and SAR too; a minute a track",
    )
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="processes that score; 0 chooses"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint separates."""
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA")
    parser.add_argument(
        "--protocol",
        default="ours",
        choices=PROTOCOLS,
        help="ours: chunks overlap and cross-fade; paper: 8 s chunks, no overlap, no fade",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="chunks at once")


def open_tracks(arguments: argparse.Namespace) -> list[Track]:
    """The tracks that the options ask for. Raises InputError for a bad option or data set."""
    if arguments.tracks is not None and arguments.tracks < 1:
        raise InputError(f"--tracks {arguments.tracks}: must be at least 1")
    if arguments.jobs < 0:
        raise InputError(f"--jobs {arguments.jobs}: must be at least 0")
    if arguments.scorer == "museval":
        import_museval()  # fails now rather than after the first track is separated
    return open_dataset(arguments.data, arguments.subset)[: arguments.tracks]


def open_checkpoint(
    arguments: argparse.Namespace, **options: Any
) -> tuple[ComputedSource, dict[str, Any]]:
    """The checkpoint as a source, and what a report says of it."""
    separator = Separator.from_checkpoint(
        arguments.checkpoint,
        arguments.device,
        batch_size=arguments.batch_size,
        protocol=arguments.protocol,
        dtype=arguments.dtype,
        **options,
    )
    info = {
        "checkpoint": str(arguments.checkpoint),
        "config": asdict(separator.model.config),
        "protocol": protocol_of(separator),
    }
    return model_source(separator, arguments.checkpoint), info | describe_data(arguments)


def describe_data(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"data": str(arguments.data), "subset": arguments.subset}


def open_baseline(name: str, stems: tuple[str, ...], device: str) -> ComputedSource:
    """A baseline by name. Raises InputError if hdemucs cannot be had here."""
    stems = stems or ("vocals",)
    if name in MASKS:
        separate = separate_with_oracle(name, stems)
        return ComputedSource(name, stems, {"baseline": name}, separate)
    separate, rate = separate_with_hdemucs(stems, pick_device(device))
    return ComputedSource(name, stems, {"baseline": name}, separate, rate)


def open_source(
    arguments: argparse.Namespace, tracks: list[Track]
) -> tuple[Source, dict[str, Any]]:
    """What --checkpoint, --estimates or --baseline names, and what a report says of it."""
    if arguments.checkpoint:
        if arguments.stems:
            raise InputError("--stems: a checkpoint has its own; leave the option out")
        return open_checkpoint(arguments)
    source: Source
    if arguments.estimates:
        source = open_folder_source(arguments.estimates, arguments.subset, tracks, arguments.stems)
    else:
        source = open_baseline(arguments.baseline, arguments.stems, arguments.device)
    return source, describe_data(arguments)


def _stems(text: str) -> tuple[str, ...]:
    stems = tuple(text.split(","))
    unknown = [stem for stem in stems if stem not in STEMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stem {unknown[0]!r}: choose from {', '.join(STEMS)}")
    return stems
