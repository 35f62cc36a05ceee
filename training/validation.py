"""Loss and uSDR over the fixed validation segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import usdr
from models import BSMamba2
from training.loss import SeparationLoss


@dataclass(frozen=True)
class Validation:
    """Scores of one validation.

    Attributes:
        loss: mean of the training loss over the segments.
        usdr: stem -> mean uSDR over the segments, in dB.
        example: `mixture`, `estimate` and `truth` of the first segment, each [stem, channel, time].
    """

    loss: float
    usdr: dict[str, float]
    example: dict[str, Tensor]

    @property
    def mean_usdr(self) -> float:
        """Mean over the stems of their uSDR, in dB: what chooses the best checkpoint."""
        return float(np.mean(list(self.usdr.values())))


def round_trip(model: BSMamba2, target: Tensor) -> Tensor:
    """STFT and inverse STFT of a target `[b, n, c, t]`, as the estimate went through them too."""
    wave = target.flatten(0, 1)  # b*n c t
    with torch.autocast(target.device.type, enabled=False):
        wave = model.istft(model.stft(wave), wave.shape[-1])
    return wave.unflatten(0, target.shape[:2])


@torch.no_grad()
def validate(
    network: Callable[[Tensor], Tensor],
    model: BSMamba2,
    loss: SeparationLoss,
    batches: Iterable[dict[str, Tensor]],
) -> Validation:
    """Score a network on batches of `mixture [b, c, t]` and `target [b, n, c, t]`.

    Args:
        network: mixture -> estimate `[b, n, c, t]`, in the precision of the training.
        model: the network's STFT, names and device; set to evaluation and back to training.
        loss: the training loss.
        batches: the validation set.
    """
    device = next(model.parameters()).device
    scores: dict[str, list[float]] = {name: [] for name in model.config.stem_names}
    losses: list[float] = []
    example: dict[str, Tensor] = {}
    model.eval()
    for batch in batches:
        mixture = batch["mixture"].to(device)
        target = round_trip(model, batch["target"].to(device))
        estimate = network(mixture).float()
        losses += [float(loss(e, t)[0]) for e, t in zip(estimate, target, strict=True)]
        if not example:
            mixtures = mixture[0].expand_as(target[0])
            example = {"mixture": mixtures, "estimate": estimate[0], "truth": target[0]}
        for item_target, item_estimate in zip(target, estimate, strict=True):
            stems = zip(scores, item_target, item_estimate, strict=True)
            for name, reference, guess in stems:
                scores[name].append(usdr(reference.cpu().numpy(), guess.cpu().numpy()))
    model.train()
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return Validation(float(np.mean(losses)), means, {k: v.cpu() for k, v in example.items()})
