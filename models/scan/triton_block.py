"""A whole bidirectional block on Triton, which keeps little and recomputes.

Between the passes it keeps the block's input and the scan's output: 2 (d_model + 2 d_inner) bytes a
token in bfloat16, where the input projection alone is 2 (4 d_inner + 4 n + 2 h). The backward pass
computes the projection, the convolution and the states again, or finds the first two where the
forward pass was asked to keep its work. Both passes take a large batch part by part, since what
they work with is several times what is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mamba2 import NORM_EPS
from models.scan.triton_mixer import (
    Scan,
    gate_backward,
    mixer_forward,
    norm_backward,
    norm_forward,
    output_forward,
    prepare,
    scan_backward,
)
from models.scan.triton_plan import MixerParameters, Plan, make_plan

# Tokens worked on at once: all up to six clips of 8 s, of more clips three. A part of three is 2 %
# slower than the whole, and leaves room for batches that would not fit otherwise.
WHOLE_TOKENS, PART_TOKENS = 300_000, 150_000


def mamba2_block(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    skip: Tensor,
    bias: Tensor,
    params: MixerParameters,
    axis: str,
    allow_tf32: bool = False,
    keeps_work: bool = False,
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
        keeps_work: keep what the first backward pass would compute again, unless the batch is taken
            in parts.

    Returns:
        `[b, t, k, d_model]` in x's dtype.

    Raises:
        TypeError, ValueError: as for `mixer_core`.
    """
    arguments = (x.contiguous(), w_in, w_out, skip, bias, *params.floats())
    if torch.is_grad_enabled():
        return _Block.apply(*arguments, axis, allow_tf32, keeps_work)
    return _forward(arguments, axis, allow_tf32)


class _Work(NamedTuple):
    """What both passes begin with."""

    normal: Tensor  # b t k d: the normalised input
    proj: Tensor  # b t k 2 w: z, xBC and dt
    plan: Plan
    scan: Scan


def _start(x: Tensor, w_in: Tensor, params: MixerParameters, axis: str, allow_tf32: bool) -> _Work:
    normal = norm_forward(x, NORM_EPS)
    # The product in the weights' type, whatever autocast says.
    with torch.autocast(x.device.type, enabled=False):
        proj = F.linear(normal, w_in).unflatten(-1, (2, -1))
    plan = make_plan(proj, params, axis, allow_tf32, None)
    return _Work(normal, proj, plan, prepare(proj, params, plan))


def _slices(x: Tensor) -> list[slice]:
    """Parts of the batch that are worked on at once."""
    tokens = x[0, ..., 0].numel()
    clips = len(x) if len(x) * tokens <= WHOLE_TOKENS else max(1, PART_TOKENS // tokens)
    return [slice(start, start + clips) for start in range(0, len(x), clips)]


def _forward(
    arguments: tuple[Tensor, ...],
    axis: str,
    allow_tf32: bool,
    y: Tensor | None = None,
    works: list[_Work] | None = None,
) -> Tensor:
    """The output; y receives the scan's output, `works` what the backward pass begins with."""
    x, w_in, w_out, skip, bias, *tensors = arguments
    params, out = MixerParameters(*tensors), torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False):
        for part in _slices(x):
            work = _start(x[part], w_in, params, axis, allow_tf32)
            kept = None if y is None else y[part]
            normal = mixer_forward(work.proj, work.scan, params, work.plan, NORM_EPS, kept)
            if works is not None:
                works.append(work)
            del work  # before the next part's, which is as large
            output_forward(x[part], normal, w_out, skip, bias, out[part])
    return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arguments, ctx.axis, ctx.allow_tf32, keeps_work = args
        x, _, w_out = arguments[:3]
        y = x.new_empty(*x.shape[:-1], 2, len(w_out) // 2)
        ctx.works = []  # used up by the first backward pass; another one makes its own
        works = ctx.works if keeps_work and len(_slices(x)) == 1 else None
        out = _forward(tuple(arguments), ctx.axis, ctx.allow_tf32, y, works)
        ctx.save_for_backward(*arguments, y)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *arguments, y = ctx.saved_tensors
        dout = dout.to(x.dtype).contiguous()
        dx = torch.empty_like(x)
        totals: list[Tensor] = []
        for part in _slices(x):
            gradients = _backward(ctx, dout[part], x[part], arguments, y[part], dx[part])
            # In float32: a sum of bfloat16 numbers would lose more with every part.
            floats = [gradient.float() for gradient in gradients]
            totals = [a + b for a, b in zip(totals, floats, strict=True)] if totals else floats
        weights = [total.to(x.dtype) for total in totals[:4]]
        return dx, *weights, *totals[4:], None, None, None


def _backward(
    ctx: Any, dout: Tensor, x: Tensor, arguments: list[Tensor], y: Tensor, dx: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a part: that of x into dx; those of all other arguments are returned."""
    w_in, w_out, skip, _, *tensors = arguments
    params = MixerParameters(*tensors)
    kept = ctx.works.pop() if ctx.works else None
    normal, proj, plan, scan = kept or _start(x, w_in, params, ctx.axis, ctx.allow_tf32)
    del kept  # with it, the last name but these
    dproj = torch.empty_like(proj)
    rows = dout.view(-1, x.shape[-1])  # btk d
    flat, dflat = x.view_as(rows), dx.view_as(rows)
    dmixed = (rows @ w_out.T).view_as(y)  # b t k 2 i; its gradient once the gate is passed
    mixed = gate_backward(proj, y, dmixed, dproj, NORM_EPS)
    dw_out = mixed.view(len(rows), -1).T @ rows
    del mixed
    grads = scan_backward(dmixed, proj, scan, params, dproj, plan)
    del proj, dmixed, scan
    drows = dproj.view(len(rows), -1)  # btk 2w
    dw_in = drows.T @ normal.view_as(rows)
    torch.addmm(rows, rows, skip.T, out=dflat)
    norm_backward(flat, drows @ w_in, dflat, NORM_EPS)
    dskip, dbias = flat.T @ rows, rows.sum(dim=0)
    return dw_in, dw_out, dskip, dbias, *grads
