"""Louder targets: what they do to a batch, and when they come down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.config import CurriculumSection
from training.curriculum import TargetGain
from training.distributed import World


def make(target_gain: float = 2.0, **settings: float) -> TargetGain:
    section = CurriculumSection(target_gain=target_gain, **settings)
    return TargetGain(section, torch.device("cpu"), World())


def observe(curriculum: TargetGain, sdr: float, steps: int = 1) -> None:
    """Steps whose estimates have this SDR, in dB."""
    target = torch.ones(1, 1, 2, 100)
    for _ in range(steps):
        curriculum.observe(target * (1 - 10 ** (-sdr / 20)), target)
        curriculum.step()


def test_the_mixture_holds_the_louder_targets() -> None:
    rest, target = torch.randn(2, 2, 50), torch.randn(2, 1, 2, 50)
    mixture, louder = make(3.0).louder(rest + target.sum(1), target)
    torch.testing.assert_close(louder, 3 * target)
    torch.testing.assert_close(mixture, rest + 3 * target.sum(1))


def test_off_it_touches_nothing() -> None:
    off, mixture, target = make(1.0), torch.randn(2, 2, 50), torch.randn(2, 1, 2, 50)
    assert off.louder(mixture, target) == (mixture, target)
    observe(off, sdr=20.0)
    assert off.row() == {}


def test_the_score_lowers_it_and_a_lost_score_raises_it() -> None:
    curriculum = make(2.0, release_sdr=5.0, release_rate=0.01)
    observe(curriculum, sdr=8.0, steps=30)  # the running score passes 5 dB on the way
    low = float(curriculum.gain)
    assert 1.7 < low < 2.0
    observe(curriculum, sdr=0.0, steps=100)
    assert low < float(curriculum.gain) <= 2.0


def test_once_down_it_stays_down() -> None:
    curriculum = make(1.05, release_sdr=5.0, release_rate=0.1)
    observe(curriculum, sdr=20.0, steps=20)
    assert float(curriculum.gain) == 1.0
    observe(curriculum, sdr=3.5, steps=100)
    assert curriculum.row()["target_gain"] == 1.0


def test_a_network_that_forgets_has_it_again() -> None:
    curriculum = make(2.0, release_sdr=5.0, release_rate=0.1)
    observe(curriculum, sdr=20.0, steps=20)
    assert float(curriculum.gain) == 1.0
    observe(curriculum, sdr=0.0, steps=60)
    raised = float(curriculum.gain)
    assert 1.05 < raised <= 2.0
    observe(curriculum, sdr=8.0, steps=100)
    assert float(curriculum.gain) == 1.0


@pytest.mark.parametrize("estimate", [torch.zeros(1, 1, 2, 9), torch.full((1, 1, 2, 9), torch.nan)])
def test_silent_targets_and_skipped_steps_leave_the_score(estimate: Tensor) -> None:
    curriculum = make()
    observe(curriculum, sdr=8.0, steps=3)
    before = float(curriculum.score)
    curriculum.observe(estimate, torch.zeros(1, 1, 2, 9))
    curriculum.step()
    assert float(curriculum.score) == before
    observe(curriculum, sdr=8.0)
    assert float(curriculum.score) > before


def test_it_goes_on_from_a_saved_state() -> None:
    curriculum, other = make(), make()
    observe(curriculum, sdr=8.0, steps=40)
    other.load_state_dict(curriculum.state_dict())
    observe(curriculum, sdr=8.0)
    observe(other, sdr=8.0)
    assert other.row() == curriculum.row()


def test_it_can_be_turned_on_when_resuming() -> None:
    off, on = make(1.0), make(3.0)
    on.load_state_dict(off.state_dict())
    assert on.row()["target_gain"] == 3.0
