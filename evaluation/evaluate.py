"""Score estimates on the tracks of a data set, beside the unprocessed mixture.

    python -m evaluation.evaluate --checkpoint runs/x/checkpoints/best.pt --data /path/to/musdb18hq
    python -m evaluation.evaluate --estimates separated/htdemucs --data /path/to/musdb18hq
    python -m evaluation.evaluate --baseline irm --data /path/to/musdb18hq

prints cSDR, uSDR, SI-SDR, leakage, bleedless and fullness per track with their mean, standard
deviation and median over tracks; --scorer museval adds SDR, ISR, SIR and SAR of all stems together.
--json FILE writes the same numbers. --output RUN keeps everything that `evaluation.report` and
`evaluation.experiments` read. With either, an interrupted run goes on where it ended.
--protocol paper cuts tracks as the authors do, into 8 s chunks without overlap.
docs/evaluation.md defines every number.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from evaluation.metrics import import_museval
from evaluation.options import (
    BASELINES,
    add_data_options,
    add_model_options,
    open_evaluation,
)
from evaluation.records import TrackStore, require_writable, write_json, write_museval_json
from evaluation.result import evaluate, identity_of
from evaluation.runner import Runner
from evaluation.scoring import summarise
from evaluation.tables import format_table
from models.errors import InputError, run_command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate",
        description="Score a checkpoint, or stems in folders, on a data set.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="weights of a BSMamba2")
    source.add_argument(
        "--estimates", type=Path, metavar="DIR", help="any separator's DIR/<track>/<stem>.wav"
    )
    source.add_argument(
        "--baseline", choices=BASELINES, help="ideal ratio or complex mask, or Hybrid Demucs"
    )
    add_data_options(parser)
    add_model_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here too")
    parser.add_argument("--output", type=Path, metavar="RUN", help="folder for all results")
    parser.add_argument(
        "--museval-json", type=Path, metavar="DIR", help="museval's own files, one a track"
    )
    parser.add_argument(
        "--save-estimates", type=Path, metavar="DIR", help="keep DIR/<track>/<stem>.wav"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    tracks, source, info = open_evaluation(arguments)
    if arguments.save_estimates and arguments.estimates:
        raise InputError("--save-estimates: the stems of --estimates are files already")
    if arguments.museval_json:
        import_museval()
    if arguments.json:
        require_writable(arguments.json)
    runner = Runner(arguments.scorer, jobs=arguments.jobs, estimates=arguments.save_estimates)
    partial = None
    if arguments.json and not arguments.output:
        # Only until the scores are complete: then the one file holds them.
        partial = arguments.json.with_name(f".{arguments.json.name}.tracks")
        store = TrackStore(partial, identity_of(source, info, arguments.scorer))
        runner = replace(runner, store=store)
    evaluation = evaluate(tracks, source, info, runner, arguments.output)
    if arguments.museval_json:
        for track in evaluation.tracks:
            write_museval_json(arguments.museval_json, arguments.subset, track)
    if arguments.json:
        write_json(arguments.json, evaluation.report)
    if partial:
        shutil.rmtree(partial, ignore_errors=True)
    rows = [row for track in evaluation.tracks for row in track.rows]
    print(format_table(rows, summarise(rows, evaluation.scores)))
    written = (arguments.output, arguments.json, arguments.museval_json, arguments.save_estimates)
    for path in filter(None, written):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
