"""The device that a command's option or a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.errors import InputError

DEVICE_KINDS = ("cuda", "mps", "cpu")  # in the order in which auto looks for them
TRAINING_KINDS = ("cuda", "cpu")  # what training and the benchmarks run on
DEVICE_HELP = f"auto, {', '.join(DEVICE_KINDS)} or cuda:1 (default: auto)"


def pick_device(
    name: str, kinds: Sequence[str] = DEVICE_KINDS, option: str = "device"
) -> torch.device:
    """The device of that name; `auto` is the first of `kinds` that this machine has.

    Raises:
        InputError: it is none of `kinds`, or this machine does not have it; the message names
            `option`, where the name was given.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind in kinds if counts[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in kinds:
        raise InputError(f"{option} {name!r}: expected one of auto, {', '.join(sorted(kinds))}")
    if (device.index or 0) >= counts[device.type]:
        raise InputError(
            f"{option} {name!r}: not on this machine, which has {gpus} CUDA devices;"
            " use cpu or auto"
        )
    return device
