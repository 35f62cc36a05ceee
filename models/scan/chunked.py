"""The selective scan as matrix products within chunks and a short recurrence between them.

Within a chunk the scan is a masked product (the "quadratic form" of Mamba-2, arXiv 2405.21060,
section 6); only one state a chunk passes on. A sequence no longer than a chunk needs no recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64
# exp(-60) is below the rounding of float64 sums of order one, and far above denormals.
LOG_DECAY_FLOOR = -60.0
# Sequences are worked off in slices whose decay matrices stay in a CPU's cache.
SLICE_ELEMENTS = 1 << 20
SLICE_ELEMENTS_GPU = 1 << 28


def chunked_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Same function as `sequential_scan`; shapes as in `models.scan.selective_scan`.

    Saves its inputs alone and recomputes in the backward pass. First derivatives only.
    """
    return _ChunkedScan.apply(x, dt, A, B, C, D)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, dt, A, B, C, D)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _slices(x):
                y[rows] = _scan(x[rows], dt[rows], A, B[rows], C[rows], D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D = ctx.saved_tensors
        per_row = [torch.empty_like(t) for t in (x, dt, B, C)]
        shared = [torch.zeros_like(t) for t in (A, D)]
        for rows in _slices(x):
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                leaves = [t.detach().requires_grad_() for t in (x[rows], dt[rows], A)]
                leaves += [t.detach().requires_grad_() for t in (B[rows], C[rows], D)]
                y = _scan(*leaves)
            gx, gdt, gA, gB, gC, gD = torch.autograd.grad(y, leaves, grad_y[rows])
            for whole, part in zip(per_row, (gx, gdt, gB, gC), strict=True):
                whole[rows] = part
            for total, part in zip(shared, (gA, gD), strict=True):
                total += part
        return per_row[0], per_row[1], shared[0], per_row[2], per_row[3], shared[1]


def _slices(x: Tensor) -> Iterator[slice]:
    batch, length, heads, _ = x.shape
    elements = SLICE_ELEMENTS if x.device.type == "cpu" else SLICE_ELEMENTS_GPU
    rows = max(1, elements // (heads * length * min(length, CHUNK)))
    return (slice(start, start + rows) for start in range(0, batch, rows))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, headdim = x.shape
    inputs = x.to(dtype)
    c = -(-length // CHUNK)
    q = -(-length // c)
    pad = c * q - length

    def chunks(tensor: Tensor) -> Tensor:  # b l ... -> b c q ...
        tensor = tensor.to(dtype)
        if pad:  # dt = 0 there: such steps neither decay nor write
            tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, pad])
        return tensor.unflatten(1, (c, q))

    dt, B, C = chunks(dt), chunks(B), chunks(C)  # b c q h, b c q n, b c q n
    scaled = chunks(inputs) * dt[..., None]  # b c q h p
    log_decay = dt * A.to(dtype)  # b c q h
    # Decay from the chunk's entry up to and including each step, as a logarithm.
    entry = log_decay.cumsum(2)  # b c q h

    # 1. Within a chunk: y_t = sum over s up to t of (C_t B_s) exp(entry_t - entry_s) dt_s x_s.
    decay = _Decay.apply(entry.transpose(2, 3))  # b c h q q
    weights = decay * (C @ B.transpose(2, 3))[:, :, None]  # b c h q q
    y = (weights @ scaled.transpose(2, 3)).transpose(2, 3)  # b c q h p

    # 2. Between chunks: each leaves a state, which decays through those after it.
    if c > 1:
        total = log_decay.sum(2)  # b c h
        to_exit = _decay(total[:, :, None] - entry)  # b c q h
        left = (scaled * to_exit[..., None]).flatten(3).transpose(2, 3) @ B  # b c hp n
        states = _pass_states(left, _decay(total), headdim)  # b c hp n
        entering = (C @ states.transpose(2, 3)).unflatten(-1, (heads, headdim))  # b c q h p
        y = y + _decay(entry)[..., None] * entering

    y = y.flatten(1, 2)[:, :length] + D.to(dtype)[:, None] * inputs  # b l h p
    return y.to(x.dtype)


class _Decay(torch.autograd.Function):
    """exp(entry_t - entry_s) for s up to t, else 0: `[..., q]` -> `[..., q, q]`.

    In place, with few passes: this matrix is most of what a CPU moves.
    """

    @staticmethod
    def forward(ctx: Any, entry: Tensor) -> Tensor:
        decay = entry[..., :, None] - entry[..., None, :]
        decay.clamp_(LOG_DECAY_FLOOR, 0.0).exp_().tril_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (decay,) = ctx.saved_tensors
        flow = grad * decay
        return flow.sum(-1) - flow.sum(-2)


def _decay(log_decay: Tensor) -> Tensor:
    return log_decay.clamp(min=LOG_DECAY_FLOOR).exp()


def _pass_states(left: Tensor, decay: Tensor, headdim: int) -> Tensor:
    """State at the entry of every chunk from what each chunk adds. b c hp n, b c h -> b c hp n"""
    decay = decay.repeat_interleave(headdim, dim=2)[..., None]  # b c hp 1
    state = torch.zeros_like(left[:, 0])  # b hp n
    entering: list[Tensor] = []
    for i in range(left.shape[1]):
        entering.append(state)
        state = decay[:, i] * state + left[:, i]
    return torch.stack(entering, dim=1)
