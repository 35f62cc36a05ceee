"""Row-wise kernels: the pre-norm of a block, and the gate with its norm, forward and backward.

    n = x rsqrt(mean(x^2) + eps)                                                     pre-norm
    v = y silu(z),   n = v r,   r = rsqrt(mean(v^2) + eps)                           gate
With c = mean(dn n), the gradients are
    dv = r (dn - c n)        dy = dv silu(z)        dz = dv y silu'(z)

A program holds whole rows, reads every element once and writes it once, so it may write where it
has read. Memory per row, in elements:
    norm_forward    reads d_model                writes d_model
    gate_forward    reads 2 d_inner              writes d_inner
    gate_backward   reads 3 d_inner              writes 3 d_inner
    norm_backward   reads 3 d_model              writes d_model
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not compiled in: another length, batch or axis runs the same kernel.
RUNTIME = (
    *("inner", "outer_stride", "inner_stride", "step", "length", "chunks"),
    *("sequences", "span"),
)

# Signatures keep pointers, geometry, model constants and tile sizes on lines of their own.
# fmt: off


@triton.jit
def locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q: tl.constexpr):
    """First row of a chunk in scan order, and its steps' rows relative to that one.

    A group is a (sequence, direction) pair. The first row is 64-bit; offsets within a chunk stay
    far below 2^31 elements.
    """
    seq, direction = group // 2, group % 2
    token = seq // inner * outer_stride + seq % inner * inner_stride
    token += direction * (length - 1) * step
    stride = (1 - 2 * direction) * 2 * step
    return token * 2 + direction + chunk * Q * stride, tl.arange(0, Q) * stride.to(tl.int32)


@triton.jit
def load_tile(ptr, row, column, inside, in_columns):
    """A tile in the type of its memory, 0 outside; `row` and `column` are offsets in elements."""
    mask = inside[:, None] & in_columns[None, :]
    return tl.load(ptr + (row[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, row, column, value, inside, in_columns):
    mask = inside[:, None] & in_columns[None, :]
    tl.store(ptr + (row[:, None] + column[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("rows",))
def norm_forward(
    x_ptr, n_ptr, rows, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    x = load_tile(x_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    store_tile(n_ptr + start * D, row * D, d, x * r[:, None], inside, d < D)


@triton.jit(do_not_specialize=("rows",))
def norm_backward(
    x_ptr, dn_ptr, dx_ptr, rows, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Add the gradient of x to dx."""
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    x = load_tile(x_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    dn = load_tile(dn_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    dx = load_tile(dx_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    n = x * r[:, None]
    c = tl.sum(dn * n, axis=1) / D
    dx += r[:, None] * (dn - c[:, None] * n)
    store_tile(dx_ptr + start * D, row * D, d, dx, inside, d < D)


@triton.jit(do_not_specialize=("rows",))
def gate_forward(
    proj_ptr, y_ptr, n_ptr, rows, eps,
    W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """n may be y. The rows of z, the first columns of proj, are W elements apart."""
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    z = load_tile(proj_ptr + start * W, row * W, d, inside, d < D).to(tl.float32)
    y = load_tile(y_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    v = y * z * tl.sigmoid(z)
    r = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    store_tile(n_ptr + start * D, row * D, d, v * r[:, None], inside, d < D)


@triton.jit(do_not_specialize=("rows",))
def gate_backward(
    proj_ptr, y_ptr, dn_ptr, n_ptr, dproj_ptr, rows, eps,
    W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Write n, dy in the place of dn, and dz into the first columns of dproj."""
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    z = load_tile(proj_ptr + start * W, row * W, d, inside, d < D).to(tl.float32)
    y = load_tile(y_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    dn = load_tile(dn_ptr + start * D, row * D, d, inside, d < D).to(tl.float32)
    s = tl.sigmoid(z)
    gate = z * s
    v = y * gate
    r = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    n = v * r[:, None]
    c = tl.sum(dn * n, axis=1) / D
    dv = r[:, None] * (dn - c[:, None] * n)
    store_tile(n_ptr + start * D, row * D, d, n, inside, d < D)
    store_tile(dn_ptr + start * D, row * D, d, dv * gate, inside, d < D)
    dz = dv * y * (s + gate * (1 - s))
    store_tile(dproj_ptr + start * W, row * W, d, dz, inside, d < D)
