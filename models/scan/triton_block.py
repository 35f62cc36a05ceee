"""A bidirectional block up to its output projection on Triton, which keeps little and recomputes.

Between the passes it keeps the block's input and the mixers' output, which the output projection
keeps anyway: 2 (d_model + 2 d_inner) bytes a token in bfloat16, where the input projection alone
is 2 (4 d_inner + 4 n + 2 h). The backward pass computes the projection again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan.triton_mixer import mixer_backward, mixer_forward, norm_backward, norm_forward
from models.scan.triton_plan import MixerParameters

EPS = 1e-5


def project_and_mix(
    x: Tensor, weight: Tensor, params: MixerParameters, axis: str, allow_tf32: bool
) -> Tensor:
    """RMS norm, the input projection of both directions, and `mixer_core`.

    Args:
        x: `[b, t, k, d_model]` in float32, bfloat16 or float16.
        weight: `[2 (2 d_inner + 2 n + h), d_model]` in x's dtype, the norms' weights folded in.
        params: as for `mixer_core`.
        axis: "time" or "band".
        allow_tf32: let float32 products of the scan run as TF32.

    Returns:
        `[b, t, k, 2 d_inner]` in x's dtype; the gated norms' weights are left to the caller.
    """
    floats = (tensor.float().contiguous() for tensor in params)
    return _ProjectAndMix.apply(x, weight, *floats, axis, allow_tf32)


class _ProjectAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        *tensors, axis, allow_tf32 = args
        normal, _ = norm_forward(x, EPS)
        proj = F.linear(normal, weight).unflatten(-1, (2, -1))  # b t k 2 w
        out, rstd = mixer_forward(proj, MixerParameters(*tensors), axis, EPS, allow_tf32)
        ctx.save_for_backward(x, weight, *tensors, out, rstd)
        ctx.options = axis, allow_tf32
        return out.flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors, out, rstd = ctx.saved_tensors
        normal, normal_rstd = norm_forward(x, EPS)
        proj = F.linear(normal, weight).unflatten(-1, (2, -1))  # b t k 2 w
        params = MixerParameters(*tensors)
        dout = dout.unflatten(-1, (2, -1))
        dproj, grads = mixer_backward(dout, proj, params, out, rstd, *ctx.options)
        del proj
        rows = dproj.flatten(0, 2).flatten(1)  # btk 2w
        dweight = rows.T @ normal.flatten(0, 2)
        dnormal = rows @ weight  # btk d
        dx = torch.empty_like(normal)
        norm_backward(dnormal, normal, normal_rstd, dx)
        return dx, dweight, *grads, None, None
