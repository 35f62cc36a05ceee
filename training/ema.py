"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of a model's parameters, `average = decay * average + (1 - decay) * weight`.

    It starts as a copy of the weights and has no bias correction, as in the authors' training
    (EuiYeonKim/BSMamba2@42eb8c8).

    Args:
        model: the network whose parameters are followed; their number and shapes must not change.
        decay: weight of the past, in [0, 1).
        share: average about this share of the updates so far where `decay` would reach further
            back: update n decays by n / (n + 1 / share) at most. None for `decay` alone.
    """

    def __init__(self, model: nn.Module, decay: float, share: float | None = None) -> None:
        self.decay = decay
        self.share = share
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, number: int) -> None:
        """Take in the present weights, after optimizer step `number`, counted from one."""
        longest = 1.0 if self.share is None else number / (number + 1 / self.share)
        decay = min(self.decay, longest)
        weights = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run the body with the averaged weights in the model, then put its own back."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy_to(model, self.average)
        try:
            yield
        finally:
            self._copy_to(model, own)

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with the averaged weights in place of its parameters."""
        return {**model.state_dict(), **self.average}

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages; raises KeyError if one is missing."""
        for name, average in self.average.items():
            average.copy_(state[name])

    @staticmethod
    @torch.no_grad()
    def _copy_to(model: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
