"""A small Triton attention, forward and backward: the right kernel that the mutants are wrong copies of.

Written for reading and for planting bugs in, not for speed: 16x16 tiles, so that tails and several
tiles occur at lengths the CPU interpreter can afford. One decision stands on one line, and the three
kernels with a score matrix repeat themselves under other names (s, s_t, s_q), so that a line of
`triton_mutants.py` plants its bug in one of them only. For the maths see `delta_kernel`.
"""

import torch
import triton
import triton.language as tl

from selfsup.conformance.claims import attention_kernel

BLOCK_M = 16  # query rows in a tile
BLOCK_N = 16  # keys in a tile


@triton.jit
def tile_at(base, strides, b, h, rows, cols):
    """Pointers to base[b, h, rows, cols]; 64 bits, as a large tensor passes 2**31 elements."""
    base += b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return base + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]


@triton.jit
def forward_kernel(
    Q, K, V, Mask, Out, Lse,
    q_strides, k_strides, v_strides, mask_strides, o_strides,
    H, L, S, scale, shift,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows: softmax over the keys in one pass, with a running max m and sum."""
    bh, tile = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    h_kv = h // GROUP
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D_PAD)
    dims_ok = (dims < D)[None, :]
    q = tl.load(tile_at(Q, q_strides, b, h, rows, dims), mask=(rows < L)[:, None] & dims_ok, other=0.0)
    m = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    acc = tl.zeros([BM, D_PAD], dtype=ACC)
    stop = S
    if CAUSAL:
        stop = tl.minimum(S, tile * BM + BM + shift)
    for start in range(0, stop, BN):
        keys = start + tl.arange(0, BN)
        keys_ok = (keys < S)[:, None] & dims_ok
        k = tl.load(tile_at(K, k_strides, b, h_kv, keys, dims), mask=keys_ok, other=0.0)
        v = tl.load(tile_at(V, v_strides, b, h_kv, keys, dims), mask=keys_ok, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * scale
        allowed = (rows < L)[:, None] & (keys < S)[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= rows[:, None] + shift)
        if HAS_MASK:
            seen = tl.load(tile_at(Mask, mask_strides, b, h, rows, keys), mask=allowed, other=0)
            allowed = allowed & (seen != 0)
        s = tl.where(allowed, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has met no key yet has m = -inf, and -inf - -inf would be NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp(s - m_safe[:, None])
        rescale = tl.exp(m - m_safe)
        total = total * rescale
        total = total + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    divisor = tl.where(total == 0.0, 1.0, total)  # a row without keys: output 0, and LSE stays at m = -inf
    out = acc / divisor[:, None]
    lse = m + tl.log(divisor)
    o_ok = (rows < L)[:, None] & (dims < D)[None, :]
    tl.store(tile_at(Out, o_strides, b, h, rows, dims), out.to(q.dtype), mask=o_ok)
    tl.store(Lse + bh.to(tl.int64) * L + rows, lse, mask=rows < L)


@triton.jit
def delta_kernel(
    Out, dO, dLse, Delta, o_strides, do_strides, dlse_strides, H, L,
    D: tl.constexpr, D_PAD: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Delta_i = dO_i . O_i - dLSE_i, which makes dS_ij = P_ij (dO_i . V_j - Delta_i) for both outputs.

    P = exp(S - LSE) gives dP = dO V^T, dS = P (dP - rowsum(P dP)) and rowsum(P dP) = dO . O;
    dLSE / dS = P adds P dLSE.
    """
    bh, tile = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D_PAD)
    inside = (rows < L)[:, None] & (dims < D)[None, :]
    o = tl.load(tile_at(Out, o_strides, b, h, rows, dims), mask=inside, other=0.0)
    do = tl.load(tile_at(dO, do_strides, b, h, rows, dims), mask=inside, other=0.0)
    delta = tl.sum(o.to(ACC) * do.to(ACC), axis=1)
    if HAS_DLSE:
        first = dLse + b.to(tl.int64) * dlse_strides[0] + h.to(tl.int64) * dlse_strides[1]
        dlse = tl.load(first + rows.to(tl.int64) * dlse_strides[2], mask=rows < L, other=0.0)
        delta = delta - dlse
    tl.store(Delta + bh.to(tl.int64) * L + rows, delta, mask=rows < L)


@triton.jit
def dk_dv_kernel(
    Q, K, V, Mask, dO, Lse, Delta, dK, dV,
    q_strides, k_strides, v_strides, mask_strides, do_strides, dk_strides, dv_strides,
    HK, L, S, scale, shift,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of keys, over every query row of every head in its group: no atomics, so one result.

    The scores are held transposed, keys down and query rows across.
    """
    bh, tile = tl.program_id(0), tl.program_id(1)
    b, hk = bh // HK, bh % HK
    keys = tile * BN + tl.arange(0, BN)
    dims = tl.arange(0, D_PAD)
    dims_ok_t = (dims < D)[None, :]
    keys_ok_t = (keys < S)[:, None] & dims_ok_t
    k = tl.load(tile_at(K, k_strides, b, hk, keys, dims), mask=keys_ok_t, other=0.0)
    v = tl.load(tile_at(V, v_strides, b, hk, keys, dims), mask=keys_ok_t, other=0.0)
    dk = tl.zeros([BN, D_PAD], dtype=ACC)
    dv = tl.zeros([BN, D_PAD], dtype=ACC)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, tile * BN - shift) // BM * BM  # the first rows that see any of these keys
    for member in range(0, GROUP):
        h = hk * GROUP + member
        of_head = (b * HK * GROUP + h).to(tl.int64) * L
        for start in range(begin, L, BM):
            rows = start + tl.arange(0, BM)
            rows_ok_t = (rows < L)[:, None] & dims_ok_t
            q = tl.load(tile_at(Q, q_strides, b, h, rows, dims), mask=rows_ok_t, other=0.0)
            do = tl.load(tile_at(dO, do_strides, b, h, rows, dims), mask=rows_ok_t, other=0.0)
            lse = tl.load(Lse + of_head + rows, mask=rows < L, other=float("-inf"))
            delta = tl.load(Delta + of_head + rows, mask=rows < L, other=0.0)
            s_t = tl.dot(k, tl.trans(q), input_precision="ieee").to(ACC) * scale
            allowed_t = (keys < S)[:, None] & (rows < L)[None, :]
            if CAUSAL:
                allowed_t = allowed_t & (keys[:, None] <= rows[None, :] + shift)
            if HAS_MASK:
                seen = tile_at(Mask, mask_strides, b, h, rows, keys)
                allowed_t = allowed_t & (tl.load(tl.trans(seen), mask=allowed_t, other=0) != 0)
            # The choice is made before exp: a row without keys has LSE -inf, and its exp would overflow.
            p_t = tl.exp(tl.where(allowed_t, s_t - lse[None, :], float("-inf")))
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision="ieee")
            dp_t = tl.dot(v, tl.trans(do), input_precision="ieee").to(ACC)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
    dk = dk * scale
    kv_ok = (keys < S)[:, None] & (dims < D)[None, :]
    tl.store(tile_at(dK, dk_strides, b, hk, keys, dims), dk.to(k.dtype), mask=kv_ok)
    tl.store(tile_at(dV, dv_strides, b, hk, keys, dims), dv.to(v.dtype), mask=kv_ok)


@triton.jit
def dq_kernel(
    Q, K, V, Mask, dO, Lse, Delta, dQ,
    q_strides, k_strides, v_strides, mask_strides, do_strides, dq_strides,
    H, L, S, scale, shift,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows, over every key it sees."""
    bh, tile = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    group = h // GROUP
    rows = tile * BM + tl.arange(0, BM)
    dims = tl.arange(0, D_PAD)
    dims_ok_q = (dims < D)[None, :]
    rows_ok_q = (rows < L)[:, None] & dims_ok_q
    q = tl.load(tile_at(Q, q_strides, b, h, rows, dims), mask=rows_ok_q, other=0.0)
    do = tl.load(tile_at(dO, do_strides, b, h, rows, dims), mask=rows_ok_q, other=0.0)
    lse = tl.load(Lse + bh.to(tl.int64) * L + rows, mask=rows < L, other=float("-inf"))
    delta = tl.load(Delta + bh.to(tl.int64) * L + rows, mask=rows < L, other=0.0)
    dq = tl.zeros([BM, D_PAD], dtype=ACC)
    end = S
    if CAUSAL:
        end = tl.minimum(S, tile * BM + BM + shift)
    for start in range(0, end, BN):
        keys = start + tl.arange(0, BN)
        keys_ok_q = (keys < S)[:, None] & dims_ok_q
        k = tl.load(tile_at(K, k_strides, b, group, keys, dims), mask=keys_ok_q, other=0.0)
        v = tl.load(tile_at(V, v_strides, b, group, keys, dims), mask=keys_ok_q, other=0.0)
        s_q = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * scale
        allowed_q = (rows < L)[:, None] & (keys < S)[None, :]
        if CAUSAL:
            allowed_q = allowed_q & (keys[None, :] <= rows[:, None] + shift)
        if HAS_MASK:
            seen = tl.load(tile_at(Mask, mask_strides, b, h, rows, keys), mask=allowed_q, other=0)
            allowed_q = allowed_q & (seen != 0)
        p_q = tl.exp(tl.where(allowed_q, s_q - lse[:, None], float("-inf")))
        dp_q = tl.dot(do, tl.trans(v), input_precision="ieee").to(ACC)
        ds_q = p_q * (dp_q - delta[:, None])
        dq = tl.dot(ds_q.to(k.dtype), k, dq, input_precision="ieee")
    dq = dq * scale
    dq_ok = (rows < L)[:, None] & (dims < D)[None, :]
    tl.store(tile_at(dQ, dq_strides, b, h, rows, dims), dq.to(q.dtype), mask=dq_ok)


def launch(kernel, rows: int, block: int, batch: int, heads: int, *arguments, **constants) -> None:
    """Starts one program for each (batch, head) and tile of rows; an empty grid is not started."""
    if batch * heads * rows > 0:
        kernel[(batch * heads, triton.cdiv(rows, block))](*arguments, **constants)


class TritonAttention(torch.autograd.Function):
    """q, k, v -> (output, LSE), both differentiable once. `mask` is uint8 of shape (b, h, l, s) or None."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale: float, shift: int, causal: bool):
        (b, h, rows, d), (hk, keys) = q.shape, k.shape[1:3]
        o = torch.empty(b, h, rows, d, dtype=q.dtype, device=q.device)
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(b, h, rows, dtype=acc, device=q.device)
        ctx.constants = {
            "GROUP": h // max(hk, 1), "D": d, "D_PAD": max(16, triton.next_power_of_2(d)),
            "HAS_MASK": mask is not None, "CAUSAL": causal,
            "ACC": tl.float64 if acc == torch.float64 else tl.float32, "BM": BLOCK_M, "BN": BLOCK_N,
        }  # fmt: skip
        ctx.scale, ctx.shift = scale, shift
        mask = q if mask is None else mask  # a pointer that is never read
        launch(
            forward_kernel, rows, BLOCK_M, b, h, q, k, v, mask, o, lse,
            q.stride(), k.stride(), v.stride(), mask.stride(), o.stride(),
            h, rows, keys, scale, shift, **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, mask, o, lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        # once_differentiable would let grad(out.sum(), q, create_graph=True) through, as a constant.
        if torch.is_grad_enabled():
            raise RuntimeError("triton_attention has no second derivative: create_graph=True")
        q, k, v, mask, o, lse = ctx.saved_tensors
        (b, h, rows, d), (hk, keys) = q.shape, k.shape[1:3]
        do = torch.zeros_like(o) if do is None else do
        delta = torch.empty_like(lse)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        has_dlse, dlse = dlse is not None, delta if dlse is None else dlse
        launch(
            delta_kernel, rows, BLOCK_M, b, h, o, do, dlse, delta,
            o.stride(), do.stride(), dlse.stride(), h, rows,
            D=d, D_PAD=ctx.constants["D_PAD"], HAS_DLSE=has_dlse, ACC=ctx.constants["ACC"], BM=BLOCK_M,
        )  # fmt: skip
        inputs = (q, k, v, mask, do, lse, delta)
        strides = (q.stride(), k.stride(), v.stride(), mask.stride(), do.stride())
        sizes = (rows, keys, ctx.scale, ctx.shift)
        launch(
            dk_dv_kernel, keys, BLOCK_N, b, hk, *inputs, dk, dv, *strides, dk.stride(), dv.stride(),
            hk, *sizes, **ctx.constants,
        )  # fmt: skip
        launch(dq_kernel, rows, BLOCK_M, b, h, *inputs, dq, *strides, dq.stride(), h, *sizes, **ctx.constants)
        return dq, dk, dv, None, None, None, None


@attention_kernel(
    "fp32", "fp16", "bf16", "fp64", "backward", "cross", "scale", "causal", "top_left", "bottom_right", "gqa",
    "bool_mask", "masked_rows", "lse", "lse_grad", "empty", "deterministic", "linear_memory",
    head_dims=range(1, 129),
)  # fmt: skip
def triton_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    *, causal_align="top_left", return_lse=False,
):  # fmt: skip
    """Attention in the order and meaning of torch's scaled_dot_product_attention, on (b, h, l, d).

    causal_align: query i sees keys 0..i ("top_left") or 0..i + s - l ("bottom_right").
    return_lse: also the natural log of each row's sum of exp(scores), float32 (float64 for float64
    inputs), -inf for a row without keys. Such a row gives zeros, in value and gradient.
    Raises ValueError for what it cannot honour: dropout, float masks, v of another head dim.
    """
    check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, causal_align)
    rows, keys = q.shape[2], k.shape[2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], keys).view(torch.uint8)
    shift = keys - rows if causal_align == "bottom_right" else 0
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, lse = TritonAttention.apply(q, k, v, attn_mask, scale, shift, is_causal)
    return (o, lse) if return_lse else o


def check(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, causal_align) -> None:
    """Raises ValueError, naming the argument, for what the kernels above would compute wrongly."""
    h, hk = (x.shape[1] if x.ndim == 4 else -1 for x in (q, k))
    problems = {
        "q, k, v: four dimensions (b, h, l, d)": any(x.ndim != 4 for x in (q, k, v)),
        "q, k, v: one floating dtype": len({x.dtype for x in (q, k, v)}) > 1 or not q.is_floating_point(),
        "q, k, v: one batch size, and one shape for k and v": q.shape[0] != k.shape[0] or k.shape != v.shape,
        "q, k, v: one head dim of 1 to 128": q.shape[-1] != k.shape[-1] or not 1 <= q.shape[-1] <= 128,
        "enable_gqa: True where q and k differ in heads, with a whole ratio": h != hk
        and not (enable_gqa and hk > 0 and h % hk == 0),
        "attn_mask: bool": attn_mask is not None and attn_mask.dtype != torch.bool,
        "attn_mask, is_causal: at most one of them": attn_mask is not None and is_causal,
        "dropout_p: 0": dropout_p != 0,
        "causal_align: top_left or bottom_right": causal_align not in ("top_left", "bottom_right"),
    }
    wrong = [rule for rule, broken in problems.items() if broken]
    if wrong:
        raise ValueError(f"triton_attention takes {'; '.join(wrong)}")
