"""Steps whose gradient is not finite: skipped, counted, and looked into when they do not end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from models.errors import InputError
from models.files import whole_file


class FiniteGuard:
    """Counts skipped steps on the device and tells the host of them one step late.

    The host never waits for the step it has just queued, only for the one before, which on a
    GPU runs while the next is queued.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros((), device=device)
        self._in_row = torch.zeros((), device=device)
        self._seen: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def note(self, skipped: Tensor) -> None:
        """Take in whether a step was skipped: 1 or 0, a scalar on the device."""
        self.total += skipped
        self._in_row = (self._in_row + skipped) * skipped
        event = None
        if self.device.type == "cuda":
            copy = torch.empty((), pin_memory=True).copy_(self._in_row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy = self._in_row.clone()
        self._seen.append((copy, event))

    def in_row(self) -> int:
        """How many of the newest steps known to the host were skipped, without a break."""
        lag = 1 if self.device.type == "cuda" else 0
        count = 0
        while len(self._seen) > lag:
            copy, event = self._seen.popleft()
            if event is not None:
                event.synchronize()
            count = int(copy)
        return count


def stop_at_bad_step(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    loss: Callable[[dict[str, Tensor]], Tensor],
    name: str,
    folder: Path,
) -> NoReturn:
    """Save the batch that a skipped step failed on and say which tensor was not finite.

    Args:
        model: the network, with the weights of that step, which skipping left as they were.
        batches: this rank's batches of the step.
        loss: the training loss of a batch, with `model`.
        name: of the step, for the message and the file.
        folder: receives `NAME.pt` with `mixture`, `target` and `tensor`.

    Raises:
        InputError: always.
    """
    for batch in batches:
        tensor = _first_not_finite(model, batch, loss)
        if tensor is None:
            continue
        path = folder / f"{name.replace(' ', '_')}.pt"
        with whole_file(path) as temporary:
            torch.save({**batch, "tensor": tensor}, temporary)
        raise InputError(
            f"{name}: not finite again and again, first in {tensor}; its batch lies in {path};"
            " lower training.learning_rate or try training.precision=fp32"
        )
    raise InputError(
        f"{name}: the gradient is not finite again and again, though not from this process's"
        " batches; lower training.learning_rate or try training.precision=fp32"
    )


def _first_not_finite(
    model: nn.Module,
    batch: dict[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor],
) -> str | None:
    """Name the first tensor with NaN or infinity in a forward and backward pass."""
    named = [(f"the {kind} of the batch", wave) for kind, wave in batch.items()]
    named += [(f"the weight {name}", weight) for name, weight in model.named_parameters()]
    for name, tensor in named:
        if not tensor.isfinite().all():
            return name
    found: list[str] = []
    model.zero_grad(set_to_none=True)
    with _watched_outputs(model, found):
        value = loss(batch)
    if found:
        return f"the output of {found[0]}"
    if not value.isfinite():
        return "the loss"
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Backwards: the gradient reaches the last layers first.
    for name, gradient in reversed(gradients.items()):
        if not gradient.isfinite().all():
            return f"the gradient of {name}"
    if not torch.stack([gradient.norm() for gradient in gradients.values()]).norm().isfinite():
        return "the norm of the gradient"
    return None


@contextmanager
def _watched_outputs(model: nn.Module, found: list[str]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name or "the network")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
