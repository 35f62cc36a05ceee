"""Train BSMamba2.

One GPU or CPU, the recipe of arXiv 2508.14556:

    python -m training.train --config configs/bsmamba2.yaml data.root=/path/to/musdb18hq

Any key of training/config.py can follow the configuration file, its value written as YAML:

    python -m training.train --config configs/bsmamba2.yaml data.root=/path/to/musdb18hq \
        run.dir=runs/drums model.stem_names=[drums] training.batch_size=2

Go on after an interruption with the same command and `--resume auto`, which starts afresh where
there is no checkpoint yet. Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C stops at
once. Watch with `tensorboard --logdir runs`.
"""

from __future__ import annotations

import argparse
import logging

import torch

from models.errors import InputError, run_command
from models.files import write_text
from training.config import dump_config, load_config
from training.run_folder import RunFolder
from training.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train BSMamba2 on a data set of stems.",
        epilog="Every key of training/config.py can be given as section.key=value.",
    )
    parser.add_argument("--config", required=True, help="YAML file, such as configs/bsmamba2.yaml")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint in run.dir (auto) or from this one",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_config(args.config, args.overrides)
    folder = RunFolder(config.run.dir, config.training.keep_checkpoints)
    checkpoint = folder.resume_from(args.resume)
    try:
        trainer = Trainer(config, folder, checkpoint)
        del checkpoint
        write_text(folder.root / "config.yaml", dump_config(config))
        return trainer.run()
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            "the GPU's memory ran out: lower training.batch_size (and raise training.accumulation"
            " to match) or set model.gradient_checkpointing=true"
        ) from error


if __name__ == "__main__":
    run_command(main)
