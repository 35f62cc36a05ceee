"""Backward kernels of the bidirectional mixer; notation and tiles as in `triton_forward`.

With M_qk = (C_q . B_k) exp(a_q - a_k) dt_k, S the state that enters a chunk, dS the gradient of the
one it leaves behind, w_k = exp(a_Q - a_k) dt_k, and sums over heads where an index of one is
missing,
    dG_qk = (dy_q . x_k) exp(a_q - a_k) dt_k                       the gradient of C_q . B_k
    dx_k = sum_q M_qk dy_q + D dy_k                                   + w_k dS^T B_k
    dC_q = sum_k dG_qk B_k                                            + exp(a_q) S dy_q
    dB_k = sum_q dG_qk C_q                                            + w_k dS x_k
    dS  <- exp(a_Q) dS + sum_q exp(a_q) C_q dy_q^T                 (previous chunk)

x, B, C and S are computed again. Where there are states, `state_query` and `state_key` write the
last column of terms first, and `chunk_backward` adds the others: each holds one large accumulator,
so that several programs share a multiprocessor. A program owns its chunk and loops over the heads:
nothing needs atomics, and every run gives the same gradients.

Memory per row, in elements, beside the forward kernels that run again (dbc is float32):
    state_query     reads d_inner + n, a state              writes 2 n
    state_backward  reads d_inner + n                       and turns the states into dS
    state_key       reads d_inner + n, a dS                 writes d_inner + 2 n
    chunk_backward  reads 2 d_inner + 2 n (d_inner + 4 n)   writes d_inner + 2 n
The gradients of x, B and C take their place; `conv_backward` makes that of xBC, in dproj, of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.scan.triton_forward import decay_matrix, triangle
from models.scan.triton_rows import RUNTIME, load_tile, locate, store_tile

# Signatures keep pointers, geometry, model constants and tile sizes on lines of their own.
# fmt: off


@triton.jit(do_not_specialize=RUNTIME)
def state_backward(
    xbc_ptr, decay_ptr, dy_ptr, state_ptr, kept_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sweep one head from the end; slot c of `state` turns from S after chunk c into dS.

    `kept` [sequence, direction, chunk - 1, head] is the gradient of a_Q through exp(a_Q) S.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, tile = pid // (H * SPLITS), (pid % (H * SPLITS)).to(tl.int32)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
    at = n[:, None] * BLOCK_P + p[None, :]
    dtype = xbc_ptr.dtype.element_ty
    dstate = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for i in range(chunks - 1):
        chunk = chunks - 1 - i
        first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
        inside = chunk * Q + q < length
        c = load_tile(xbc_ptr + first * D_XBC + D_INNER + N, row * D_XBC, n, inside, n < N)
        dy_at = dy_ptr + first * D_INNER + head * P
        dy = load_tile(dy_at, row * D_INNER, lane, inside, lane < P).to(tl.float32)
        steps = ((group * H + head) * chunks + chunk) * Q
        a, a_end = tl.load(decay_ptr + steps + q), tl.load(decay_ptr + steps + Q - 1)
        slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS + tile
        state = tl.load(state_ptr + slot * BLOCK_N * BLOCK_P + at).to(tl.float32)
        dstate *= tl.exp2(a_end)
        tl.store(kept_ptr + slot, tl.sum(tl.sum(dstate * state, axis=1), axis=0))
        weighted = (dy * tl.exp2(a)[:, None]).to(dtype)                              # q p
        dstate = tl.dot(tl.trans(c), weighted, dstate, input_precision=PRECISION)
        tl.store(state_ptr + slot * BLOCK_N * BLOCK_P + at, dstate.to(dtype))        # n p


@triton.jit(do_not_specialize=RUNTIME)
def state_query(
    xbc_ptr, decay_ptr, state_ptr, dy_ptr, read_ptr, dbc_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """What a chunk after the first reads from S: this part of dC, and of da as `read`."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // (chunks - 1), pid % (chunks - 1) + 1
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    dtype = xbc_ptr.dtype.element_ty
    c = load_tile(xbc_ptr + first * D_XBC + D_INNER + N, row * D_XBC, n, inside, n < N)
    dc = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        grow = tl.exp2(tl.load(decay_ptr + ((group * H + head) * chunks + chunk) * Q + q))
        at = state_ptr + (pid * H * SPLITS + tile) * BLOCK_N * BLOCK_P
        state = tl.load(at + (n[:, None] * BLOCK_P + p[None, :]))
        dy_at = dy_ptr + first * D_INNER + head * P
        dy = load_tile(dy_at, row * D_INNER, lane, inside, lane < P).to(tl.float32)
        dy *= grow[:, None]
        read = tl.sum(dy * tl.dot(c, state, input_precision=PRECISION), axis=1)
        dc = tl.dot(dy.to(dtype), tl.trans(state), dc, input_precision=PRECISION)    # q n
        tl.store(read_ptr + ((group * H * SPLITS + tile) * chunks + chunk) * Q + q, read)
    store_tile(dbc_ptr + first * (2 * N) + N, row * (2 * N), n, dc, inside, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def state_key(
    xbc_ptr, dt_ptr, decay_ptr, dstate_ptr, written_ptr, dbc_ptr, dproj_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):
    """What a chunk before the last writes into S: this part of dB, dx, and of ddt as `written`."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // (chunks - 1), pid % (chunks - 1)
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    xbc = xbc_ptr + first * D_XBC
    dtype = xbc_ptr.dtype.element_ty
    b = load_tile(xbc + D_INNER, row * D_XBC, n, inside, n < N)
    db = tl.zeros((Q, BLOCK_N), dtype=tl.float32)
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        shrink = tl.exp2(tl.load(decay_ptr + steps + Q - 1) - a)
        at = dstate_ptr + (pid * H * SPLITS + tile) * BLOCK_N * BLOCK_P
        dstate = tl.load(at + (n[:, None] * BLOCK_P + p[None, :]))
        x = load_tile(xbc + head * P, row * D_XBC, lane, inside, lane < P).to(tl.float32)
        dx = shrink[:, None] * tl.dot(b, dstate, input_precision=PRECISION)          # k p
        written = tl.sum(x * dx, axis=1)
        dx_at = dproj_ptr + first * W + D_INNER + head * P
        store_tile(dx_at, row * W, lane, dt[:, None] * dx, inside, lane < P)
        x *= (dt * shrink)[:, None]
        db = tl.dot(x.to(dtype), tl.trans(dstate), db, input_precision=PRECISION)    # k n
        tl.store(written_ptr + ((group * H * SPLITS + tile) * chunks + chunk) * Q + q, written)
    store_tile(dbc_ptr + first * (2 * N), row * (2 * N), n, db, inside, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def chunk_backward(
    xbc_ptr, skip_ptr, dt_ptr, decay_ptr, dy_ptr, dbc_ptr,
    dproj_ptr, query_ptr, key_ptr, pair_ptr, own_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The pairs of one chunk: dx, dB, dC in the place of x, B, C, and for `dt_backward`

    query and key [.., head, step]: sums of M_qk dy_q . x_k over k < q and over q > k,
    pair [.., head, step]: dy_q . x_q,   own [.., step]: C_q . B_q.
    A step's pair with itself is undecayed and stays out of the sums: it would cancel in da but for
    a rounding error that is large beside the rest where the decay is strong.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    entered = inside & (q < tl.where(chunk > 0, Q, 0))
    left = inside & (q < tl.where(chunk < chunks - 1, Q, 0))
    xbc = xbc_ptr + first * D_XBC
    dtype = xbc_ptr.dtype.element_ty
    dx_ptr = dproj_ptr + first * W + D_INNER  # what `state_key` has left there
    b = load_tile(xbc + D_INNER, row * D_XBC, n, inside, n < N)
    c = load_tile(xbc + D_INNER + N, row * D_XBC, n, inside, n < N)
    own, cb = triangle(tl.dot(c, tl.trans(b), input_precision=PRECISION), Q)         # q k
    tl.store(own_ptr + pid * Q + q, own)
    dcb = tl.zeros((Q, Q), dtype=tl.float32)
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        x = load_tile(xbc + head * P, row * D_XBC, lane, inside, lane < P)
        dy_at = dy_ptr + first * D_INNER + head * P
        dy = load_tile(dy_at, row * D_INNER, lane, inside, lane < P)
        pairs = tl.dot(dy, tl.trans(x), input_precision=PRECISION)                   # q k
        steps = ((group * H * SPLITS + tile) * chunks + chunk) * Q + q
        pair = tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), axis=1)
        tl.store(pair_ptr + steps, pair)
        weight = decay_matrix(a) * dt[None, :]                                       # q k
        mix = (cb * weight).to(dtype)
        pairs *= weight
        dcb += pairs
        pairs *= cb
        tl.store(query_ptr + steps, tl.sum(pairs, axis=1))
        tl.store(key_ptr + steps, tl.sum(pairs, axis=0))
        dx = (tl.load(skip_ptr + group % 2 * H + head) + own * dt)[:, None] * dy.to(tl.float32)
        if HAS_STATE:
            dx += load_tile(dx_ptr + head * P, row * W, lane, left, lane < P).to(tl.float32)
        dx = tl.dot(tl.trans(mix), dy, dx, input_precision=PRECISION)                # k p
        store_tile(xbc + head * P, row * D_XBC, lane, dx, inside, lane < P)
    dcb = tl.where(q[:, None] >= q[None, :], dcb, 0.0).to(dtype)
    dc = tl.dot(dcb, b, input_precision=PRECISION)                                   # q n
    if HAS_STATE:
        dc += load_tile(dbc_ptr + first * (2 * N) + N, row * (2 * N), n, entered, n < N)
    store_tile(xbc + D_INNER + N, row * D_XBC, n, dc, inside, n < N)
    db = tl.dot(tl.trans(dcb), c, input_precision=PRECISION)                         # k n
    if HAS_STATE:
        db += load_tile(dbc_ptr + first * (2 * N), row * (2 * N), n, left, n < N)
    store_tile(xbc + D_INNER, row * D_XBC, n, db, inside, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def dt_backward(
    proj_ptr, dt_bias_ptr, a_log_ptr, dt_ptr, query_ptr, key_ptr, pair_ptr, own_ptr,
    read_ptr, written_ptr, kept_ptr, dproj_ptr, partial_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The raw dt's gradient into dproj; each program's sums for dt_bias, A_log and D."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, h = tl.arange(0, Q), tl.arange(0, BLOCK_H)
    heads, inside = h < H, chunk * Q + q < length
    at = ((group * H + h[None, :]) * chunks + chunk) * Q + q[:, None]
    dt = tl.load(dt_ptr + at, mask=heads[None, :], other=0.0)
    own = tl.load(own_ptr + pid * Q + q)
    ddt = tl.zeros((Q, BLOCK_H), dtype=tl.float32)
    da = tl.zeros((Q, BLOCK_H), dtype=tl.float32)
    dskip = tl.zeros((BLOCK_H,), dtype=tl.float32)
    last = tl.zeros((BLOCK_H,), dtype=tl.float32)  # the gradient of a_Q
    for split in tl.static_range(SPLITS):
        tile = h * SPLITS + split
        at = ((group * H * SPLITS + tile[None, :]) * chunks + chunk) * Q + q[:, None]
        pair = tl.load(pair_ptr + at, mask=heads[None, :], other=0.0)
        key = tl.load(key_ptr + at, mask=heads[None, :], other=0.0)
        dskip += tl.sum(pair, axis=0)
        # Where dt has vanished, so have key and what the gradient of dt is multiplied by.
        ddt += own[:, None] * pair + key / tl.maximum(dt, 1e-30)
        da += tl.load(query_ptr + at, mask=heads[None, :], other=0.0) - key
        if HAS_STATE:
            entered, left = h < tl.where(chunk > 0, H, 0), h < tl.where(chunk < chunks - 1, H, 0)
            da += tl.load(read_ptr + at, mask=entered[None, :], other=0.0)
            written = tl.load(written_ptr + at, mask=left[None, :], other=0.0)
            ddt += written
            da -= written * dt
            last += tl.sum(written * dt, axis=0)
            slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS + tile
            last += tl.load(kept_ptr + slot, mask=entered, other=0.0)
    # A cumulative sum's gradient is the cumulative sum from the end.
    dlog = tl.cumsum(da, axis=0, reverse=True) + last[None, :]
    parameter = group % 2 * H + h
    rate = -tl.exp(tl.load(a_log_ptr + parameter, mask=heads, other=0.0))[None, :]
    bias = tl.load(dt_bias_ptr + parameter, mask=heads, other=0.0)
    raw = load_tile(proj_ptr + first * W + W - H, row * W, h, inside, heads).to(tl.float32)
    draw = (ddt + rate * dlog) * tl.sigmoid(raw + bias[None, :])
    draw = tl.where(inside[:, None], draw, 0.0)
    store_tile(dproj_ptr + first * W + W - H, row * W, h, draw, inside, heads)
    partial = partial_ptr + pid * (3 * H) + h
    tl.store(partial, tl.sum(draw, axis=0), mask=heads)
    tl.store(partial + H, tl.sum(rate * dt * dlog, axis=0), mask=heads)
    tl.store(partial + 2 * H, dskip, mask=heads)
