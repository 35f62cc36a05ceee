"""A whole bidirectional block on Triton, which keeps little and recomputes.

Between the passes it keeps the block's input and the scan's output: 2 (d_model + 2 d_inner) bytes a
token in bfloat16, where the input projection alone is 2 (4 d_inner + 4 n + 2 h). The backward pass
computes the projection, the convolution and the states again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan.triton_mixer import (
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    scan_backward,
    scan_forward,
)
from models.scan.triton_plan import MixerParameters, Plan, make_plan

EPS = 1e-5


def mamba2_block(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    skip: Tensor,
    bias: Tensor,
    params: MixerParameters,
    axis: str,
    allow_tf32: bool = False,
) -> Tensor:
    """x + x skip + bias + mixers(norm(x) w_in^T) w_out, both directions in one.

    Args:
        x: `[b, t, k, d_model]` in float32, bfloat16 or float16; so are the weights.
        w_in: `[2 (2 d_inner + 2 n + h), d_model]`, the pre-norms' weights folded in.
        w_out: `[2 d_inner, d_model]`: the gated norms' weights, output projections and merge.
        skip: `[d_model, d_model]`, what the merge does to the directions' own residuals.
        bias: `[d_model]`.
        params: both directions' parameters, as for `mixer_core`.
        axis: "time" or "band".
        allow_tf32: let float32 products of the scan run as TF32.

    Returns:
        `[b, t, k, d_model]` in x's dtype.

    Raises:
        TypeError, ValueError: as for `mixer_core`.
    """
    arguments = (x.contiguous(), w_in, w_out, skip, bias, *params.floats())
    if torch.is_grad_enabled():
        return _Block.apply(*arguments, axis, allow_tf32)
    out, _, _ = _forward(arguments, axis, allow_tf32, keep=False)
    return out


def _project(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised input `[b, t, k, d]`, and z, xBC and dt `[b, t, k, 2, w]`."""
    normal = norm_forward(x, EPS)
    # The product in the weights' type, whatever autocast says.
    with torch.autocast(x.device.type, enabled=False):
        return normal, F.linear(normal, w_in).unflatten(-1, (2, -1))


def _forward(
    arguments: tuple[Tensor, ...], axis: str, allow_tf32: bool, keep: bool
) -> tuple[Tensor, Tensor, Plan]:
    """The output, the scan's output y, which is overwritten unless it is to be kept, and the plan.

    The projection is dropped here; a block with memory to spare could keep it for its backward
    pass, which then starts after `_project`.
    """
    x, w_in, w_out, skip, bias, *tensors = arguments
    params = MixerParameters(*tensors)
    _, proj = _project(x, w_in)
    plan = make_plan(proj, params, axis, allow_tf32, None)
    y = scan_forward(proj, params, plan)
    normal = gate_forward(proj, y, torch.empty_like(y) if keep else y, EPS)
    del proj
    with torch.autocast(x.device.type, enabled=False):
        out = x + bias  # b t k d
        rows = out.flatten(0, 2)
        rows.addmm_(x.flatten(0, 2), skip)
        rows.addmm_(normal.view(len(rows), -1), w_out)
    return out, y, plan


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arguments, axis, allow_tf32 = args
        out, y, ctx.plan = _forward(tuple(arguments), axis, allow_tf32, keep=True)
        ctx.save_for_backward(*arguments, y)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, skip, _, *tensors, y = ctx.saved_tensors
        normal, proj = _project(x, w_in)
        dproj = torch.empty_like(proj)
        rows = dout.to(x.dtype).contiguous().view(-1, x.shape[-1])  # btk d
        flat = x.view_as(rows)
        dmixed = (rows @ w_out.T).view_as(y)  # b t k 2 i; its gradient once the gate is passed
        mixed = gate_backward(proj, y, dmixed, dproj, EPS)
        dw_out = mixed.view(len(rows), -1).T @ rows
        del mixed
        grads = scan_backward(dmixed, proj, MixerParameters(*tensors), dproj, ctx.plan)
        del proj, dmixed
        drows = dproj.view(len(rows), -1)  # btk 2w
        dw_in = drows.T @ normal.view_as(rows)
        dx = torch.addmm(rows, rows, skip.T)
        norm_backward(flat, drows @ w_in, dx, EPS)
        dskip, dbias = flat.T @ rows, rows.sum(dim=0)
        return dx.view_as(x), dw_in, dw_out, dskip, dbias, *grads, None, None
