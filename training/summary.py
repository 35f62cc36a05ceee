"""What a run is about to do, in the lines it starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.dispatch import candidates, requested_backend
from models.mamba2 import FUSED_TAPS

if TYPE_CHECKING:
    from training.config import DataSection
    from training.trainer import Trainer

# Weights, gradient, average and two moments, and copies of all but the gradient while a
# checkpoint is written; float32.
_BYTES_PER_PARAMETER = (5 + 4) * 4


def summary(trainer: Trainer) -> list[str]:
    """Parameters, batch, data, memory and how the network is computed, a line each."""
    settings, data = trainer.settings, trainer.config.data
    parameters = sum(p.numel() for p in trainer.model.parameters())
    windows = trainer.loaders.active_windows()
    steps = windows / trainer.examples_per_step
    fixed = parameters * _BYTES_PER_PARAMETER / 2**30
    return [
        f"network: {parameters:,} parameters, scan backend {_backend(trainer)}",
        f"device: {_device(trainer.device)}, {trainer.world.size} process(es),"
        f" {settings.precision}{', compiled' if settings.compile else ''}"
        f"{', deterministic' if settings.deterministic else ''}",
        f"a step: {trainer.examples_per_step} segments of {data.segment_seconds:g} s"
        f" ({settings.batch_size} x {settings.accumulation} accumulated x {trainer.world.size})"
        f"{_short(data)}",
        f"an epoch: {windows:,} active segments, {steps:,.0f} steps;"
        f" validation on {len(trainer.loaders.segments)} segments",
        f"memory: {fixed:.2f} GiB for weights, gradients, average, moments and a checkpoint;"
        " what a batch takes --dry-run measures",
    ]


def _short(data: DataSection) -> str:
    if not data.short_until:
        return ""
    return f", the first {data.short_until} in {data.short_pieces} short ones each"


def _backend(trainer: Trainer) -> str:
    wanted = requested_backend(trainer.config.model.scan_backend)
    if wanted != "auto":
        return wanted
    with trainer.autocast():
        sample = torch.empty(1, device=trainer.device)
        return f"auto ({candidates(sample, fused=trainer.config.model.d_conv in FUSED_TAPS)[0]})"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device} with {torch.get_num_threads()} threads"
