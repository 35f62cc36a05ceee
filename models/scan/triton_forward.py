"""Forward kernels of the bidirectional mixer: dt, the selective scan, the output projection.

    x, B, C = silu(conv(xBC))            dt = softplus(dt_raw + dt_bias)     A = -exp(A_log)
    a_q     = A (dt_1 + ... + dt_q)      the log-decay since the start of the chunk
    y_q     = sum_{k <= q} (C_q . B_k) exp(a_q - a_k) dt_k x_k  +  exp(a_q) C_q S  +  D x_q
    S'      = exp(a_Q) S + sum_k exp(a_Q - a_k) dt_k B_k x_k^T                       (next chunk)
    out     = x + x skip + bias + n w                        n: y after its gate and norm
(the state-space dual form of Mamba-2, arXiv 2405.21060, section 6). The gate is in
`triton_rows`. Decays are kept as base-2 logarithms, which is what the hardware raises.

Tile: Q steps of one sequence and direction. A sequence of at most Q steps has no state:
`chunk_forward` forms its C B^T once and loops over the heads. A longer one is swept, one program
per head, with S in registers: by `sweep_forward` for y, by `state_forward` for the states that the
backward pass reads.
A *row* is a (token, direction) pair: everything is addressed by row, and the backward direction
walks its rows from the end, so nothing is flipped or permuted.

Memory per row, in elements (paper: d_inner 1024, n 128, Q 64):
    chunk_forward   reads d_inner + 2 n          writes d_inner
    sweep_forward   reads d_inner + 2 n          writes d_inner
    state_forward   reads d_inner + n            writes d_inner n / Q
    output_forward  reads d_inner + d_model / 2  writes d_model / 2
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.scan.triton_rows import RUNTIME, load_tile, locate, store_tile

LOG2E = tl.constexpr(1.4426950408889634)

# Signatures keep pointers, geometry, model constants and tile sizes on lines of their own.
# fmt: off


@triton.jit
def softplus(x):
    """log(1 + e^x) to full relative precision: small e^x goes through the series of atanh."""
    e = tl.exp(tl.minimum(x, 20.0))
    s = e / (2 + e)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))
    return tl.where(x > 20.0, x, tl.where(e < 0.25, series, tl.log(1 + e)))


@triton.jit
def decay_matrix(a):
    """2^(a_q - a_k) where k <= q. Above the diagonal it is 1: what it multiplies must be 0."""
    return tl.exp2(tl.minimum(a[:, None] - a[None, :], 0.0))                         # q k


@triton.jit
def triangle(cb, Q: tl.constexpr):
    """The diagonal of cb, and cb with the diagonal and what lies above it set to 0."""
    i = tl.arange(0, Q)
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], cb, 0.0), axis=1)
    return diagonal, tl.where(i[:, None] > i[None, :], cb, 0.0)


@triton.jit
def within_chunk(cb, own, x, dt, a, skip):
    """The pairs of one chunk: the matrix that x is multiplied by, and what a step reads of itself.

    The latter is undecayed and goes in float32, together with D.
    """
    mix = (cb * decay_matrix(a) * dt[None, :]).to(x.dtype)                           # q k
    return mix, (skip + own * dt)[:, None] * x.to(tl.float32)                        # q p


@triton.jit
def next_state(state, b, x, dt, a, a_end, PRECISION: tl.constexpr):
    """S' of a chunk, n p."""
    weighted = (x.to(tl.float32) * (dt * tl.exp2(a_end - a))[:, None]).to(b.dtype)   # q p
    state *= tl.exp2(a_end)
    return tl.dot(tl.trans(b), weighted, state, input_precision=PRECISION)


@triton.jit(do_not_specialize=RUNTIME)
def dt_forward(
    proj_ptr, dt_bias_ptr, a_log_ptr, dt_ptr, decay_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """dt and a as float32 [sequence, direction, head, chunk, step]; dt = 0 beyond the end."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, h = tl.arange(0, Q), tl.arange(0, BLOCK_H)
    pos = chunk * Q + q
    parameter = group % 2 * H + h
    raw = load_tile(proj_ptr + first * W + W - H, row * W, h, pos < length, h < H).to(tl.float32)
    bias = tl.load(dt_bias_ptr + parameter, mask=h < H, other=0.0)
    rate = -LOG2E * tl.exp(tl.load(a_log_ptr + parameter, mask=h < H, other=0.0))
    dt = tl.where((pos < length)[:, None], softplus(raw + bias[None, :]), 0.0)
    at = (group * H + h[None, :]) * (chunks * Q) + pos[:, None]
    tl.store(dt_ptr + at, dt, mask=(h < H)[None, :])
    tl.store(decay_ptr + at, tl.cumsum(dt * rate[None, :], axis=0), mask=(h < H)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def state_forward(
    xbc_ptr, dt_ptr, decay_ptr, state_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sweep one head over the chunks; slot c of `state` is S at the start of chunk c + 1."""
    pid = tl.program_id(0).to(tl.int64)
    group, tile = pid // (H * SPLITS), (pid % (H * SPLITS)).to(tl.int32)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
    at = n[:, None] * BLOCK_P + p[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for chunk in range(chunks - 1):
        first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
        xbc, inside = xbc_ptr + first * D_XBC, chunk * Q + q < length
        b = load_tile(xbc + D_INNER, row * D_XBC, n, inside, n < N)
        x = load_tile(xbc + head * P, row * D_XBC, lane, inside, lane < P)
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        a_end = tl.load(decay_ptr + steps + Q - 1)
        state = next_state(state, b, x, dt, a, a_end, PRECISION)
        slot = (group * (chunks - 1) + chunk) * H * SPLITS + tile
        tl.store(state_ptr + slot * BLOCK_N * BLOCK_P + at, state.to(b.dtype))


@triton.jit(do_not_specialize=RUNTIME)
def sweep_forward(
    xbc_ptr, skip_ptr, dt_ptr, decay_ptr, y_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """y [row, d_inner] of one head of a sequence, chunk by chunk with S in registers."""
    pid = tl.program_id(0).to(tl.int64)
    group, tile = pid // (H * SPLITS), (pid % (H * SPLITS)).to(tl.int32)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
    skip = tl.load(skip_ptr + group % 2 * H + head)
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for chunk in range(chunks):
        first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
        xbc, inside = xbc_ptr + first * D_XBC, chunk * Q + q < length
        b = load_tile(xbc + D_INNER, row * D_XBC, n, inside, n < N)
        c = load_tile(xbc + D_INNER + N, row * D_XBC, n, inside, n < N)
        x = load_tile(xbc + head * P, row * D_XBC, lane, inside, lane < P)
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        a_end = tl.load(decay_ptr + steps + Q - 1)
        own, cb = triangle(tl.dot(c, tl.trans(b), input_precision=PRECISION), Q)     # q k
        mix, y = within_chunk(cb, own, x, dt, a, skip)
        y += tl.exp2(a)[:, None] * tl.dot(c, state.to(c.dtype), input_precision=PRECISION)
        y = tl.dot(mix, x, y, input_precision=PRECISION)                             # q p
        store_tile(y_ptr + first * D_INNER + head * P, row * D_INNER, lane, y, inside, lane < P)
        state = next_state(state, b, x, dt, a, a_end, PRECISION)


@triton.jit(do_not_specialize=RUNTIME)
def chunk_forward(
    xbc_ptr, skip_ptr, dt_ptr, decay_ptr, y_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """y [row, d_inner] of all heads of a sequence that is one chunk."""
    group = tl.program_id(0).to(tl.int64)
    first, row = locate(group, 0, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    xbc, inside = xbc_ptr + first * D_XBC, q < length
    b = load_tile(xbc + D_INNER, row * D_XBC, n, inside, n < N)
    c = load_tile(xbc + D_INNER + N, row * D_XBC, n, inside, n < N)
    own, cb = triangle(tl.dot(c, tl.trans(b), input_precision=PRECISION), Q)         # q k
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = (group * H + head) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        x = load_tile(xbc + head * P, row * D_XBC, lane, inside, lane < P)
        mix, y = within_chunk(cb, own, x, dt, a, tl.load(skip_ptr + group % 2 * H + head))
        y = tl.dot(mix, x, y, input_precision=PRECISION)                             # q p
        store_tile(y_ptr + first * D_INNER + head * P, row * D_INNER, lane, y, inside, lane < P)


@triton.jit(do_not_specialize=("tokens",))
def output_forward(
    x_ptr, n_ptr, w_ptr, skip_ptr, bias_ptr, out_ptr, tokens,
    D_MODEL: tl.constexpr, D_MIXED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """out = x + bias + x skip + n w for a tile of tokens; n [token, d_mixed] of both directions.

    One accumulator in float32 for all of it: x is rounded once instead of three times.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token, i = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I)
    inside, valid = start + token < tokens, columns < D_MODEL
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    n = n_ptr + start * D_MIXED
    for k in range(0, D_MIXED, BLOCK_I):
        left = load_tile(n, token * D_MIXED, k + i, inside, k + i < D_MIXED)
        right = load_tile(w_ptr, (k + i) * D_MODEL, columns, k + i < D_MIXED, valid)
        acc = tl.dot(left, right, acc)
    x = x_ptr + start * D_MODEL
    for k in range(0, D_MODEL, BLOCK_I):
        left = load_tile(x, token * D_MODEL, k + i, inside, k + i < D_MODEL)
        right = load_tile(skip_ptr, (k + i) * D_MODEL, columns, k + i < D_MODEL, valid)
        acc = tl.dot(left, right, acc)
    acc += load_tile(x, token * D_MODEL, columns, inside, valid).to(tl.float32)
    acc += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)[None, :]
    store_tile(out_ptr + start * D_MODEL, token * D_MODEL, columns, acc, inside, valid)
