"""Work over many files in threads: decoders and numpy run outside Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

Key = TypeVar("Key")
Job = TypeVar("Job")
Result = TypeVar("Result")

_MAX_THREADS = 16


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    work: Callable[[Job], Result], jobs: Mapping[Key, Job], *, name: str, unit: str
) -> Iterator[tuple[Key, Result]]:
    """Yield the key and the result of every job as they are done, under a bar on a terminal.

    An exception of a job is raised here, and the jobs that have not begun are dropped.
    """
    pool = ThreadPoolExecutor(max(1, min(_MAX_THREADS, processors(), len(jobs))))
    bar = tqdm(total=len(jobs), desc=name, unit=unit, disable=None)
    try:
        pending = {pool.submit(work, job): key for key, job in jobs.items()}
        for done in as_completed(pending):
            yield pending[done], done.result()
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
