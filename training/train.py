"""Train BSMamba2.

One GPU or CPU, the recipe of arXiv 2508.14556:

    python -m training.train --config configs/bsmamba2.yaml data.root=/path/to/musdb18hq

Any key of training/config.py can follow the configuration file, its value written as YAML:

    python -m training.train --config configs/bsmamba2.yaml data.root=/path/to/musdb18hq \
        run.dir=runs/drums model.stem_names=[drums] training.batch_size=2

Several GPUs, on each of several machines, the same way (docs/training.md):

    torchrun --nproc-per-node=4 -m training.train --config configs/bsmamba2.yaml data.root=...

Go on after an interruption with the same command and `--resume auto`, which starts afresh where
there is no checkpoint yet. Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C stops at
once. Watch with `tensorboard --logdir runs`. Before a long run, `--dry-run` does one step of
everything and tells whether it fits.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from models.dispatch import with_memory_hint
from models.errors import InputError, is_of_dead_worker, is_out_of_memory, run_command
from models.files import UNWRITABLE, write_text
from training.config import Config, dump_config, load_config
from training.distributed import World, joined_world, lost_a_rank
from training.loaders import worker_death
from training.rehearsal import dry_run, profile
from training.run_folder import RunFolder
from training.summary import summary
from training.trainer import Trainer
from training.writer import unwritable

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train BSMamba2 on a data set of stems.",
        epilog="Every key of training/config.py can be given as section.key=value, every one of the"
        " network (models/bsmamba2.py) as model.key=value.",
    )
    parser.add_argument("--config", required=True, help="YAML file, such as configs/bsmamba2.yaml")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint in run.dir (auto) or from this one",
    )
    rehearsal = parser.add_mutually_exclusive_group()
    rehearsal.add_argument(
        "--dry-run",
        action="store_true",
        help="a few steps, a validation and a checkpoint: would the real run fit?",
    )
    rehearsal.add_argument(
        "--profile", action="store_true", help="trace a few steps into run.dir/profile and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the file")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    with joined_world() as world:
        set_up_logging(world)
        try:
            return train(config, args, world)
        except OSError as error:
            if error.errno not in UNWRITABLE or not _is_of_run(error, config.run.dir):
                raise
            raise unwritable(error, config.run.dir) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise InputError(with_memory_hint(error)) from error
            if is_of_dead_worker(error):
                raise worker_death(error) from error
            if world.size == 1 or not lost_a_rank(error):
                raise
            raise InputError(
                f"rank {world.rank} stops, since another one is gone ({error}): see what that one"
                " said last, then go on with --resume auto"
            ) from error


def _is_of_run(error: OSError, folder: Path) -> bool:
    """Whether the file is one of the run's: an open file has no name in the error."""
    name = error.filename
    return name is None or Path(name).absolute().is_relative_to(folder.absolute())


def train(config: Config, args: argparse.Namespace, world: World) -> int:
    """Make the run and train it, or rehearse it; returns the exit code."""
    folder = RunFolder(config.run.dir, config.training.keep_checkpoints)
    with remembered_log() as earlier:
        if args.resume is None and (args.dry_run or args.profile):
            checkpoint = None  # a rehearsal leaves the run that may be there alone
        else:
            checkpoint = folder.resume_from(args.resume)
        trainer = Trainer(config, folder, checkpoint, world)
        del checkpoint
        for line in summary(trainer):
            logger.info(line)
    if args.dry_run:
        return dry_run(trainer)
    if args.profile:
        return profile(trainer)
    if not world.is_main:
        return trainer.run()
    write_text(folder.root / "config.yaml", dump_config(config))
    with logged_to_file(folder.root / "log.txt", earlier):
        return trainer.run()


def set_up_logging(world: World) -> None:
    """Everything from rank 0, warnings from the others."""
    who = f" [rank {world.rank}]" if world.size > 1 else ""
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.WARNING,
        format=f"%(asctime)s{who} %(message)s",
        datefmt="%H:%M:%S",
    )


@contextmanager
def remembered_log() -> Iterator[MemoryHandler]:
    """Keep what is logged in the body, for a file that cannot be written yet."""
    handler = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def logged_to_file(path: Path, earlier: MemoryHandler) -> Iterator[None]:
    """Append what was logged, what is logged in the body, and the error it ends with to a file."""
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    earlier.setTarget(handler)
    earlier.flush()
    logging.getLogger().addHandler(handler)
    try:
        yield
    except InputError as error:
        # The terminal has it from the command. A full disk may be what it tells of.
        record = logger.makeRecord(logger.name, logging.ERROR, "", 0, str(error), (), None)
        with suppress(OSError):
            handler.handle(record)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class _RunLog(logging.FileHandler):
    """Raises where a record cannot be written, instead of a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


if __name__ == "__main__":
    run_command(main)
