"""The selective scan as its recurrence, one step at a time: the reference for every other form."""

from __future__ import annotations

import torch
from torch import Tensor


def sequential_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), the recurrence:

        state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t        state_0 = 0
        y_t     = C_t state_t + D x_t

    Shapes as in `models.scan.selective_scan`. The state is float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
    decay = torch.exp(dt * A.to(dtype)).unbind(1)  # l times b h
    scaled = (inputs * dt[..., None]).unbind(1)  # l times b h p
    writes, reads = B.unbind(1), C.unbind(1)  # l times b n
    batch, length, heads, headdim = x.shape
    state = inputs.new_zeros(batch, heads, headdim, B.shape[-1])  # b h p n
    outputs: list[Tensor] = []
    for t in range(length):
        update = scaled[t][..., None] * writes[t][:, None, None]  # b h p n
        state = decay[t][..., None, None] * state + update  # b h p n
        outputs.append((state @ reads[t][:, None, :, None]).squeeze(-1))  # b h p
    y = torch.stack(outputs, dim=1) + D.to(dtype)[:, None] * inputs  # b l h p
    return y.to(x.dtype)
