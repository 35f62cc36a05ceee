"""Experiments that end in a table, a JSON file and a picture.

    python -m evaluation.experiments lengths --checkpoint best.pt --data MUSDB18HQ -o OUT
    python -m evaluation.experiments baselines --checkpoint best.pt --data MUSDB18HQ -o OUT
    python -m evaluation.experiments sparsity RUN [RUN ...] -o OUT
    python -m evaluation.experiments bands RUN [RUN ...] -o OUT

A RUN is the --output of evaluation.evaluate; lengths and baselines make theirs in OUT/runs, and go
on where they ended. lengths cuts as the authors do unless --protocol ours is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.estimates import Source, open_folder_source
from evaluation.experiments import bands, baselines, lengths, sparsity
from evaluation.figures import save_figure
from evaluation.options import (
    BASELINES,
    add_data_options,
    add_model_options,
    describe_data,
    open_baseline,
    open_checkpoint,
    open_tracks,
    refuse_stems,
)
from evaluation.records import plain, write_json
from evaluation.result import Evaluation, evaluate, read_evaluation
from evaluation.runner import Runner
from models.errors import InputError, run_command
from training.data.sources import Track

RUNS = "runs"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.experiments",
        description="Experiments that end in a table, a JSON file and a picture.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("lengths", help="scores by input length")
    command.add_argument("--checkpoint", required=True, type=Path, help="weights of a BSMamba2")
    command.add_argument(
        "--lengths", type=_seconds, default=lengths.SECONDS, metavar="S,S", help="1,2,4,8,16"
    )
    add_data_options(command)
    add_model_options(command)
    command.set_defaults(protocol="paper", run=run_lengths)
    command = commands.add_parser("baselines", help="against mixture, ideal masks and others")
    command.add_argument("--checkpoint", type=Path, help="weights of a BSMamba2")
    command.add_argument("--estimates", type=Path, nargs="+", default=[], metavar="DIR")
    command.add_argument(
        "--baseline", nargs="*", choices=BASELINES, default=baselines.DEFAULT, metavar="NAME"
    )
    add_data_options(command)
    add_model_options(command)
    command.set_defaults(run=run_baselines)
    for name, function, text in (
        ("sparsity", run_sparsity, "scores by the share of time in which the stem is active"),
        ("bands", run_bands, "SDR by frequency"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
        command.set_defaults(run=function)
    for command in commands.choices.values():
        command.add_argument("--stem", default="vocals", help="default: vocals")
        command.add_argument("-o", "--output", required=True, type=Path, metavar="OUT")
    return parser.parse_args(argv)


def run_lengths(arguments: argparse.Namespace) -> None:
    refuse_stems(arguments)
    tracks: list[Track] = []
    evaluations = {}
    for seconds in arguments.lengths:
        source, info = open_checkpoint(arguments, chunk_seconds=seconds)
        tracks = tracks or open_tracks(arguments, source.sample_rate)
        require_stem(source, arguments.stem)
        folder = arguments.output / RUNS / f"{seconds:g}s"
        runner = Runner(arguments.scorer, jobs=arguments.jobs)
        evaluations[seconds] = evaluate(tracks, source, info, runner, folder)
    result = lengths.by_length(evaluations, arguments.stem)
    finish(arguments, result, lengths.table, lengths.figure)


def run_baselines(arguments: argparse.Namespace) -> None:
    stems = arguments.stems or (arguments.stem,)
    info = describe_data(arguments)
    sources: list[tuple[Source, dict[str, Any]]] = []
    rate = None
    if arguments.checkpoint:
        model, model_info = open_checkpoint(arguments)
        sources.append((model, model_info))
        rate = model.sample_rate
    tracks = open_tracks(arguments, rate)
    for folder in arguments.estimates:
        sources.append((open_folder_source(folder, arguments.subset, tracks, stems), info))
    for name in arguments.baseline:
        sources.append((open_baseline(name, stems, arguments.device), info))
    # "model/", the label of a folder of that name, lies where "model" does.
    labels = [source.label.rstrip("/") for source, _ in sources]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"{twice[0]}: two estimates of this name; rename a folder of --estimates")
    if not sources:
        raise InputError("nothing to compare: give --checkpoint, --estimates or --baseline")
    evaluations: list[Evaluation] = []
    for source, _ in sources:
        require_stem(source, arguments.stem)
    for source, described in sources:
        runner = Runner(arguments.scorer, jobs=arguments.jobs)
        folder = arguments.output / RUNS / source.label
        evaluations.append(evaluate(tracks, source, described, runner, folder))
    result = baselines.compare(evaluations, arguments.stem)
    finish(arguments, result, baselines.table, baselines.figure)


def run_sparsity(arguments: argparse.Namespace) -> None:
    runs = [read_evaluation(folder) for folder in arguments.runs]
    result = sparsity.by_sparsity(runs, arguments.stem)
    finish(arguments, result, sparsity.table, sparsity.figure)


def run_bands(arguments: argparse.Namespace) -> None:
    runs = [read_evaluation(folder) for folder in arguments.runs]
    finish(arguments, bands.by_frequency(runs, arguments.stem), bands.table, bands.figure)


def require_stem(source: Source, stem: str) -> None:
    """Raise InputError, before any work, if a source does not estimate a stem."""
    if stem not in source.stems:
        raise InputError(f"--stem {stem}: {source.label} has {', '.join(source.stems)}")


def finish(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], list[str]],
    figure: Callable[[dict[str, Any]], Any],
) -> None:
    """Print the table, write OUT/<experiment>.json and .png."""
    print("\n".join(table(result)))
    path = arguments.output / f"{result['experiment']}.json"
    write_json(path, plain(result))
    save_figure(figure(result), path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    arguments.run(arguments)
    return 0


def _seconds(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds above 0, as in 1,2,4,8,16")
    return values


if __name__ == "__main__":
    run_command(main)
