"""Loss and uSDR over the fixed validation segments."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import usdr
from models import BSMamba2
from models.errors import InputError
from training.data.mixing import AlignedSegments
from training.distributed import World
from training.logbook import Logbook
from training.loss import SeparationLoss

logger = logging.getLogger(__name__)

# Estimates this far below their stems, in dB, that score no better than silence are silence.
SILENT_LEVEL = -20.0
SILENT_USDR = 0.5


@dataclass(frozen=True)
class Validation:
    """Scores of one validation.

    Attributes:
        loss: mean of the training loss over the segments.
        usdr: stem -> mean uSDR over the segments, in dB; silence scores 0.
        level: energy of all estimates over that of all targets, in dB.
    """

    loss: float
    usdr: dict[str, float]
    level: float

    @property
    def mean_usdr(self) -> float:
        """Mean over the stems of their uSDR, in dB: what chooses the best checkpoint."""
        return float(np.mean(list(self.usdr.values())))

    @property
    def is_silent(self) -> bool:
        """Whether the network gives little else than silence: the plateau of L1 losses."""
        return self.level < SILENT_LEVEL and abs(self.mean_usdr) < SILENT_USDR

    def row(self) -> dict[str, float]:
        """The scores by the names they are logged under."""
        return {
            "valid_loss": self.loss,
            "valid_usdr": self.mean_usdr,
            "valid_level": self.level,
            **{f"valid_usdr_{name}": score for name, score in self.usdr.items()},
        }


@dataclass(frozen=True)
class _Segment:
    loss: float
    usdr: list[float]  # a stem
    estimate_energy: float
    target_energy: float


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
    world: World | None = None,
) -> Validation:
    """Score a network; every rank gets the scores over the segments of all.

    Args:
        network: mixture -> estimate `[b, n, c, t]`, in the precision of the training.
        model: the network's STFT, names and device; set to evaluation and back to training.
        loss: the training loss.
        batches: `mixture [b, c, t]` and `target [b, n, c, t]`: this rank's share of the segments,
            every `world.size`-th from number `rank` on.
        world: the ranks; None for this process alone.

    Raises:
        InputError: no rank has a segment.
    """
    device = next(model.parameters()).device
    model.eval()
    scored: list[_Segment] = []
    for batch in batches:
        mixture = batch["mixture"].to(device)
        target = round_trip(model, batch["target"].to(device))
        estimate = network(mixture).float()
        scored += [_score(e, t, loss) for e, t in zip(estimate, target, strict=True)]
    model.train()
    # In the order of the segments, so that sums do not depend on the number of ranks.
    ranks = (world or World()).gather(scored)
    segments = [s for group in zip_longest(*ranks) for s in group if s is not None]
    if not segments:
        raise InputError("no validation segment can be read any more: check data.root")
    scores = np.mean([s.usdr for s in segments], axis=0)
    energies = [sum(getattr(s, f"{k}_energy") for s in segments) for k in ("estimate", "target")]
    return Validation(
        float(np.mean([s.loss for s in segments])),
        dict(zip(model.config.stem_names, scores.tolist(), strict=True)),
        float(10 * np.log10((energies[0] + 1e-12) / (energies[1] + 1e-12))),
    )


def _score(estimate: Tensor, target: Tensor, loss: SeparationLoss) -> _Segment:
    """Scores of one segment; both `[n, c, t]`."""
    value = float(loss(estimate, target)[0])
    pairs = zip(target.cpu().numpy(), estimate.cpu().numpy(), strict=True)
    scores = [usdr(reference, guess) for reference, guess in pairs]
    energies = [float(wave.double().square().sum()) for wave in (estimate, target)]
    return _Segment(value, scores, *energies)


@torch.no_grad()
def separate_segment(
    network: Callable[[Tensor], Tensor], model: BSMamba2, segment: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`mixture`, `estimate` and `truth` of one validation segment, each `[n, c, t]` on the CPU."""
    device = next(model.parameters()).device
    mixture, target = segment["mixture"].to(device), segment["target"].to(device)
    model.eval()
    estimate = network(mixture[None]).float()[0]
    model.train()
    waves = {"mixture": mixture.expand_as(target), "estimate": estimate, "truth": target}
    return {kind: wave.cpu() for kind, wave in waves.items()}


def show_examples(
    logbook: Logbook,
    network: Callable[[Tensor], Tensor],
    model: BSMamba2,
    segments: AlignedSegments,
    *,
    count: int,
    step: int,
) -> None:
    """Record sound and pictures of `count` segments, spread evenly and the same every time."""
    count = min(count, len(segments))
    for place in range(count):
        segment = segments[place * len(segments) // count]
        if segment is None:  # no longer readable, which validation tells of
            continue
        waves = separate_segment(network, model, segment)
        for number, stem in enumerate(model.config.stem_names):
            one = {kind: wave[number] for kind, wave in waves.items()}
            logbook.write_example(one, model.config.sample_rate, step, f"{stem}/{place + 1}")


def tell_of_failure(result: Validation, step: int) -> None:
    """Say when the network gives no numbers, or has learned no more than to be quiet."""
    if not math.isfinite(result.mean_usdr):
        logger.warning(
            "step %d: the averaged weights give estimates that are not finite, and best.pt stays as"
            " it was: lower training.learning_rate",
            step,
        )
    if result.is_silent:
        logger.info(
            "step %d: silence plateau: the estimates lie %.0f dB below the stems and score %.2f dB"
            " uSDR (silence itself 0 dB); L1 losses pass through this, see docs/training.md",
            step,
            -result.level,
            result.mean_usdr,
        )
