"""Timing: median of repeats after warm-up, peak memory, out of memory as a result."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.dispatch import kernel_errors
from models.errors import is_out_of_memory

MIN_REPEATS, MAX_REPEATS = 3, 50
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
        median_ms: median of the repeats; None where memory ran out or the run failed.
        warmup_s: seconds of the first call, compilation and autotuning included.
        peak_gib: highest GPU memory in use, the inputs included; None on a CPU.
        repeats: calls behind the median.
        failure: why there is no time.
    """

    median_ms: float | None = None
    warmup_s: float | None = None
    peak_gib: float | None = None
    repeats: int = 0
    failure: str | None = None


def measure(run: Callable[[], object], device: torch.device, budget_s: float = 0.5) -> Timing:
    """Time `run`, repeated for about `budget_s` seconds after one first and one warm call.

    CUDA events on a GPU, wall clock on a CPU. A failure of `run` is reported, not raised.
    """
    free_memory(device)
    try:
        warmup_s = _wall(run, device)
        reset_peak(device)
        once_s = _wall(run, device)
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(budget_s / max(once_s, 1e-6))))
        if once_s > 2 * budget_s:  # a slow reference: the warm call is the measurement
            return Timing(1e3 * once_s, warmup_s, peak_gib(device), 1)
        clock = _events if device.type == "cuda" else _walls
        times = clock(run, device, repeats)
    except kernel_errors() as error:
        return Timing(failure=told(error))
    finally:
        free_memory(device)
    return Timing(statistics.median(times), warmup_s, peak_gib(device), repeats)


def told(error: Exception) -> str:
    """An error in the few words that a cell of a table takes."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    line = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {line}"[:100]


def reset_peak(device: torch.device) -> None:
    """Forget the highest memory use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The highest memory use since `reset_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def free_memory(device: torch.device) -> None:
    """Return cached memory, so that one measurement's leftovers do not fail the next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _wall(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _walls(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    return [1e3 * _wall(run, device) for _ in range(repeats)]


def _events(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
             for _ in range(repeats)]  # fmt: skip
    for start, end in marks:
        start.record()
        run()
        end.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in marks]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
