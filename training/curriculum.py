"""Louder targets while the network is new, until it knows them.

Under an L1 loss a network that is not sure of its target does best to be quiet, and may stay so for
hours. Where the target is louder than the rest of the mixture, being quiet costs more than trying.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.config import CurriculumSection
from training.distributed import World

_MEMORY = 0.95  # of the running score: about 20 steps
_RELAPSE = 2.0  # dB below release_sdr: the network forgets


class TargetGain:
    """A factor on the targets in the mixtures, lowered to 1 by the network's own score.

    Every optimizer step whose running SDR is above `release_sdr` lowers the factor by
    `release_rate`, any other raises it by half of that; silent and skipped steps have no SDR and go
    by the score there is. Once it is 1 it stays, unless the score falls far below `release_sdr`:
    then it sets out from there again. All of it stays on the device: no step waits.

    Args:
        settings: start, threshold and rate.
        device: of the training.
        world: the ranks, which share one score and thus one factor.
    """

    def __init__(self, settings: CurriculumSection, device: torch.device, world: World) -> None:
        self.settings = settings
        self.world = world
        self.is_on = settings.target_gain > 1
        self.gain = torch.tensor(settings.target_gain, dtype=torch.float64, device=device)
        self.score = torch.zeros((), dtype=torch.float64, device=device)  # dB
        self._energies = torch.zeros(2, dtype=torch.float64, device=device)  # target, error

    def louder(self, mixture: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture `[b, c, t]` with louder targets, and these `[b, n, c, t]`."""
        if not self.is_on:
            return mixture, target
        gain = self.gain.to(target.dtype)
        return mixture + (gain - 1) * target.sum(dim=1), target * gain

    def observe(self, estimate: Tensor, target: Tensor) -> None:
        """Take in what the network made of a batch."""
        if self.is_on:
            truth = target.detach()
            error = estimate.detach().to(truth.dtype) - truth
            self._energies += torch.stack([truth.square().sum(), error.square().sum()])

    def step(self) -> None:
        """Move the factor by what was observed since the last optimizer step of all ranks."""
        if not self.is_on:
            return
        settings = self.settings
        target, error = self.world.mean(list(self._energies.unbind()))
        sdr = 10 * torch.log10(target / error)
        # Silence has no SDR, and a step that is skipped has no finite error.
        score = torch.where(sdr.isfinite(), self.score.lerp(sdr, 1 - _MEMORY), self.score)
        factor = torch.where(
            score > settings.release_sdr, 1 - settings.release_rate, 1 + settings.release_rate / 2
        )
        gain = (self.gain * factor).clamp(1, settings.target_gain)
        moves = (self.gain > 1) | (score < settings.release_sdr - _RELAPSE)
        self.gain.copy_(torch.where(moves, gain, 1.0))
        self.score.copy_(score)
        self._energies.zero_()

    def row(self) -> dict[str, float]:
        """What to log: the factor, and the score in dB."""
        if not self.is_on:
            return {}
        return {"target_gain": float(self.gain), "train_sdr": float(self.score)}

    def state_dict(self) -> dict[str, Any]:
        """Factor and score, on the device; nothing where it is off."""
        return {"gain": self.gain, "score": self.score} if self.is_on else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; from the start where the saved run had none."""
        if state:
            self.gain.copy_(state["gain"])
            self.score.copy_(state["score"])
