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
from models.device import DEVICE_HELP, pick_device
from models.errors import InputError
from separation.separator import DTYPES, PROTOCOLS, Separator
from training.data.sources import MIXTURE, STEMS, SUBSETS, Track, open_dataset

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
        "--data-stems",
        type=_stems,
        default=STEMS,
        metavar="A,B",
        help=f"stems that sum to the data set's mixtures (default: {','.join(STEMS)})",
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
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on CUDA")
    parser.add_argument(
        "--protocol",
        default="ours",
        choices=PROTOCOLS,
        help="ours: chunks overlap and cross-fade; paper: no overlap, no fade (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="chunks at once")


def open_tracks(arguments: argparse.Namespace, sample_rate: int | None = None) -> list[Track]:
    """The tracks that the options ask for, all of one rate.

    sample_rate: what they must have, in Hz; None takes what they have.
    Raises InputError for a bad option or data set.
    """
    if arguments.tracks is not None and arguments.tracks < 1:
        raise InputError(f"--tracks {arguments.tracks}: must be at least 1")
    if arguments.jobs < 0:
        raise InputError(f"--jobs {arguments.jobs}: must be at least 0")
    if arguments.scorer == "museval":
        import_museval()  # fails now rather than after the first track is separated
    unknown = [stem for stem in arguments.stems if stem not in arguments.data_stems]
    if unknown:
        raise InputError(
            f"--stems {unknown[0]}: the data set has {', '.join(arguments.data_stems)}"
            " (--data-stems)"
        )
    tracks = open_dataset(
        arguments.data,
        arguments.subset,
        sample_rate=sample_rate,
        stems=arguments.data_stems,
        use_copies=False,
    )[: arguments.tracks]
    rates = {track.sample_rate: track.name for track in tracks}
    if len(rates) > 1:
        found = ", ".join(f"{name} has {rate} Hz" for rate, name in sorted(rates.items()))
        raise InputError(f"{arguments.data}: tracks of several rates ({found}); resample them")
    return tracks


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
    described = {"data": str(arguments.data), "subset": arguments.subset}
    if arguments.data_stems == STEMS:
        return described
    return {**described, "data_stems": list(arguments.data_stems)}


def open_baseline(name: str, stems: tuple[str, ...], device: str) -> ComputedSource:
    """A baseline by name. Raises InputError if hdemucs cannot be had here."""
    stems = stems or ("vocals",)
    if name in MASKS:
        separate = separate_with_oracle(name, stems)
        return ComputedSource(name, stems, {"baseline": name}, separate)
    separate, rate = separate_with_hdemucs(stems, pick_device(device))
    return ComputedSource(name, stems, {"baseline": name}, separate, rate)


def open_evaluation(
    arguments: argparse.Namespace,
) -> tuple[list[Track], Source, dict[str, Any]]:
    """The tracks; what --checkpoint, --estimates or --baseline names; what a report says of it."""
    source: Source
    if arguments.checkpoint:
        refuse_stems(arguments)
        source, info = open_checkpoint(arguments)
        return open_tracks(arguments, source.sample_rate), source, info
    tracks = open_tracks(arguments)
    if arguments.estimates:
        source = open_folder_source(arguments.estimates, arguments.subset, tracks, arguments.stems)
    else:
        source = open_baseline(arguments.baseline, arguments.stems, arguments.device)
    return tracks, source, describe_data(arguments)


def refuse_stems(arguments: argparse.Namespace) -> None:
    """Raise InputError for --stems where a checkpoint is all that is scored."""
    if arguments.stems:
        raise InputError("--stems: a checkpoint has its own; leave the option out")


def _stems(text: str) -> tuple[str, ...]:
    stems = tuple(text.split(","))
    if not all(stems) or len(set(stems)) < len(stems) or MIXTURE in stems:
        raise argparse.ArgumentTypeError(f"{text!r}: give names of stems, as in vocals,drums")
    return stems
