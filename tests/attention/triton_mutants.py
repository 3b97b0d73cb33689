"""Bugs planted in `triton_kernel.py`, most of them after one that a real kernel shipped with.

(name, a fragment that occurs once, its replacement, patterns of the cases meant to catch it[, why none can]);
selfsup attention mutants tests/attention/triton_mutants.py --interpret
"""

KERNEL = "triton_attention"
SOURCES = ["triton_kernel.py"]

TAILS = [
    ("forward key tail", "allowed = (rows < L)[:, None] & (keys < S)[None, :]",
     "allowed = (rows < L)[:, None] & (keys >= 0)[None, :]",
     ("tail/*-fp32",)),  # s not a multiple of the tile
    ("dk dv query tail", "(keys < S)[:, None] & (rows < L)[None, :]",
     "(keys < S)[:, None] & (rows >= 0)[None, :]",
     ("tail/*-fp32-grad",)),  # l not a multiple of the tile: dK, dV not finite
    ("dk dv key tail", "(keys < S)[:, None] & (rows < L)[None, :]",
     "(keys >= 0)[:, None] & (rows < L)[None, :]",
     (),
     "column j of P^T and dS^T enters row j of dK and dV only, and rows j >= s are not stored"),
    ("dq key tail", "allowed_q = (rows < L)[:, None] & (keys < S)[None, :]",
     "allowed_q = (rows < L)[:, None] & (keys >= 0)[None, :]",
     ("logits/very-negative-fp32-grad",)),  # every logit below -90 and s not a multiple of the tile: dQ not finite
    ("forward value rows unmasked", "V, v_strides, b, h_kv, keys, dims), mask=keys_ok,",
     "V, v_strides, b, h_kv, keys, dims), mask=dims_ok,",
     ("strides/padded-fp32",)),  # NaN past the end of v, s not a multiple of the tile
    ("dq key rows unmasked", "K, k_strides, b, group, keys, dims), mask=keys_ok_q",
     "K, k_strides, b, group, keys, dims), mask=dims_ok_q",
     ("strides/padded-fp32-grad",)),  # NaN past the end of k, s not a multiple of the tile
    ("dk query rows unmasked", "Q, q_strides, b, h, rows, dims), mask=rows_ok_t",
     "Q, q_strides, b, h, rows, dims), mask=dims_ok_t",
     ("strides/padded-fp32-grad",)),  # NaN past the end of q, l not a multiple of the tile
    ("forward drops the last tile", "stop = S\n",
     "stop = S // BN * BN\n",
     ("tail/*-fp32",)),  # s not a multiple of the tile
    ("dq drops the last tile", "end = S\n",
     "end = S // BN * BN\n",
     ("tail/*-fp32-grad",)),  # s not a multiple of the tile: dQ
    ("dk dv drops the last tile", "range(begin, L, BM)",
     "range(begin, L // BM * BM, BM)",
     ("tail/*-fp32-grad",)),  # l not a multiple of the tile: dK, dV
    ("forward width tail", "dims_ok = (dims < D)",
     "dims_ok = (dims < D_PAD)",
     ("width/40-fp32", "width/59-fp32", "strides/padded-fp32")),  # head dim not a power of two
    ("dk dv width tail", "dims_ok_t = (dims < D)",
     "dims_ok_t = (dims < D_PAD)",
     ("width/40-fp32-grad", "width/59-fp32-grad", "strides/padded-fp32-grad")),  # head dim not a power of two: dK, dV
    ("dq width tail", "dims_ok_q = (dims < D)",
     "dims_ok_q = (dims < D_PAD)",
     ("width/40-fp32-grad", "width/59-fp32-grad", "strides/padded-fp32-grad")),  # head dim not a power of two: dQ
]  # fmt: skip

SOFTMAX = [
    ("max starts at zero", 'm = tl.full([BM], float("-inf"), dtype=ACC)',
     "m = tl.zeros([BM], dtype=ACC)",
     ("logits/very-negative-fp32", "logits/very-positive-fp32")),  # every logit below -90
    ("no max", "m_new = tl.maximum(m, tl.max(s, axis=1))",
     "m_new = tl.zeros([BM], dtype=ACC)",
     ("logits/very-negative-fp32", "logits/very-positive-fp32")),  # logits above 90, or below -90
    ("max of this tile only", "m_new = tl.maximum(m, tl.max(s, axis=1))",
     "m_new = tl.max(s, axis=1)",
     ("logits/cliff-fp32",)),  # logits that fall by over 90 between tiles
    ("accumulator not rescaled", "acc = acc * rescale[:, None]",
     "acc = acc * 1.0",
     ("logits/rising-fp32", "tail/*-fp32")),  # s over one tile
    ("sum not rescaled", "total = total * rescale",
     "total = total * 1.0",
     ("logits/rising-fp32", "tail/*-fp32")),  # s over one tile
    ("no guard for empty tiles", 'm_safe = tl.where(m_new == float("-inf"), 0.0, m_new)',
     "m_safe = m_new",
     ("masked/first-keys-bool-fp32",)),  # a row whose first visited tile is masked
    ("empty row divides by zero", "divisor = tl.where(total == 0.0, 1.0, total)",
     "divisor = total",
     ("masked/rows-bool-fp32",)),  # a row without keys
    ("finite mask value", 's = tl.where(allowed, s, float("-inf"))',
     "s = tl.where(allowed, s, -1e9)",
     ("masked/rows-bool-fp32",)),  # a row without keys, in a tile that is visited
    ("empty row lse zero", "lse = m + tl.log(divisor)",
     'lse = tl.where(m == float("-inf"), 0.0, m) + tl.log(divisor)',
     ("lse/masked-fp32",)),  # the LSE output of a row without keys, nothing else
    ("lse in base two", "lse = m + tl.log(divisor)",
     "lse = m * 1.4426950408889634 + tl.log2(divisor)",
     ("lse/plain-fp32",)),  # the LSE output, any backward
    ("weights in fp16", "p.to(v.dtype)",
     "p.to(tl.float16).to(v.dtype)",
     ("tail/*-fp32",)),  # fp32 inputs, fp32 tolerance
    ("accumulator in fp16", 'v, acc, input_precision="ieee")',
     'v, acc, input_precision="ieee").to(tl.float16).to(ACC)',
     ("tail/*-fp32",)),  # fp32 inputs, fp32 tolerance
    ("backward weights in fp16", "p_t.to(do.dtype)",
     "p_t.to(tl.float16).to(do.dtype)",
     ("tail/*-fp32-grad",)),  # fp32 inputs: dV
]  # fmt: skip

CAUSAL = [
    ("alignments swapped", '"bottom_right" else 0',
     '"top_left" else 0',
     ("causal/*x*",)),  # causal, l != s
    ("forward causal off by one", "allowed = allowed & (keys[None, :] <= rows",
     "allowed = allowed & (keys[None, :] < rows",
     ("causal/17-fp32", "causal/64-fp32")),  # causal
    ("dk dv causal off by one", "allowed_t = allowed_t & (keys[:, None] <= rows",
     "allowed_t = allowed_t & (keys[:, None] < rows",
     ("causal/17-fp32-grad", "causal/64-fp32-grad")),  # causal: dK, dV
    ("dq causal off by one", "allowed_q = allowed_q & (keys[None, :] <= rows",
     "allowed_q = allowed_q & (keys[None, :] < rows",
     ("causal/17-fp32-grad", "causal/64-fp32-grad")),  # causal: dQ
    ("forward stops a tile early", "stop = tl.minimum(S, tile * BM + BM + shift)",
     "stop = tl.minimum(S, tile * BM + shift)",
     ("causal/17-fp32", "causal/64-fp32")),  # causal
    ("dq stops a tile early", "end = tl.minimum(S, tile * BM + BM + shift)",
     "end = tl.minimum(S, tile * BM + shift)",
     ("causal/17-fp32-grad", "causal/64-fp32-grad")),  # causal: dQ
    ("dk dv begins a tile late", "tl.maximum(0, tile * BN - shift) // BM * BM",
     "(tl.maximum(0, tile * BN - shift) + BM - 1) // BM * BM",
     ("causal/33x41-bottom_right-fp32-grad",)),  # causal bottom_right, s - l not a multiple of the tile: dK, dV
    ("forward stop ignores the shift", "stop = tl.minimum(S, tile * BM + BM + shift)",
     "stop = tl.minimum(S, tile * BM + BM)",
     ("causal/33x97-bottom_right-fp32",)),  # causal bottom_right, s > l by over a tile
]  # fmt: skip

SCALE = [
    ("forward ignores scale", 's = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * scale',
     's = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * D**-0.5',
     ("scale/0.37-fp32",)),  # a custom scale
    ("dk dv recomputes without scale", 's_t = tl.dot(k, tl.trans(q), input_precision="ieee").to(ACC) * scale',
     's_t = tl.dot(k, tl.trans(q), input_precision="ieee").to(ACC) * D**-0.5',
     ("scale/0.37-fp32-grad",)),  # a custom scale: dK, dV
    ("dk ignores scale", "dk = dk * scale",
     "dk = dk * D**-0.5",
     ("scale/0.37-fp32-grad",)),  # a custom scale: dK
    ("dq ignores scale", "dq = dq * scale",
     "dq = dq * D**-0.5",
     ("scale/0.37-fp32-grad",)),  # a custom scale: dQ
    ("scale of the padded width", "q.shape[-1] ** -0.5 if scale is None",
     "max(16, triton.next_power_of_2(q.shape[-1])) ** -0.5 if scale is None",
     ("width/40-fp32", "width/8-fp32")),  # head dim not a power of two
    ("scale zero means default", "float(scale)",
     "float(scale or q.shape[-1] ** -0.5)",
     ("scale/0-fp32",)),  # scale 0
]  # fmt: skip

LAYOUT = [
    ("forward k has q strides", "K, k_strides, b, h_kv,",
     "K, q_strides, b, h_kv,",
     ("strides/differing-fp32", "strides/cross-fp32")),  # l != s, or k and q laid out apart
    ("forward v has k strides", "V, v_strides, b, h_kv,",
     "V, k_strides, b, h_kv,",
     ("strides/differing-fp32",)),  # v and k laid out apart
    ("dk dv v has k strides", "V, v_strides, b, hk,",
     "V, k_strides, b, hk,",
     ("strides/differing-fp32-grad",)),  # v and k laid out apart: dK
    ("dq v has k strides", "V, v_strides, b, group,",
     "V, k_strides, b, group,",
     ("strides/differing-fp32-grad",)),  # v and k laid out apart: dQ
    ("delta do has o strides", "do_strides, b, h, rows, dims), mask=inside",
     "o_strides, b, h, rows, dims), mask=inside",
     ("strides/grad-*",)),  # dO not contiguous: dQ, dK
    ("dk dv do has q strides", "do_strides, b, h, rows, dims), mask=rows_ok_t",
     "q_strides, b, h, rows, dims), mask=rows_ok_t",
     ("strides/grad-*",)),  # dO laid out unlike q: dK, dV
    ("dq do has dq strides", "do_strides, b, h, rows, dims), mask=rows_ok_q",
     "dq_strides, b, h, rows, dims), mask=rows_ok_q",
     ("strides/grad-*",)),  # dO not contiguous: dQ
    ("last dimension contiguous", "cols[None, :].to(tl.int64) * strides[3]",
     "cols[None, :].to(tl.int64)",
     ("strides/differing-fp32", "strides/grad-columns*")),  # a last stride that is not 1: transposed, or a broadcast mask
    ("dlse contiguous", "rows.to(tl.int64) * dlse_strides[2]",
     "rows.to(tl.int64)",
     ("lse/grad-strides*",)),  # dLSE not contiguous
]  # fmt: skip

HEADS_AND_MASKS = [
    ("forward heads interleaved", "h_kv = h // GROUP",
     "h_kv = h % (H // GROUP)",
     ("gqa/6-2-fp32", "gqa/8-4-fp32")),  # GQA with 2 key heads or more
    ("dq heads interleaved", "group = h // GROUP",
     "group = h % (H // GROUP)",
     ("gqa/6-2-fp32-grad", "gqa/8-4-fp32-grad")),  # GQA with 2 key heads or more: dQ
    ("dk dv heads interleaved", "h = hk * GROUP + member",
     "h = member * HK + hk",
     ("gqa/6-2-fp32-grad", "gqa/8-4-fp32-grad")),  # GQA with 2 key heads or more: dK, dV
    ("dk dv of the last head only", "for member in range(0, GROUP)",
     "for member in range(GROUP - 1, GROUP)",
     ("gqa/6-2-fp32-grad", "gqa/8-4-fp32-grad")),  # GQA: dK, dV
    ("dk dv rows of another batch", "b * HK * GROUP + h)",
     "b * HK + h)",
     ("gqa/6-2-fp32-grad", "gqa/8-4-fp32-grad")),  # GQA with batch 2 or more: dK, dV
    ("forward mask of batch zero", "Mask, mask_strides, b, h, rows, keys), mask=allowed,",
     "Mask, mask_strides, b * 0, h, rows, keys), mask=allowed,",
     ("mask/bool-b11s-fp32", "mask/bool-bhls-fp32")),  # a mask that differs between examples
    ("dq mask of head zero", "Mask, mask_strides, b, h, rows, keys), mask=allowed_q,",
     "Mask, mask_strides, b, h * 0, rows, keys), mask=allowed_q,",
     ("mask/bool-1hls-fp32-grad", "mask/bool-bhls-fp32-grad")),  # a mask that differs between heads: dQ
    ("dk dv ignores the mask", "allowed_t & (tl.load(tl.trans(seen), mask=allowed_t, other=0) != 0)",
     "allowed_t",
     ("mask/bool-ls-fp32-grad",)),  # a mask: dK, dV
    ("dq ignores the mask", "allowed_q & (seen != 0)",
     "allowed_q",
     ("mask/bool-ls-fp32-grad",)),  # a mask: dQ
]  # fmt: skip

GRADIENTS = [
    ("delta without output", "o.to(ACC) * do.to(ACC)",
     "do.to(ACC)",
     ("tail/*-fp32-grad",)),  # any backward: dQ, dK
    ("dlse ignored", "delta = delta - dlse",
     "delta = delta",
     ("lse/plain-fp32-grad",)),  # a loss that uses the LSE
    ("dlse sign", "delta = delta - dlse",
     "delta = delta + dlse",
     ("lse/plain-fp32-grad",)),  # a loss that uses the LSE
    ("dk delta sign", "(dp_t - delta[None, :])",
     "(dp_t + delta[None, :])",
     ("tail/*-fp32-grad",)),  # any backward: dK
    ("dq without delta", "(dp_q - delta[:, None])",
     "dp_q",
     ("tail/*-fp32-grad",)),  # any backward: dQ
    ("ds in fp16", "ds_t.to(q.dtype)",
     "ds_t.to(tl.float16).to(q.dtype)",
     ("tail/*-fp32-grad",)),  # fp32 inputs: dK
]  # fmt: skip

MUTANTS = [*TAILS, *SOFTMAX, *CAUSAL, *SCALE, *LAYOUT, *HEADS_AND_MASKS, *GRADIENTS]
