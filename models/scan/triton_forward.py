"""Forward kernels of the bidirectional mixer core: convolution, scan, gate and norm.

    x, B, C = silu(conv(xBC))            dt = softplus(dt_raw + dt_bias)     A = -exp(A_log)
    a_q     = A (dt_1 + ... + dt_q)      the log-decay since the start of the chunk
    y_q     = sum_{k <= q} (C_q . B_k) exp(a_q - a_k) dt_k x_k  +  exp(a_q) C_q S  +  D x_q
    S'      = exp(a_Q) S + sum_k exp(a_Q - a_k) dt_k B_k x_k^T                       (next chunk)
    n       = v rsqrt(mean(v^2) + eps),  v = y silu(z)
(the state-space dual form of Mamba-2, arXiv 2405.21060, section 6).

Tile: Q steps of one sequence and direction. `chunk_forward` forms B C^T once and loops over the
heads, so a sequence of at most Q steps is a single program and has no state. Longer ones first run
`state_forward`, one program per head, which sweeps the chunks with S in registers.
A *row* is a (token, direction) pair: proj, out and rstd are addressed by row, and the backward
direction walks its rows from the end, so nothing is flipped or permuted.

Memory per row, in elements (paper: d_inner 1024, n 128, Q 64):
    conv_forward    reads d_inner + 2 n          writes d_inner + 4 n
    state_forward   reads d_inner + n            writes d_inner n / Q
    chunk_forward   reads 2 d_inner + 2 n, d_inner n / Q where there is a state
                    writes d_inner, and rescales it while it is in L2
The convolution is a kernel of its own because inside the others Triton recomputes it for each
layout in which a product or a sum wants x, which costs more than the trip through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not compiled in: another length, batch or axis runs the same kernel.
RUNTIME = (
    *("inner", "outer_stride", "inner_stride", "step", "length", "chunks"),
    *("sequences", "span", "rows"),
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
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_grad(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def softplus(x):
    """log(1 + e^x) to full relative precision: small e^x goes through the series of atanh."""
    e = tl.exp(tl.minimum(x, 20.0))
    s = e / (2 + e)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 / 9))))
    return tl.where(x > 20.0, x, tl.where(e < 0.25, series, tl.log(1 + e)))


@triton.jit
def decay_matrix(a, Q: tl.constexpr):
    """exp(a_q - a_k) where k <= q, else 0; masked before exp, which would overflow above."""
    i = tl.arange(0, Q)
    difference = tl.where(i[:, None] <= i[None, :], a[None, :] - a[:, None], float("-inf"))
    return tl.exp(difference)                                                        # k q


@triton.jit
def load_tile(ptr, row, column, inside, in_columns, USE: tl.constexpr = 0):
    """A float32 tile, 0 outside; `row` and `column` are offsets in elements.

    USE 1 and 2 are the first and the last use of a tile that is loaded again: their cache policies
    differ, so that the compiler keeps the loads apart and holds no registers in between.
    """
    mask = inside[:, None] & in_columns[None, :]
    at = ptr + (row[:, None] + column[None, :])
    if USE == 1:
        value = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last")
    elif USE == 2:
        value = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def store_tile(ptr, row, column, value, inside, in_columns):
    mask = inside[:, None] & in_columns[None, :]
    tl.store(ptr + (row[:, None] + column[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward(
    x_ptr, n_ptr, rstd_ptr, rows, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """n = x rsqrt(mean(x^2) + eps) by row, and the factor itself."""
    start = tl.program_id(0).to(tl.int64) * R
    row, d = tl.arange(0, R), tl.arange(0, BLOCK_D)
    inside = start + row < rows
    x = load_tile(x_ptr + start * D, row * D, d, inside, d < D)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + start + row, rstd, mask=inside)
    store_tile(n_ptr + start * D, row * D, d, x * rstd[:, None], inside, d < D)


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
    raw = load_tile(proj_ptr + first * W + W - H, row * W, h, pos < length, h < H)
    bias = tl.load(dt_bias_ptr + parameter, mask=h < H, other=0.0)
    rate = -tl.exp(tl.load(a_log_ptr + parameter, mask=h < H, other=0.0))
    dt = tl.where((pos < length)[:, None], softplus(raw + bias[None, :]), 0.0)
    at = (group * H + h[None, :]) * (chunks * Q) + pos[:, None]
    tl.store(dt_ptr + at, dt, mask=(h < H)[None, :])
    tl.store(decay_ptr + at, tl.cumsum(dt * rate[None, :], axis=0), mask=(h < H)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def conv_forward(
    proj_ptr, weight_ptr, bias_ptr, pre_ptr, bc_ptr,
    inner, outer_stride, inner_stride, step, length, chunks,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, D_CONV: tl.constexpr,
    Q: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Causal depthwise convolution of xBC before its SiLU [row, d_xbc], and B, C after it."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (D_XBC + BLOCK_C - 1) // BLOCK_C
    channel = (pid % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    group, chunk = pid // blocks // chunks, pid // blocks % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    stride = ((1 - 2 * (group % 2)) * 2 * step).to(tl.int32)
    pos = chunk * Q + tl.arange(0, Q)
    valid = channel < D_XBC
    out = tl.load(bias_ptr + group % 2 * D_XBC + channel, mask=valid, other=0.0)[None, :]
    for tap in tl.static_range(D_CONV):
        back = D_CONV - 1 - tap
        taps = weight_ptr + (group % 2 * D_CONV + tap) * D_XBC
        w = tl.load(taps + channel, mask=valid, other=0.0)
        inside = (pos >= back) & (pos < length)
        xbc = proj_ptr + first * W + D_INNER
        out += load_tile(xbc, (row - back * stride) * W, channel, inside, valid) * w[None, :]
    store_tile(pre_ptr + first * D_XBC, row * D_XBC, channel, out, pos < length, valid)
    width: tl.constexpr = D_XBC - D_INNER
    bc = bc_ptr + first * width - D_INNER
    store_tile(bc, row * width, channel, silu(out), pos < length, valid & (channel >= D_INNER))


@triton.jit(do_not_specialize=RUNTIME)
def state_forward(
    pre_ptr, bc_ptr, dt_ptr, decay_ptr, state_ptr,
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
    dtype = pre_ptr.dtype.element_ty
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for chunk in range(chunks - 1):
        first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
        pre = pre_ptr + first * D_XBC
        inside = chunk * Q + q < length
        b = load_tile(bc_ptr + first * (2 * N), row * (2 * N), n, inside, n < N).to(dtype)
        x = silu(load_tile(pre + head * P, row * D_XBC, lane, inside, lane < P))
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        a_end = tl.load(decay_ptr + steps + Q - 1)
        weighted = (x * (dt * tl.exp(a_end - a))[:, None]).to(dtype)                 # q p
        state *= tl.exp(a_end)
        state += tl.dot(tl.trans(b), weighted, input_precision=PRECISION)            # n p
        slot = (group * (chunks - 1) + chunk) * H * SPLITS + tile
        tl.store(state_ptr + slot * BLOCK_N * BLOCK_P + at, state.to(dtype))


@triton.jit(do_not_specialize=RUNTIME)
def chunk_forward(
    proj_ptr, skip_ptr, pre_ptr, bc_ptr, dt_ptr, decay_ptr, state_ptr, out_ptr, rstd_ptr,
    inner, outer_stride, inner_stride, step, length, chunks, eps,
    W: tl.constexpr, D_INNER: tl.constexpr, D_XBC: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """All heads of one chunk: y, gate, then the norm over d_inner once every head is known."""
    pid = tl.program_id(0).to(tl.int64)
    group, chunk = pid // chunks, pid % chunks
    first, row = locate(group, chunk, inner, outer_stride, inner_stride, step, length, Q)
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = chunk * Q + q < length
    dtype = proj_ptr.dtype.element_ty
    pre, out = pre_ptr + first * D_XBC, out_ptr + first * D_INNER
    b = load_tile(bc_ptr + first * (2 * N), row * (2 * N), n, inside, n < N).to(dtype)
    c = load_tile(bc_ptr + first * (2 * N) + N, row * (2 * N), n, inside, n < N).to(dtype)
    bc = tl.dot(b, tl.trans(c), input_precision=PRECISION)                           # k q
    square_sum = tl.zeros((Q,), dtype=tl.float32)
    slot = (group * (chunks - 1) + chunk - 1) * H * SPLITS
    for tile in range(H * SPLITS):
        head, lane = tile // SPLITS, tile % SPLITS * BLOCK_P + p
        steps = ((group * H + head) * chunks + chunk) * Q
        dt, a = tl.load(dt_ptr + steps + q), tl.load(decay_ptr + steps + q)
        x = silu(load_tile(pre + head * P, row * D_XBC, lane, inside, lane < P))
        mix = tl.trans((bc * decay_matrix(a, Q) * dt[:, None]).to(dtype))            # q k
        y = tl.dot(mix, x.to(dtype), input_precision=PRECISION)                      # q p
        if HAS_STATE:
            at = state_ptr + (slot + tile) * BLOCK_N * BLOCK_P
            entering = n < tl.where(chunk > 0, BLOCK_N, 0)
            state = load_tile(at, n * BLOCK_P, p, entering, p < BLOCK_P).to(dtype)
            y += tl.exp(a)[:, None] * tl.dot(c, state, input_precision=PRECISION)
        y += tl.load(skip_ptr + group % 2 * H + head) * x
        z = load_tile(proj_ptr + first * W + head * P, row * W, lane, inside, lane < P)
        v = y * silu(z)
        square_sum += tl.sum(v * v, axis=1)
        store_tile(out + head * P, row * D_INNER, lane, v, inside, lane < P)
    rstd = tl.rsqrt(square_sum / D_INNER + eps)
    tl.store(rstd_ptr + first + row, rstd, mask=inside)
    tl.debug_barrier()
    for tile in range(H * SPLITS):
        at, lane = out + tile // SPLITS * P, tile % SPLITS * BLOCK_P + p
        v = load_tile(at, row * D_INNER, lane, inside, lane < P)
        store_tile(at, row * D_INNER, lane, v * rstd[:, None], inside, lane < P)
