"""Which device a name means."""

from __future__ import annotations

import pytest
import torch

from models.device import TRAINING_KINDS, pick_device
from models.errors import InputError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Tells torch what this machine has: `machine(gpus, mps)`."""

    def have(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.mark.parametrize(
    ("gpus", "mps", "everywhere", "training"),
    [(2, False, "cuda", "cuda"), (0, True, "mps", "cpu"), (0, False, "cpu", "cpu")],
)
def test_auto_is_the_best_there_is(machine, gpus, mps, everywhere, training) -> None:
    machine(gpus, mps)
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
def test_a_device_that_is_not_there(machine, name: str, message: str) -> None:
    machine(2, False)
    assert pick_device("cuda:1", TRAINING_KINDS) == torch.device("cuda", 1)
    with pytest.raises(InputError, match=message):
        pick_device(name, TRAINING_KINDS)
