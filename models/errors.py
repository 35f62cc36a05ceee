"""Errors a person can mend, and how every command reports them."""

from __future__ import annotations

import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from models.files import MENDABLE


class InputError(ValueError):
    """Bad input: the message is one line that names the file or key and the remedy."""


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as people read them: `warning: ...` on standard error, above any tqdm bar."""
    from tqdm import tqdm

    def show(message: Warning | str, *_: object, **__: object) -> None:
        tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def log_level(level: int, *names: str) -> Iterator[None]:
    """Set the level of these loggers in the body, or in the function that it decorates."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, previous in zip(loggers, before, strict=True):
            logger.setLevel(previous)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command-line `main`; exit 0 on success, 2 with one line on bad input or a file that
    the system refuses, 130 on Ctrl-C.

    A reader of standard output that has gone (`| head`) ends it quietly, with 141 as in a shell,
    where the command itself does not say more.
    Any other exception is a fault of ours and keeps its traceback.
    """
    # Strong decays make denormals, which slow a step on the CPU tenfold.
    torch.set_flush_denormal(True)
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        if not _standard_output_is_closed():
            raise  # of another pipe: a fault like any other
        _discard_standard_output()
        sys.exit(128 + 13)  # SIGPIPE
    except InputError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        if error.filename is None:  # it may be standard output, which would fail again at exit
            _discard_standard_output()
        what = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {what}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _discard_standard_output() -> None:
    """What is left in the buffer goes nowhere, instead of failing again at exit."""
    with suppress(OSError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _standard_output_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def is_of_dead_worker(error: Exception) -> bool:
    """Whether the DataLoader's signal handler raised it, which may be in any line of a run."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, a GPU's or the CPU's.

    The allocators of the CPU and of MPS, and CUDA's libraries, raise a plain RuntimeError.
    """
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUFFT_ALLOC_FAILED",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)
