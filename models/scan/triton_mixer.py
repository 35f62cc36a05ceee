"""Both directions of a Mamba-2 block after its input projection, on Triton.

`prepare` and `mixer_forward` take the input projection to the output projection's input,
`output_forward` that to the block's output; `gate_backward` and `scan_backward` take the gradient
back. Between them only the scan's output y is kept, beside the projection and what `prepare` makes
of it, which the caller keeps or computes again.
`mixer_core` is all between the projections as one differentiable function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from models.scan import triton_backward as backward_kernels
from models.scan import triton_conv as conv_kernels
from models.scan import triton_forward as forward_kernels
from models.scan import triton_rows as row_kernels
from models.scan.triton_plan import (
    SCAN_SIZES,
    Gpu,
    KernelConfig,
    Launch,
    MixerParameters,
    Plan,
    make_plan,
)

# Steps and channels that a program of the convolution walks, and how many loads run ahead.
CONV_PIECE, CONV_CHANNELS, CONV_AHEAD = 128, 512, 4
# Partial sums of the convolution's gradient: enough programs to fill a GPU, few enough to add up.
CONV_PARTS = 512
# Tokens of a tile of the output projection, which is as wide as the model, and its inner step.
OUTPUT_TOKENS, OUTPUT_STEP = 128, 64
# Elements of a row-wise program.
ROW_TILE = 1024


class Scan(NamedTuple):
    """What the kernels after the first ones read."""

    xbc: Tensor  # b t k 2 (d_inner + 2 n): x, B, C after convolution and SiLU
    dt: Tensor  # s 2 h l, padded to whole chunks
    decay: Tensor  # s 2 h l, base 2


def _float_empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def prepare(proj: Tensor, params: MixerParameters, plan: Plan) -> Scan:
    """The convolution, and dt with its cumulative decay."""
    with torch.cuda.device_of(proj):
        xbc = proj.new_empty(*proj.shape[:-1], plan.d_xbc)
        pieces = triton.cdiv(plan.length, CONV_PIECE)
        blocks = triton.cdiv(plan.d_xbc, CONV_CHANNELS)
        conv_kernels.conv_forward[(plan.sequences * 2 * pieces * blocks,)](
            *(proj, params.conv_weight, params.conv_bias, xbc),
            *(*plan.geometry[:-1], pieces),
            **plan.sizes("W", "D_INNER", "D_XBC", "D_CONV"),
            **{"Q": CONV_PIECE, "BLOCK_C": CONV_CHANNELS, "STAGES": CONV_AHEAD},
        )
        dt = _float_empty(proj, plan.sequences, 2, plan.nheads, plan.chunks * plan.config.chunk)
        decay = torch.empty_like(dt)
        forward_kernels.dt_forward[(plan.programs,)](
            *(proj, params.dt_bias, params.A_log, dt, decay),
            *plan.geometry,
            **plan.sizes("W", "H", "Q", "BLOCK_H"),
        )
        return Scan(xbc, dt, decay)


def _states(scan: Scan, plan: Plan) -> Tensor:
    """The state that each chunk but the first starts from `[s 2 (chunks - 1) tiles, n, p]`."""
    slots = plan.sequences * 2 * (plan.chunks - 1) * plan.tiles
    states = scan.xbc.new_empty(slots, plan.block_n, plan.block_p)
    if plan.several:
        forward_kernels.state_forward[(plan.sequences * 2 * plan.tiles,)](
            *(*scan, states),
            *plan.geometry,
            **plan.sizes(*SCAN_SIZES),
            **plan.config.state_forward.options(),
        )
    return states


def mixer_forward(
    proj: Tensor,
    scan: Scan,
    params: MixerParameters,
    plan: Plan,
    eps: float,
    y: Tensor | None = None,
) -> Tensor:
    """The output projection's input `[b, t, k, 2, d_inner]`.

    y: receives the scan's output, D x included, before the gate; the same shape.
    """
    with torch.cuda.device_of(proj):
        normal = proj.new_empty(*proj.shape[:-1], plan.d_inner)
        y = normal if y is None else y
        if plan.several:
            kernel, launch = forward_kernels.sweep_forward, plan.config.sweep_forward
            programs = plan.sequences * 2 * plan.tiles
        else:
            kernel, launch = forward_kernels.chunk_forward, plan.config.chunk_forward
            programs = plan.programs
        kernel[(programs,)](
            *(scan.xbc, params.D, scan.dt, scan.decay, y),
            *plan.geometry,
            **plan.sizes(*SCAN_SIZES),
            **launch.options(),
        )
        return _gate_forward(proj, y, normal, eps)


def output_launch(shared_bytes: int, width: int) -> Launch:
    """As many stages as fit into a multiprocessor's shared memory: 4 on an H100, 2 on an RTX."""
    stage = 2 * OUTPUT_STEP * (OUTPUT_TOKENS + width)  # bytes of a tile of either factor
    return Launch(8, min(4, max(1, shared_bytes // stage)))


def output_forward(
    x: Tensor, normal: Tensor, w_out: Tensor, skip: Tensor, bias: Tensor, out: Tensor
) -> None:
    """Write x + x skip + bias + normal w_out into out `[b, t, k, d]`; normal `[b, t, k, 2, i]`."""
    width, mixed = x.shape[-1], len(w_out)
    tokens = x.numel() // width
    if x.dtype == torch.float32:  # no tensor cores: cuBLAS is the faster one
        rows = out.view(tokens, width)
        torch.addmm(bias, x.view(tokens, width), skip, out=rows)
        rows.add_(x.view(tokens, width)).addmm_(normal.view(tokens, mixed), w_out)
        return
    block_d = min(256, max(16, triton.next_power_of_2(width)))
    with torch.cuda.device_of(x):
        forward_kernels.output_forward[
            triton.cdiv(tokens, OUTPUT_TOKENS), triton.cdiv(width, block_d)
        ](
            *(x, normal, w_out, skip, bias, out, tokens),
            **{"D_MODEL": width, "D_MIXED": mixed},
            **{"BLOCK_T": OUTPUT_TOKENS, "BLOCK_D": block_d, "BLOCK_I": OUTPUT_STEP},
            **output_launch(Gpu.of(x.device).shared_bytes, block_d).options(),
        )


def scan_backward(
    dy: Tensor, proj: Tensor, scan: Scan, params: MixerParameters, dproj: Tensor, plan: Plan
) -> MixerParameters:
    """Write the gradients of xBC and dt into dproj; return those of the parameters.

    scan.xbc is overwritten.
    """
    with torch.cuda.device_of(proj):
        states = _states(scan, plan)
        shape = (plan.sequences, 2, plan.tiles, plan.chunks * plan.config.chunk)
        query, key, pair = _float_empty(proj, 3, *shape)
        read, written, kept, dbc = _state_backward(scan, states, dy, dproj, plan, shape)
        own = _float_empty(proj, plan.programs, plan.config.chunk)
        backward_kernels.chunk_backward[(plan.programs,)](
            *(scan.xbc, params.D, scan.dt, scan.decay, dy, dbc),
            *(dproj, query, key, pair, own),
            *plan.geometry,
            **plan.sizes("W", *SCAN_SIZES, "HAS_STATE"),
            **plan.config.chunk_backward.options(),
        )
        partial = _float_empty(proj, plan.sequences, 2, plan.chunks, 3, plan.nheads)
        backward_kernels.dt_backward[(plan.programs,)](
            *(proj, params.dt_bias, params.A_log, scan.dt, query, key, pair, own),
            *(read, written, kept, dproj, partial),
            *plan.geometry,
            **plan.sizes("W", "H", "SPLITS", "Q", "BLOCK_H", "HAS_STATE"),
        )
        ddt_bias, dA_log, dD = partial.sum(dim=(0, 2)).unbind(dim=1)
        taps = _conv_backward(proj, params, scan.xbc, dproj, plan)
        return MixerParameters(*taps, ddt_bias, dA_log, dD)


def _state_backward(
    scan: Scan, states: Tensor, dy: Tensor, dproj: Tensor, plan: Plan, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms that pass through the states: `read`, `written`, `kept`, and those of B and C.

    That of x goes into dproj. The states' gradients replace the states.
    """
    xbc, dt, decay = scan
    several = int(plan.several)
    read, written = _float_empty(xbc, 2, several * shape[0], *shape[1:])
    kept = _float_empty(xbc, states.shape[0])
    dbc = _float_empty(xbc, several * xbc.shape[0], *xbc.shape[1:-1], 2 * plan.d_state)
    if plan.several:
        programs = plan.sequences * 2 * (plan.chunks - 1)
        backward_kernels.state_query[(programs,)](
            *(xbc, decay, states, dy, read, dbc),
            *plan.geometry,
            **plan.sizes(*SCAN_SIZES),
            **plan.config.state_query.options(),
        )
        backward_kernels.state_backward[(plan.sequences * 2 * plan.tiles,)](
            *(xbc, decay, dy, states, kept),
            *plan.geometry,
            **plan.sizes(*SCAN_SIZES),
            **plan.config.state_backward.options(),
        )
        backward_kernels.state_key[(programs,)](
            *(xbc, dt, decay, states, written, dbc, dproj),
            *plan.geometry,
            **plan.sizes("W", *SCAN_SIZES),
            **plan.config.state_key.options(),
        )
    return read, written, kept, dbc


def _conv_backward(
    proj: Tensor, params: MixerParameters, dxbc: Tensor, dproj: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Write the gradient of xBC into dproj, from that of x, B, C; return those of taps and bias."""
    pieces = triton.cdiv(plan.length, CONV_PIECE)
    span = triton.cdiv(plan.sequences * pieces, CONV_PARTS)
    parts = triton.cdiv(plan.sequences * pieces, span)
    partial = _float_empty(proj, parts, 2, 5, plan.d_xbc)
    conv_kernels.conv_backward[(parts * 2 * triton.cdiv(plan.d_xbc, CONV_CHANNELS),)](
        *(proj, params.conv_weight, params.conv_bias, dxbc, dproj, partial),
        *(*plan.geometry[:-1], pieces, plan.sequences, span),
        **plan.sizes("W", "D_INNER", "D_XBC", "D_CONV"),
        **{"Q": CONV_PIECE, "BLOCK_C": CONV_CHANNELS, "STAGES": CONV_AHEAD},
    )
    total = partial.sum(dim=0)
    return total[:, 1 : 1 + plan.d_conv].flip(1), total[:, 0]


def _row_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"D": width, "R": max(1, ROW_TILE // block), "BLOCK_D": block}


def _row_grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _row_sizes(width)["R"]),)


def _gate_forward(proj: Tensor, y: Tensor, out: Tensor, eps: float) -> Tensor:
    """Write y silu(z) over its root mean square into out, which may be y; return out."""
    width = y.shape[-1]
    rows = y.numel() // width
    row_kernels.gate_forward[_row_grid(rows, width)](
        *(proj, y, out, rows, eps), W=proj.shape[-1], **_row_sizes(width)
    )
    return out


def gate_backward(proj: Tensor, y: Tensor, dout: Tensor, dproj: Tensor, eps: float) -> Tensor:
    """Replace dout by the gradient of y, write that of z into dproj; return the gate's output."""
    normal, width = torch.empty_like(y), y.shape[-1]
    rows = y.numel() // width
    with torch.cuda.device_of(y):
        row_kernels.gate_backward[_row_grid(rows, width)](
            *(proj, y, dout, normal, dproj, rows, eps), W=proj.shape[-1], **_row_sizes(width)
        )
    return normal


def norm_forward(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, in x's dtype."""
    normal, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    with torch.cuda.device_of(x):
        row_kernels.norm_forward[_row_grid(rows, width)](
            *(x, normal, rows, eps), **_row_sizes(width)
        )
    return normal


def norm_backward(x: Tensor, dnormal: Tensor, dx: Tensor, eps: float) -> None:
    """Add the gradient of x to dx."""
    width = x.shape[-1]
    rows = x.numel() // width
    with torch.cuda.device_of(x):
        row_kernels.norm_backward[_row_grid(rows, width)](
            *(x, dnormal, dx, rows, eps), **_row_sizes(width)
        )


class _MixerCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proj: Tensor, *args: Any) -> Tensor:
        *tensors, axis, eps, allow_tf32, config = args
        params = MixerParameters(*tensors)
        ctx.plan, ctx.eps = make_plan(proj, params, axis, allow_tf32, config), eps
        y = proj.new_empty(*proj.shape[:-1], ctx.plan.d_inner)
        ctx.save_for_backward(proj, *params, y)
        scan = prepare(proj, params, ctx.plan)
        return mixer_forward(proj, scan, params, ctx.plan, eps, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        proj, *tensors, y = ctx.saved_tensors
        dproj = torch.empty_like(proj)
        dy = dout.to(proj.dtype, memory_format=torch.contiguous_format, copy=True)
        gate_backward(proj, y, dy, dproj, ctx.eps)
        params = MixerParameters(*tensors)
        scan = prepare(proj, params, ctx.plan)
        grads = scan_backward(dy, proj, scan, params, dproj, ctx.plan)
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
    return _MixerCore.apply(proj, *params.floats(), axis, eps, allow_tf32, config)
