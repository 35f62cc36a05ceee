"""The folder of a run: its configuration, its checkpoints, and what to resume from."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from models import BSMamba2Config
from models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from models.errors import InputError
from models.files import remove_left_parts, try_writing, whole_file
from models.provenance import provenance

logger = logging.getLogger(__name__)


class RunFolder:
    """Names and writes the files of a run.

    `checkpoints/last.pt` holds all that a run needs to go on, `checkpoints/step_*.pt` are the
    newest `keep` of its predecessors, and `checkpoints/best.pt` holds weights alone.

    Args:
        root: the folder; `create` makes it.
        keep: how many numbered checkpoints to keep.
    """

    def __init__(self, root: Path, keep: int = 0) -> None:
        self.root = root
        self.keep = keep
        self.checkpoints = root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self._last_step: int | None = None  # of last.pt, where it is known to be whole

    def create(self) -> None:
        """Make the folder where it is missing; raises InputError where that cannot be."""
        try:
            try_writing(self.checkpoints)
        except OSError as error:
            raise InputError(
                f"run.dir {self.root}: nothing can be written there: {error.strerror}"
            ) from error
        remove_left_parts(self.checkpoints)

    def save_last(
        self,
        config: BSMamba2Config,
        weights: dict[str, Tensor],
        training: dict[str, Any],
        step: int,
    ) -> None:
        """Write last.pt; the one before stays under its step's number, the oldest of those goes."""
        if self.keep and self._last_step is not None:
            self._keep_last(self.checkpoints / f"step_{self._last_step:08d}.pt")
        save_checkpoint(self.last, config, weights, training)
        self._last_step = step
        numbers = self._numbered()
        # Those of this step or later ones are of a part of the run that was given up.
        given_up = [path for path in numbers if _step_of(path) >= step]
        for old in [*given_up, *numbers[len(given_up) :][self.keep :]]:
            old.unlink()

    def _keep_last(self, numbered: Path) -> None:
        numbered.unlink(missing_ok=True)
        try:
            # A hard link costs no space now and stays when last.pt is replaced.
            numbered.hardlink_to(self.last)
        except OSError:  # a file system without them
            with whole_file(numbered) as part:
                shutil.copyfile(self.last, part)

    def save_best(
        self, config: BSMamba2Config, weights: dict[str, Tensor], step: int, usdr: float
    ) -> None:
        """Write best.pt: the weights that ship, the step and the score, in dB, that chose them."""
        training = {"step": step, "usdr": usdr, "provenance": provenance()}
        save_checkpoint(self.best, config, weights, training)

    def resume_from(self, resume: str | None) -> Checkpoint | None:
        """The checkpoint to go on from; None to start afresh.

        Args:
            resume: None for a new run, `auto` for the newest whole checkpoint in the folder if
                there is one, or the path of a checkpoint.

        Raises:
            InputError: a new run would overwrite an old one, or there is nothing to resume from.
        """
        found = list(self._candidates())
        if resume is None:
            if found or self.best.exists():
                raise InputError(
                    f"run.dir {self.root} already holds a run: go on with --resume auto,"
                    " or name another run.dir"
                )
            return None
        if resume != "auto":
            chosen = Path(resume)
            if found and chosen.resolve().parent != self.checkpoints.resolve():
                raise InputError(
                    f"run.dir {self.root} already holds another run than {resume}: name another"
                    " run.dir"
                )
            return self._read(chosen)
        for path in found:
            try:
                return self._read(path)
            except InputError as error:
                logger.warning("%s; trying the checkpoint before it", error)
        if found:
            raise InputError(f"run.dir {self.root}: none of its checkpoints can be read")
        logger.info("no checkpoint in %s yet: starting afresh", self.root)
        return None

    def _read(self, path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        if "optimizer" not in checkpoint.training:
            raise InputError(f"{path}: holds weights alone; resume from a last.pt or step_*.pt")
        if path.resolve() == self.last.resolve():
            self._last_step = int(checkpoint.training["step"])
        return checkpoint

    def _candidates(self) -> Iterator[Path]:
        if self.last.exists():
            yield self.last
        yield from self._numbered()

    def _numbered(self) -> list[Path]:
        """The numbered checkpoints, newest first."""
        names = self.checkpoints.glob("step_*.pt")
        return sorted((p for p in names if re.fullmatch(r"step_\d{8,}\.pt", p.name)), reverse=True)


def _step_of(numbered: Path) -> int:
    return int(numbered.stem.removeprefix("step_"))
