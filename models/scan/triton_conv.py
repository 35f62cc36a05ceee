"""The causal depthwise convolution of x, B, C with its SiLU, forward and backward, on Triton.

    xBC_i' = silu(bias + sum_{j < d_conv} w_j xBC_{i - j})             w_0: the tap of step i itself
A program walks the steps of a piece with the last values in registers, so that each element is read
and converted once. The backward direction of the block walks its rows from the end.

Memory per row, in elements:
    conv_forward    reads d_inner + 2 n          writes d_inner + 2 n
    conv_backward   reads 2 (d_inner + 2 n)      writes d_inner + 2 n
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.scan.triton_rows import RUNTIME, locate

# Signatures keep pointers, geometry, model constants and tile sizes on lines of their own.
# fmt: off


@triton.jit
def load_taps(
    weight_ptr, bias_ptr, direction, channel, valid, D_XBC: tl.constexpr, D_CONV: tl.constexpr,
):
    """The four taps of some channels from the step itself back, 0 beyond D_CONV, and the bias."""
    taps = weight_ptr + (direction * D_CONV + D_CONV - 1) * D_XBC + channel
    w0 = tl.load(taps, mask=valid, other=0.0)
    w1 = tl.load(taps - D_XBC, mask=valid, other=0.0)
    w2, w3 = tl.zeros_like(w0), tl.zeros_like(w0)
    if D_CONV > 2:
        w2 = tl.load(taps - 2 * D_XBC, mask=valid, other=0.0)
    if D_CONV > 3:
        w3 = tl.load(taps - 3 * D_XBC, mask=valid, other=0.0)
    return w0, w1, w2, w3, tl.load(bias_ptr + direction * D_XBC + channel, mask=valid, other=0.0)


@triton.jit
def steps_before(
    raw_ptr, start, stride, channel, w1, w2, w3, bias, W: tl.constexpr, D_XBC: tl.constexpr,
):
    """The three steps before a piece, and what they give its first three. Pieces are no shorter."""
    before = channel < tl.where(start >= 3, D_XBC, 0)
    raw1 = tl.load(raw_ptr + (start - 1) * stride * W, mask=before, other=0.0).to(tl.float32)
    raw2 = tl.load(raw_ptr + (start - 2) * stride * W, mask=before, other=0.0).to(tl.float32)
    raw3 = tl.load(raw_ptr + (start - 3) * stride * W, mask=before, other=0.0).to(tl.float32)
    pre1 = bias + w1 * raw1 + w2 * raw2 + w3 * raw3
    return raw1, raw2, raw3, pre1, bias + w2 * raw1 + w3 * raw2, bias + w3 * raw1


@triton.jit
def convolve(raw, w0, w1, w2, w3, bias, pre1, pre2, pre3):
    """One step: its sum before the SiLU, and what this and earlier steps give the next three."""
    return pre1 + w0 * raw, pre2 + w1 * raw, pre3 + w2 * raw, bias + w3 * raw


@triton.jit(do_not_specialize=RUNTIME)
def conv_forward(
    proj_ptr, weight_ptr, bias_ptr, xbc_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, D_CONV: tl.constexpr,
    Q: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):
    """x, B, C [row, d_xbc]: the causal depthwise convolution of xBC and its SiLU.

    A program walks Q steps, and each element read goes at once into the four sums it is part of.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = (D_XBC + BLOCK_C - 1) // BLOCK_C
    channel = (pid % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    group, chunk = pid // blocks // chunks, pid // blocks % chunks
    first, _ = locate(group, 0, inner, outer_stride, inner_stride, step, length, 1)
    stride = (1 - 2 * (group % 2)) * 2 * step
    valid = channel < D_XBC
    raw_ptr = proj_ptr + first * W + D_INNER + channel
    out_ptr = xbc_ptr + first * D_XBC + channel
    w0, w1, w2, w3, bias = load_taps(
        weight_ptr, bias_ptr, group % 2, channel, valid, D_XBC, D_CONV
    )
    start = chunk * Q
    _, _, _, pre1, pre2, pre3 = steps_before(
        raw_ptr, start, stride, channel, w1, w2, w3, bias, W, D_XBC
    )
    for i in tl.range(start, tl.minimum(start + Q, length), num_stages=STAGES):
        raw = tl.load(raw_ptr + i * stride * W, mask=valid, other=0.0).to(tl.float32)
        pre, pre1, pre2, pre3 = convolve(raw, w0, w1, w2, w3, bias, pre1, pre2, pre3)
        out = (pre * tl.sigmoid(pre)).to(xbc_ptr.dtype.element_ty)
        tl.store(out_ptr + i * stride * D_XBC, out, mask=valid)


@triton.jit
def conv_gradient(raw, grad, w0, w1, w2, w3, bias, pre1, pre2, pre3, sum1, sum2, sum3):
    """One step: the gradient before the SiLU, that of xBC three steps back, and the next sums.

    sum: what later steps gave the last three.
    """
    pre, pre1, pre2, pre3 = convolve(raw, w0, w1, w2, w3, bias, pre1, pre2, pre3)
    s = tl.sigmoid(pre)
    grad *= s * (1 + pre * (1 - s))
    total = sum3 + w3 * grad
    sum1, sum2, sum3 = w0 * grad, sum1 + w1 * grad, sum2 + w2 * grad
    return grad, total, pre1, pre2, pre3, sum1, sum2, sum3


@triton.jit(do_not_specialize=RUNTIME)
def conv_backward(
    proj_ptr, weight_ptr, bias_ptr, dxbc_ptr, dproj_ptr, partial_ptr,
    inner, outer_stride, inner_stride, step, length, chunks, sequences, span,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, D_CONV: tl.constexpr,
    Q: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):
    """The gradient of xBC into dproj, from that of x, B, C; sums of dbias and dw per program.

    A program walks `span` pieces of Q steps with the last values in registers, so that every
    element is read once, but for three steps on either side of a piece: those before, for the
    values they hand on, and those after, whose gradient the last three rows of the piece get.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = (D_XBC + BLOCK_C - 1) // BLOCK_C
    channel = (pid % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    direction, part = pid // blocks % 2, pid // blocks // 2
    valid = channel < D_XBC
    w0, w1, w2, w3, bias = load_taps(
        weight_ptr, bias_ptr, direction, channel, valid, D_XBC, D_CONV
    )
    zero = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbias, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero
    stride = (1 - 2 * direction) * 2 * step
    for piece in range(part * span, tl.minimum(part * span + span, sequences * chunks)):
        start = piece % chunks * Q
        stop = tl.minimum(start + Q, length)
        group = piece // chunks * 2 + direction
        first, _ = locate(group, 0, inner, outer_stride, inner_stride, step, length, 1)
        raw_ptr = proj_ptr + first * W + D_INNER + channel
        out_ptr = dproj_ptr + first * W + D_INNER + channel
        grad_ptr = dxbc_ptr + first * D_XBC + channel
        raw1, raw2, raw3, pre1, pre2, pre3 = steps_before(
            raw_ptr, start, stride, channel, w1, w2, w3, bias, W, D_XBC
        )
        sum1, sum2, sum3 = zero, zero, zero
        for i in tl.range(start, stop, num_stages=STAGES):
            raw = tl.load(raw_ptr + i * stride * W, mask=valid, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + i * stride * D_XBC, mask=valid, other=0.0).to(tl.float32)
            grad, total, pre1, pre2, pre3, sum1, sum2, sum3 = conv_gradient(
                raw, grad, w0, w1, w2, w3, bias, pre1, pre2, pre3, sum1, sum2, sum3
            )
            dbias += grad
            dw0 += grad * raw
            dw1 += grad * raw1
            dw2 += grad * raw2
            dw3 += grad * raw3
            final = channel < tl.where(i >= start + 3, D_XBC, 0)
            out = total.to(dproj_ptr.dtype.element_ty)
            tl.store(out_ptr + (i - 3) * stride * W, out, mask=final)
            # Added zeros: Triton 3.6 pipelines a value handed on unchanged as if it were new.
            raw1, raw2, raw3 = raw + 0.0, raw1 + 0.0, raw2 + 0.0
        for after in tl.static_range(3):
            i = stop + after
            inside = channel < tl.where(i < length, D_XBC, 0)
            raw = tl.load(raw_ptr + i * stride * W, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + i * stride * D_XBC, mask=inside, other=0.0).to(tl.float32)
            grad, total, pre1, pre2, pre3, sum1, sum2, sum3 = conv_gradient(
                raw, grad, w0, w1, w2, w3, bias, pre1, pre2, pre3, sum1, sum2, sum3
            )
            final = channel < tl.where(i >= start + 3, D_XBC, 0)
            out = total.to(dproj_ptr.dtype.element_ty)
            tl.store(out_ptr + (i - 3) * stride * W, out, mask=final)
    # Rows of a partial: the bias, then the taps from the current step back.
    at = partial_ptr + (part * 2 + direction) * 5 * D_XBC + channel
    tl.store(at, dbias, mask=valid)
    tl.store(at + D_XBC, dw0, mask=valid)
    tl.store(at + 2 * D_XBC, dw1, mask=valid)
    tl.store(at + 3 * D_XBC, dw2, mask=valid)
    tl.store(at + 4 * D_XBC, dw3, mask=valid)
