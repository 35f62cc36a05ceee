"""Which device a name means."""

from __future__ import annotations

import pytest
import torch

from models.device import TRAINING_KINDS, pick_device
from models.errors import InputError


@pytest.mark.parametrize(
    ("gpus", "mps", "everywhere", "training"),
    [(2, False, "cuda", "cuda"), (0, True, "mps", "cpu"), (0, False, "cpu", "cpu")],
)
def test_auto_is_the_best_there_is(have_devices, gpus, mps, everywhere, training) -> None:
    have_devices(gpus, mps)
    assert pick_device("auto") == torch.device(everywhere)
    assert pick_device("auto", TRAINING_KINDS) == torch.device(training)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", r"^device 'cuda:2': not on this machine, which has 2 CUDA devices; use"),
        ("mps", r"^device 'mps': expected one of auto, cpu, cuda$"),
        ("gpu", r"^device 'gpu': expected one of auto, cpu, cuda$"),
        ("meta", r"^device 'meta': expected one of auto, cpu, cuda$"),
    ],
)
def test_a_device_that_is_not_there(have_devices, name: str, message: str) -> None:
    have_devices(2, False)
    assert pick_device("cuda:1", TRAINING_KINDS) == torch.device("cuda", 1)
    with pytest.raises(InputError, match=message):
        pick_device(name, TRAINING_KINDS)
