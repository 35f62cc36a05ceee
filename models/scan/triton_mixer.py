"""The bidirectional mixer core on Triton: everything of Mamba-2 between its two projections.

`mixer_core` is differentiable; `mixer_forward` and `mixer_backward` are its halves, for a caller
that computes the projections again in its own backward pass. Nothing but `proj`, the output and one
float per row is kept between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from models.scan import triton_backward as backward_kernels
from models.scan import triton_forward as forward_kernels
from models.scan.triton_plan import STATE_SIZES, KernelConfig, MixerParameters, Plan, make_plan

# Partial sums of the convolution's gradient: enough programs to fill a GPU, few enough to add up.
CONV_PARTS = 256
# Steps and channels of a convolution tile, rows of a norm tile.
CONV_TILE = (16, 128)
NORM_ROWS = 4


class _Scan(NamedTuple):
    """What the kernels after the first ones read; `states` is empty for a single chunk."""

    pre: Tensor  # b t k 2 (d_inner + 2 n), xBC after its convolution, before its SiLU
    bc: Tensor  # b t k 2 (2 n), B and C after it
    dt: Tensor  # s 2 h l, padded to whole chunks
    decay: Tensor  # s 2 h l
    states: Tensor  # s 2 (chunks - 1) tiles n p


def _float_empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def _prepare(proj: Tensor, params: MixerParameters, plan: Plan) -> _Scan:
    """The convolution, dt and its cumulative decay, and the state that each chunk starts from."""
    steps, channels = CONV_TILE
    pre = proj.new_empty(*proj.shape[:-1], plan.d_xbc)
    bc = proj.new_empty(*proj.shape[:-1], 2 * plan.d_state)
    pieces = triton.cdiv(plan.length, steps)
    blocks = triton.cdiv(plan.d_xbc, channels)
    forward_kernels.conv_forward[(plan.sequences * 2 * pieces * blocks,)](
        *(proj, params.conv_weight, params.conv_bias, pre, bc),
        *(*plan.geometry[:-1], pieces),
        **plan.sizes("W", "D_INNER", "D_XBC", "D_CONV"),
        **{"Q": steps, "BLOCK_C": channels},
    )
    dt = _float_empty(proj, plan.sequences, 2, plan.nheads, plan.chunks * plan.config.chunk)
    decay = torch.empty_like(dt)
    forward_kernels.dt_forward[(plan.programs,)](
        *(proj, params.dt_bias, params.A_log, dt, decay),
        *plan.geometry,
        **plan.sizes("W", "H", "Q", "BLOCK_H"),
    )
    slots = plan.sequences * 2 * (plan.chunks - 1) * plan.tiles
    states = proj.new_empty(slots, plan.block_n, plan.block_p)
    if plan.several:
        forward_kernels.state_forward[(plan.sequences * 2 * plan.tiles,)](
            *(pre, bc, dt, decay, states),
            *plan.geometry,
            **plan.sizes(*STATE_SIZES),
            **plan.config.state_forward.options(),
        )
    return _Scan(pre, bc, dt, decay, states)


def mixer_forward(
    proj: Tensor,
    params: MixerParameters,
    axis: str,
    eps: float = 1e-5,
    allow_tf32: bool = False,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the normalised output [b, t, k, 2, d_inner] and its 1 / rms, float32 [b, t, k, 2]."""
    plan = make_plan(proj, params, axis, allow_tf32, config)
    with torch.cuda.device_of(proj):
        scan = _prepare(proj, params, plan)
        out = proj.new_empty(*proj.shape[:-1], plan.d_inner)
        rstd = _float_empty(proj, *proj.shape[:-1])
        forward_kernels.chunk_forward[(plan.programs,)](
            *(proj, params.D, *scan, out, rstd),
            *(*plan.geometry, eps),
            **plan.sizes(),
            **plan.config.chunk_forward.options(),
        )
    return out, rstd


def mixer_backward(
    dout: Tensor,
    proj: Tensor,
    params: MixerParameters,
    out: Tensor,
    rstd: Tensor,
    axis: str,
    allow_tf32: bool = False,
    config: KernelConfig | None = None,
) -> tuple[Tensor, MixerParameters]:
    """Gradients of proj and the parameters, from the output's and what `mixer_forward` returned."""
    plan = make_plan(proj, params, axis, allow_tf32, config)
    dout = dout.to(proj.dtype).contiguous()
    with torch.cuda.device_of(proj):
        scan = _prepare(proj, params, plan)
        dproj = torch.empty_like(proj)
        # dv waits where `_conv_backward` will write the gradient of x.
        norm_backward(dout, out, rstd, dproj[..., plan.d_inner : 2 * plan.d_inner])
        dxbc, dt_grads, dD = _scan_backward(proj, params, scan, dproj, plan)
        ddt_bias, dA_log = _dt_backward(proj, params, scan.dt, dt_grads, dproj, plan)
        dweight, dbias = _conv_backward(proj, params, dxbc, dproj, plan)
    return dproj, MixerParameters(dweight, dbias, ddt_bias, dA_log, dD)


def norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) over the last axis, in x's dtype, and 1 / rms(x) in float32."""
    x = x.contiguous()
    normal, rstd = torch.empty_like(x), _float_empty(x, *x.shape[:-1])
    rows, width = rstd.numel(), x.shape[-1]
    with torch.cuda.device_of(x):
        forward_kernels.norm_forward[(triton.cdiv(rows, NORM_ROWS),)](
            *(x, normal, rstd, rows, eps),
            **{"D": width, "R": NORM_ROWS, "BLOCK_D": triton.next_power_of_2(width)},
        )
    return normal, rstd


def norm_backward(dnormal: Tensor, normal: Tensor, rstd: Tensor, dx: Tensor) -> None:
    """Write the gradient of x into dx, whose rows may be apart; arguments as of `norm_forward`."""
    width = normal.shape[-1]
    with torch.cuda.device_of(normal):
        backward_kernels.norm_backward[(triton.cdiv(rstd.numel(), NORM_ROWS),)](
            *(dnormal, normal, rstd, dx, rstd.numel()),
            **{"W": dx.stride(-2), "D": width, "R": NORM_ROWS},
            BLOCK_D=triton.next_power_of_2(width),
        )


def _scan_backward(
    proj: Tensor, params: MixerParameters, scan: _Scan, dproj: Tensor, plan: Plan
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Write dz into dproj; return dxBC before its SiLU, what `_dt_backward` adds up, and dD.

    dxBC overwrites `scan.pre`, and the states' gradients the states once nothing reads them.
    """
    pre, bc, dt, decay, states = scan
    length = plan.chunks * plan.config.chunk
    ddt, da_query, da_key = _float_empty(proj, 3, plan.sequences, 2, plan.tiles, length)
    dskip = _float_empty(proj, plan.sequences, 2, plan.chunks, plan.nheads, plan.splits)
    kept = _float_empty(proj, states.shape[0])
    backward_kernels.query_backward[(plan.programs,)](
        *(proj, params.D, pre, bc, dt, decay, states, dproj, da_query, dskip),
        *plan.geometry,
        **plan.sizes(),
        **plan.config.query_backward.options(),
    )
    if plan.several:
        backward_kernels.state_backward[(plan.sequences * 2 * plan.tiles,)](
            *(proj, bc, decay, states, dproj, kept),
            *plan.geometry,
            **plan.sizes("W", *STATE_SIZES),
            **plan.config.state_backward.options(),
        )
    backward_kernels.key_backward[(plan.programs,)](
        *(proj, params.D, pre, bc, dt, decay, states, dproj, ddt, da_key),
        *plan.geometry,
        **plan.sizes(),
        **plan.config.key_backward.options(),
    )
    return pre, (ddt, da_query, da_key, kept), dskip.sum(dim=(0, 2, 4))


def _dt_backward(
    proj: Tensor,
    params: MixerParameters,
    dt: Tensor,
    dt_grads: tuple[Tensor, ...],
    dproj: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Write the raw dt's gradient into dproj; return the gradients of dt_bias and A_log."""
    partial = _float_empty(proj, plan.sequences, 2, plan.chunks, 2, plan.nheads)
    backward_kernels.dt_backward[(plan.programs,)](
        *(proj, params.dt_bias, params.A_log, dt, *dt_grads, dproj, partial),
        *plan.geometry,
        **plan.sizes("W", "H", "SPLITS", "Q", "BLOCK_H", "HAS_STATE"),
    )
    ddt_bias, dA_log = partial.sum(dim=(0, 2)).unbind(dim=1)
    return ddt_bias, dA_log


def _conv_backward(
    proj: Tensor, params: MixerParameters, dxbc: Tensor, dproj: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the raw xBC into dproj; return those of the taps and the bias."""
    steps, channels = CONV_TILE
    span = triton.cdiv(plan.sequences, CONV_PARTS)
    parts = triton.cdiv(plan.sequences, span)
    partial = _float_empty(proj, parts, 2, plan.d_conv + 1, plan.d_xbc)
    backward_kernels.conv_backward[(parts * 2 * triton.cdiv(plan.d_xbc, channels),)](
        *(proj, params.conv_weight, dxbc, dproj, partial),
        *(*plan.geometry[:-1], plan.sequences, span),
        **plan.sizes("W", "D_INNER", "D_XBC", "D_CONV"),
        **{"Q": steps, "BLOCK_C": channels},
    )
    total = partial.sum(dim=0)
    return total[:, 1:].flip(1), total[:, 0]


class _MixerCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proj: Tensor, *args: Any) -> Tensor:
        *tensors, axis, eps, allow_tf32, config = args
        params = MixerParameters(*tensors)
        out, rstd = mixer_forward(proj, params, axis, eps, allow_tf32, config)
        ctx.save_for_backward(proj, *params, out, rstd)
        ctx.options = axis, allow_tf32, config
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        proj, *tensors, out, rstd = ctx.saved_tensors
        dproj, grads = mixer_backward(
            dout, proj, MixerParameters(*tensors), out, rstd, *ctx.options
        )
        return dproj, *grads, None, None, None, None


def mixer_core(
    proj: Tensor,
    params: MixerParameters,
    axis: str,
    eps: float = 1e-5,
    allow_tf32: bool = False,
    config: KernelConfig | None = None,
) -> Tensor:
    """Convolution, selective scan, gate and RMS norm of both directions of a Mamba-2 block.

    Args:
        proj: contiguous [b, t, k, 2, 2 d_inner + 2 n + h] in float32, bfloat16 or float16: for each
            direction [z | xBC | dt], from one input projection. The backward direction is read
            from the end of its axis; nothing needs to be flipped.
        params: both directions' parameters; cast to float32 here.
        axis: "time" scans over t for every band, "band" over k for every frame.
        eps: added to the mean square in the norm.
        allow_tf32: let float32 products run as TF32 on the tensor cores.
        config: overrides the tile length and launch sizes.

    Returns:
        [b, t, k, 2, d_inner] in proj's dtype, normalised but without the norm's weight, which the
        output projection can absorb.

    Raises:
        TypeError: proj has another dtype, such as float64.
        ValueError: a shape or the axis is not as above.
    """
    floats = MixerParameters(*(tensor.float().contiguous() for tensor in params))
    return _MixerCore.apply(proj, *floats, axis, eps, allow_tf32, config)
