"""Backward kernels of the bidirectional mixer core; notation and tiles as in `triton_forward`.

With c = mean(dn n) over d_inner, the norm and the gate give
    dv = rstd (dn - c n)        dy = dv silu(z)        dz = dv y silu'(z)
and with M_qk = (C_q . B_k) exp(a_q - a_k) dt_k, dS the gradient of the state a chunk leaves behind,
w_k = exp(a_Q - a_k) dt_k and sums over heads where an index of one is missing,
    dx_k = sum_q M_qk dy_q + w_k dS^T B_k + D dy_k
    dG_qk = (dy_q . x_k) exp(a_q - a_k) dt_k                       the gradient of C_q . B_k
    dC_q = sum_k dG_qk B_k + exp(a_q) S dy_q
    dB_k = sum_q dG_qk C_q + w_k dS x_k
    dS  <- exp(a_Q) dS + sum_q exp(a_q) C_q dy_q^T                 (previous chunk)

y, x, B, C and S are computed again from proj. The work is split as in attention: `query_backward`
owns what is indexed by q (dz, dC), `key_backward` what is indexed by k (dx, dB). A program owns its
chunk and loops over the heads, so nothing needs atomics and every run gives the same gradients.

Memory per row, in elements, beside the forward kernels that run again:
    norm_backward   reads 2 d_inner              writes d_inner
    query_backward  reads 3 d_inner + 3 n        writes d_inner + n      and a state
    state_backward  reads 2 d_inner + n          and turns the states into their gradients
    key_backward    reads 3 d_inner + 3 n        writes d_inner + n      and a state's gradient
    conv_backward   reads 2 (d_inner + 2 n)      writes d_inner + 2 n
Gradients take the place of what nothing reads any more: dv lies in dproj, dxBC in the convolution's
output, dS in the states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.scan.triton_forward import (
    RUNTIME,
    decay_matrix,
    load_tile,
    locate,
    silu,
    silu_grad,
    store_tile,
)

# Signatures keep pointers, geometry, model constants and tile sizes on lines of their own.
# fmt: off


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward(
    dn_ptr, n_ptr, rstd_ptr, dv_ptr, rows,
    W: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dv = rstd (dn - n mean(dn * n)) by row; the rows of dv are W elements apart."""
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    dn = load_tile(dn_ptr + start * D, row * D, d, inside, d < D)
    n = load_tile(n_ptr + start * D, row * D, d, inside, d < D)
    rstd = tl.load(rstd_ptr + start + row, mask=inside, other=0.0)
    mean = tl.sum(dn * n, axis=1) / D
    dv = rstd[:, None] * (dn - mean[:, None] * n)
    store_tile(dv_ptr + start * W, row * W, d, dv, inside, d < D)


@triton.jit(do_not_specialize=RUNTIME)
def state_backward(
    proj_ptr, bc_ptr, decay_ptr, state_ptr, dproj_ptr, kept_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
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
    dtype = proj_ptr.dtype.element_ty
    dstate = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for i in range(chunks - 1):
        chunk = chunks - 1 - i
        first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
        inside = chunk * Q + q < length
        c = load_tile(bc_ptr + first * (2 * N) + N, row * (2 * N), n, inside, n < N).to(dtype)
        z = load_tile(proj_ptr + first * W + head * P, row * W, lane, inside, lane < P)
        dv = load_tile(dproj_ptr + first * W + D_INNER + head * P, row * W, lane, inside, lane < P)
        steps = ((group * H + head) * chunks + chunk) * Q
        a, a_end = tl.load(decay_ptr + steps + q), tl.load(decay_ptr + steps + Q - 1)
        slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS + tile
        state = tl.load(state_ptr + slot * BLOCK_N * BLOCK_P + at).to(tl.float32)
        dstate *= tl.exp(a_end)
        tl.store(kept_ptr + slot, tl.sum(tl.sum(dstate * state, axis=1), axis=0))
        weighted = (dv * silu(z) * tl.exp(a)[:, None]).to(dtype)                     # q p
        dstate += tl.dot(tl.trans(c), weighted, input_precision=PRECISION)
        tl.store(state_ptr + slot * BLOCK_N * BLOCK_P + at, dstate.to(dtype))        # n p


@triton.jit(do_not_specialize=RUNTIME)
def query_backward(
    proj_ptr, skip_ptr, pre_ptr, bc_ptr, dt_ptr, decay_ptr, state_ptr,
    dproj_ptr, da_ptr, dskip_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """What reads the state, summed over k: dz, dC, the q side of da, dD.

    dC, before its SiLU, takes the place of C in `pre`.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    dtype = proj_ptr.dtype.element_ty
    pre = pre_ptr + first * D_XBC
    b = load_tile(bc_ptr + first * (2 * N), row * (2 * N), n, inside, n < N).to(dtype)
    c = load_tile(bc_ptr + first * (2 * N) + N, row * (2 * N), n, inside, n < N).to(dtype)
    bc = tl.dot(b, tl.trans(c), input_precision=PRECISION)                           # k q
    dbc = tl.zeros((Q, Q), dtype=tl.float32)
    dc = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        x_at, z_at = pre + head * P, proj_ptr + first * W + head * P
        dv_at = dproj_ptr + first * W + D_INNER + head * P
        x = silu(load_tile(x_at, row * D_XBC, lane, inside, lane < P, 1))
        z = load_tile(z_at, row * W, lane, inside, lane < P, 1)
        dy = load_tile(dv_at, row * W, lane, inside, lane < P, 1) * silu(z)
        pairs = tl.dot(x.to(dtype), tl.trans(dy.to(dtype)), input_precision=PRECISION)
        dskip = tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), axis=1), axis=0)
        weight = decay_matrix(a, Q) * dt[:, None]                                    # k q
        pairs *= weight
        dbc += pairs
        da = tl.sum(tl.where(q[:, None] < q[None, :], pairs * bc, 0.0), axis=0)
        mix = tl.trans((bc * weight).to(dtype))                                      # q k
        y = tl.dot(mix, x.to(dtype), input_precision=PRECISION)                      # q p
        if HAS_STATE:
            at = state_ptr + (slot + tile) * BLOCK_N * BLOCK_P
            entering = n < tl.where(chunk > 0, BLOCK_N, 0)
            state = load_tile(at, n * BLOCK_P, p, entering, p < BLOCK_P).to(dtype)
            grow = tl.exp(a)[:, None]
            z = load_tile(z_at, row * W, lane, inside, lane < P)
            dy = load_tile(dv_at, row * W, lane, inside, lane < P) * silu(z)
            read = grow * tl.dot(c, state, input_precision=PRECISION)                # q p
            y += read
            da += tl.sum(dy * read, axis=1)
            dc += tl.dot(state, tl.trans((dy * grow).to(dtype)), input_precision=PRECISION)
        x = silu(load_tile(x_at, row * D_XBC, lane, inside, lane < P, 2))
        y += tl.load(skip_ptr + group % 2 * H + head) * x
        z = load_tile(z_at, row * W, lane, inside, lane < P, 2)
        dv = load_tile(dv_at, row * W, lane, inside, lane < P, 2)
        dz = dv * y * silu_grad(z)
        store_tile(dproj_ptr + first * W + head * P, row * W, lane, dz, inside, lane < P)
        tl.store(da_ptr + ((group * H * SPLITS + tile) * chunks + chunk) * Q + q, da)
        tl.store(dskip_ptr + pid * H * SPLITS + tile, dskip)
    b = load_tile(bc_ptr + first * (2 * N), row * (2 * N), n, inside, n < N).to(dtype)
    dc += tl.dot(tl.trans(b), dbc.to(dtype), input_precision=PRECISION)              # n q
    c_pre = load_tile(pre + D_INNER + N, row * D_XBC, n, inside, n < N)
    dc = tl.trans(dc) * silu_grad(c_pre)
    store_tile(pre + D_INNER + N, row * D_XBC, n, dc, inside, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def key_backward(
    proj_ptr, skip_ptr, pre_ptr, bc_ptr, dt_ptr, decay_ptr, dstate_ptr,
    dproj_ptr, ddt_ptr, da_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """What writes the state, summed over q: dx, dB, ddt, the k side of da.

    dx and dB, before their SiLU, take the places of x and B in `pre`, which then is dxBC.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    dtype = proj_ptr.dtype.element_ty
    pre = pre_ptr + first * D_XBC
    b = load_tile(bc_ptr + first * (2 * N), row * (2 * N), n, inside, n < N).to(dtype)
    c = load_tile(bc_ptr + first * (2 * N) + N, row * (2 * N), n, inside, n < N).to(dtype)
    bc = tl.dot(b, tl.trans(c), input_precision=PRECISION)                           # k q
    dbc = tl.zeros((Q, Q), dtype=tl.float32)
    db = tl.zeros((BLOCK_N, Q), dtype=tl.float32)
    slot = (group * (chunks - 1) + chunk) * H * SPLITS
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        x_at, z_at = pre + head * P, proj_ptr + first * W + head * P
        dv_at = dproj_ptr + first * W + D_INNER + head * P
        x = silu(load_tile(x_at, row * D_XBC, lane, inside, lane < P, 1))
        z = load_tile(z_at, row * W, lane, inside, lane < P, 1)
        dy = load_tile(dv_at, row * W, lane, inside, lane < P, 1) * silu(z)
        decay = decay_matrix(a, Q)                                                   # k q
        pairs = tl.dot(x.to(dtype), tl.trans(dy.to(dtype)), input_precision=PRECISION)
        pairs *= decay
        dbc += pairs * dt[:, None]
        pairs *= bc
        ddt = tl.sum(pairs, axis=1)
        # Step k reads itself undecayed. Its pair would cancel between the two sides of da, but for
        # a rounding error that is large beside the rest where the decay is strong.
        da = -dt * tl.sum(tl.where(q[:, None] < q[None, :], pairs, 0.0), axis=1)
        mix = (bc * decay * dt[:, None]).to(dtype)                                   # k q
        dx = tl.dot(mix, dy.to(dtype), input_precision=PRECISION)                    # k p
        if HAS_STATE:
            at = dstate_ptr + (slot + tile) * BLOCK_N * BLOCK_P
            leaving = n < tl.where(chunk < chunks - 1, BLOCK_N, 0)
            dstate = load_tile(at, n * BLOCK_P, p, leaving, p < BLOCK_P).to(dtype)
            shrink = tl.exp(tl.load(decay_ptr + steps + Q - 1) - a)
            x = silu(load_tile(x_at, row * D_XBC, lane, inside, lane < P))
            written = shrink[:, None] * tl.dot(b, dstate, input_precision=PRECISION)  # k p
            ddt_end = tl.sum(x * written, axis=1)
            ddt += ddt_end
            da += tl.where(q == Q - 1, tl.sum(ddt_end * dt, axis=0), 0.0) - ddt_end * dt
            dx += dt[:, None] * written
            scaled = (x * (dt * shrink)[:, None]).to(dtype)
            db += tl.dot(dstate, tl.trans(scaled), input_precision=PRECISION)        # n k
        z = load_tile(z_at, row * W, lane, inside, lane < P, 2)
        dy = load_tile(dv_at, row * W, lane, inside, lane < P, 2) * silu(z)
        dx += tl.load(skip_ptr + group % 2 * H + head) * dy
        dx *= silu_grad(load_tile(x_at, row * D_XBC, lane, inside, lane < P, 2))
        store_tile(pre + head * P, row * D_XBC, lane, dx, inside, lane < P)
        steps = ((group * H * SPLITS + tile) * chunks + chunk) * Q + q
        tl.store(ddt_ptr + steps, ddt)
        tl.store(da_ptr + steps, da)
    c = load_tile(bc_ptr + first * (2 * N) + N, row * (2 * N), n, inside, n < N).to(dtype)
    db += tl.dot(tl.trans(c), tl.trans(dbc.to(dtype)), input_precision=PRECISION)    # n k
    b_pre = load_tile(pre + D_INNER, row * D_XBC, n, inside, n < N)
    db = tl.trans(db) * silu_grad(b_pre)
    store_tile(pre + D_INNER, row * D_XBC, n, db, inside, n < N)


@triton.jit(do_not_specialize=RUNTIME)
def dt_backward(
    proj_ptr, dt_bias_ptr, a_log_ptr, dt_ptr, ddt_ptr, da_query_ptr, da_key_ptr, kept_ptr,
    dproj_ptr, partial_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """From ddt and da to the raw dt in dproj, with each program's sum for dt_bias and A_log."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, h = tl.arange(0, Q), tl.arange(0, BLOCK_H)
    heads, inside = h < H, chunk * Q + q < length
    ddt = tl.zeros((Q, BLOCK_H), dtype=tl.float32)
    da = tl.zeros((Q, BLOCK_H), dtype=tl.float32)
    kept = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        tile = h * SPLITS + split
        at = ((group * H * SPLITS + tile[None, :]) * chunks + chunk) * Q + q[:, None]
        ddt += tl.load(ddt_ptr + at, mask=heads[None, :], other=0.0)
        da += tl.load(da_query_ptr + at, mask=heads[None, :], other=0.0)
        da += tl.load(da_key_ptr + at, mask=heads[None, :], other=0.0)
        if HAS_STATE:
            slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS + tile
            kept += tl.load(kept_ptr + slot, mask=h < tl.where(chunk > 0, H, 0), other=0.0)
    # A cumulative sum's gradient is the cumulative sum from the end.
    dlog = tl.cumsum(da, axis=0, reverse=True) + kept[None, :]
    parameter = group % 2 * H + h
    rate = -tl.exp(tl.load(a_log_ptr + parameter, mask=heads, other=0.0))[None, :]
    bias = tl.load(dt_bias_ptr + parameter, mask=heads, other=0.0)
    at = ((group * H + h[None, :]) * chunks + chunk) * Q + q[:, None]
    dt = tl.load(dt_ptr + at, mask=heads[None, :], other=0.0)
    raw = load_tile(proj_ptr + first * W + W - H, row * W, h, inside, heads)
    draw = (ddt + rate * dlog) * tl.sigmoid(raw + bias[None, :])
    draw = tl.where(inside[:, None], draw, 0.0)
    store_tile(dproj_ptr + first * W + W - H, row * W, h, draw, inside, heads)
    partial = partial_ptr + pid * (2 * H) + h
    tl.store(partial, tl.sum(draw, axis=0), mask=heads)
    tl.store(partial + H, tl.sum(rate * dt * dlog, axis=0), mask=heads)


@triton.jit(do_not_specialize=RUNTIME)
def conv_backward(
    proj_ptr, weight_ptr, dxbc_ptr, dproj_ptr, partial_ptr,
    inner, outer_stride, inner_stride, step, length, sequences, span,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, D_CONV: tl.constexpr,
    Q: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dxBC through the convolution into dproj; a program sums dw and dbias of `span` sequences."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (D_XBC + BLOCK_C - 1) // BLOCK_C
    channel = (pid % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    direction, part = pid // blocks % 2, pid // blocks // 2
    valid = channel < D_XBC
    stride = ((1 - 2 * direction) * 2 * step).to(tl.int32)
    dbias = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
    dw0 = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
    dw1 = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
    dw2 = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
    dw3 = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
    for seq in range(part * span, tl.minimum(part * span + span, sequences)):
        for chunk in range((length + Q - 1) // Q):
            first, row = locate(
                seq * 2 + direction, chunk, inner, outer_stride, inner_stride, step, length, Q
            )
            pos = chunk * Q + tl.arange(0, Q)
            at = first * W + D_INNER
            raw = load_tile(proj_ptr + at, row * W, channel, pos < length, valid)
            total = tl.zeros((Q, BLOCK_C), dtype=tl.float32)
            for ahead in tl.static_range(D_CONV):
                inside = pos + ahead < length
                next_row = (row + ahead * stride) * D_XBC
                grad = load_tile(dxbc_ptr + first * D_XBC, next_row, channel, inside, valid)
                taps = weight_ptr + (direction * D_CONV + D_CONV - 1 - ahead) * D_XBC
                total += tl.load(taps + channel, mask=valid, other=0.0)[None, :] * grad
                if ahead == 0:
                    dbias += grad
                    dw0 += raw * grad
                elif ahead == 1:
                    dw1 += raw * grad
                elif ahead == 2:
                    dw2 += raw * grad
                else:
                    dw3 += raw * grad
            store_tile(dproj_ptr + at, row * W, channel, total, pos < length, valid)
    # Rows of a partial: the bias, then the taps from the current step back.
    at = partial_ptr + (part * 2 + direction) * (D_CONV + 1) * D_XBC + channel
    tl.store(at, tl.sum(dbias, axis=0), mask=valid)
    tl.store(at + D_XBC, tl.sum(dw0, axis=0), mask=valid)
    tl.store(at + 2 * D_XBC, tl.sum(dw1, axis=0), mask=valid)
    if D_CONV > 2:
        tl.store(at + 3 * D_XBC, tl.sum(dw2, axis=0), mask=valid)
    if D_CONV > 3:
        tl.store(at + 4 * D_XBC, tl.sum(dw3, axis=0), mask=valid)
