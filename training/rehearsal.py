"""Before a long run: some steps and a checkpoint (`--dry-run`), or a trace (`--profile`)."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from models.errors import InputError
from training.run_folder import RunFolder
from training.trainer import Trainer

logger = logging.getLogger(__name__)

GIB = 2**30
_STEPS = 3  # the first allocates the optimizer's moments, the last is timed
_WAIT, _WARMUP, _ACTIVE = 1, 2, 3


def dry_run(trainer: Trainer) -> int:
    """Train a few steps, validate and write a checkpoint, and tell whether a real run would fit.

    The weights are those of a fresh run or of what `--resume` names; no file is kept.

    Raises:
        InputError: the GPU's memory or the disk does not suffice.
    """
    batches = trainer.loaders.training(trainer.position.examples)
    for number in range(1, _STEPS + 1):
        # What a step finds on the GPU while checkpoints are written beside it.
        copies = None
        if number == _STEPS:
            copies = trainer.snapshot()
        started = time.monotonic()
        trainer.train_step(batches)
        skipped = trainer.skipped  # waits for the step
        step_seconds = time.monotonic() - started
    del copies
    if skipped - trainer.position.skipped == _STEPS:
        raise InputError(
            "no step had a finite gradient: lower training.learning_rate, try"
            " training.precision=fp32, and look at the data with training.data.inspect"
        )
    root = trainer.folder.root
    with tempfile.TemporaryDirectory(dir=root, prefix=".dry-run-") as name:
        trainer.folder = RunFolder(Path(name))
        trainer.folder.create()
        with trainer.reporting() as logbook:
            row = trainer.row()
            started = time.monotonic()
            row |= trainer.validate(logbook)
            validate_seconds = time.monotonic() - started
            if logbook is not None:
                logbook.write(row)
            if main := trainer.world.is_main:
                trainer.save()
        size = trainer.folder.last.stat().st_size / GIB if main else 0.0
    free = shutil.disk_usage(root).free / GIB
    peak = _peak_gib(trainer)
    if not main:
        return 0
    settings = trainer.settings
    steps = settings.max_steps - trainer.step + _STEPS
    hours = steps * (step_seconds + validate_seconds / settings.validate_every) / 3600
    if settings.max_minutes is not None:
        hours = min(hours, settings.max_minutes / 60)
    logger.info("step: %.2f s, %d examples", step_seconds, trainer.examples_per_step)
    logger.info("validation: %.1f s, loss %.4f", validate_seconds, row["valid_loss"])
    logger.info("peak memory: %s", peak)
    files = settings.keep_checkpoints + 3  # last, best, and the next while it is written
    logger.info("checkpoints: %.2f GiB each, at most %d, %.1f GiB free", size, files, free)
    logger.info("whole run: about %.1f h", hours)
    if files * size > free:
        raise InputError(
            f"{root}: {free:.1f} GiB are free, the checkpoints of the run need"
            f" {files * size:.1f}: lower training.keep_checkpoints or choose another run.dir"
        )
    logger.info("dry run passed: a real run fits")
    return 0


def profile(trainer: Trainer) -> int:
    """Trace some steps with torch.profiler into `run.dir/profile`, and log what took longest.

    Open the trace at https://ui.perfetto.dev.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    folder = trainer.folder.root / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"rank{trainer.world.rank}.json.gz"
    key = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"

    def report(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(trace))
        logger.info("\n%s", profiler.key_averages().table(sort_by=key, row_limit=20))

    batches = trainer.loaders.training(trainer.position.examples)
    schedule = torch.profiler.schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=report
    ) as profiler:
        for _ in range(_WAIT + _WARMUP + _ACTIVE):
            with torch.profiler.record_function("train_step"):
                trainer.train_step(batches)
            profiler.step()
    logger.info("trace of %d steps: %s (open it at https://ui.perfetto.dev)", _ACTIVE, trace)
    return 0


def _peak_gib(trainer: Trainer) -> str:
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device) / GIB
        held = torch.cuda.max_memory_reserved(trainer.device) / GIB
        total = torch.cuda.get_device_properties(trainer.device).total_memory / GIB
        return f"{peak:.1f} GiB in use, {held:.1f} GiB reserved, of {total:.1f} on the GPU"
    try:
        import resource
    except ImportError:
        return "unknown on Windows"
    # In KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.1f} GiB of RAM"
