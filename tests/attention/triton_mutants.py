"""Bugs planted in `triton_kernel.py`, most of them after one that a real kernel shipped with.

(name, a fragment that occurs exactly once in that file, its replacement, the case that must catch it);
a last field that starts with "equivalent:" proves instead that no case can.
"""

TAILS = [
    ("forward_key_tail", "allowed = (rows < L)[:, None] & (keys < S)[None, :]",
     "allowed = (rows < L)[:, None] & (keys >= 0)[None, :]", "s not a multiple of the tile"),
    ("dk_dv_query_tail", "(keys < S)[:, None] & (rows < L)[None, :]",
     "(keys < S)[:, None] & (rows >= 0)[None, :]", "l not a multiple of the tile: dK, dV not finite"),
    ("dk_dv_key_tail", "(keys < S)[:, None] & (rows < L)[None, :]",
     "(keys >= 0)[:, None] & (rows < L)[None, :]",
     "equivalent: column j of P^T and dS^T enters row j of dK and dV only, and rows j >= s are not stored"),
    ("dq_key_tail", "allowed_q = (rows < L)[:, None] & (keys < S)[None, :]",
     "allowed_q = (rows < L)[:, None] & (keys >= 0)[None, :]",
     "every logit below -90 and s not a multiple of the tile: dQ not finite"),
    ("forward_value_rows_unmasked", "V, v_strides, b, h_kv, keys, dims), mask=keys_ok,",
     "V, v_strides, b, h_kv, keys, dims), mask=dims_ok,",
     "NaN past the end of v, s not a multiple of the tile"),
    ("dq_key_rows_unmasked", "K, k_strides, b, group, keys, dims), mask=keys_ok_q",
     "K, k_strides, b, group, keys, dims), mask=dims_ok_q",
     "NaN past the end of k, s not a multiple of the tile"),
    ("dk_query_rows_unmasked", "Q, q_strides, b, h, rows, dims), mask=rows_ok_t",
     "Q, q_strides, b, h, rows, dims), mask=dims_ok_t",
     "NaN past the end of q, l not a multiple of the tile"),
    ("forward_drops_the_last_tile", "stop = S\n", "stop = S // BN * BN\n", "s not a multiple of the tile"),
    ("dq_drops_the_last_tile", "end = S\n", "end = S // BN * BN\n", "s not a multiple of the tile: dQ"),
    ("dk_dv_drops_the_last_tile", "range(begin, L, BM)", "range(begin, L // BM * BM, BM)",
     "l not a multiple of the tile: dK, dV"),
    ("forward_width_tail", "dims_ok = (dims < D)", "dims_ok = (dims < D_PAD)", "head dim not a power of two"),
    ("dk_dv_width_tail", "dims_ok_t = (dims < D)", "dims_ok_t = (dims < D_PAD)",
     "head dim not a power of two: dK, dV"),
    ("dq_width_tail", "dims_ok_q = (dims < D)", "dims_ok_q = (dims < D_PAD)",
     "head dim not a power of two: dQ"),
]  # fmt: skip

SOFTMAX = [
    ("max_starts_at_zero", 'm = tl.full([BM], float("-inf"), dtype=ACC)', "m = tl.zeros([BM], dtype=ACC)",
     "every logit below -90"),
    ("no_max", "m_new = tl.maximum(m, tl.max(s, axis=1))", "m_new = tl.zeros([BM], dtype=ACC)",
     "logits above 90, or below -90"),
    ("max_of_this_tile_only", "m_new = tl.maximum(m, tl.max(s, axis=1))", "m_new = tl.max(s, axis=1)",
     "logits that fall by over 90 between tiles"),
    ("accumulator_not_rescaled", "acc = acc * rescale[:, None]", "acc = acc * 1.0", "s over one tile"),
    ("sum_not_rescaled", "total = total * rescale", "total = total * 1.0", "s over one tile"),
    ("no_guard_for_empty_tiles", 'm_safe = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_safe = m_new",
     "a row whose first visited tile is masked"),
    ("empty_row_divides_by_zero", "divisor = tl.where(total == 0.0, 1.0, total)", "divisor = total",
     "a row without keys"),
    ("finite_mask_value", 's = tl.where(allowed, s, float("-inf"))', "s = tl.where(allowed, s, -1e9)",
     "a row without keys, in a tile that is visited"),
    ("empty_row_lse_zero", "lse = m + tl.log(divisor)",
     'lse = tl.where(m == float("-inf"), 0.0, m) + tl.log(divisor)',
     "the LSE output of a row without keys, nothing else"),
    ("lse_in_base_two", "lse = m + tl.log(divisor)", "lse = m * 1.4426950408889634 + tl.log2(divisor)",
     "the LSE output, any backward"),
    ("weights_in_fp16", "p.to(v.dtype)", "p.to(tl.float16).to(v.dtype)", "fp32 inputs, fp32 tolerance"),
    ("accumulator_in_fp16", 'v, acc, input_precision="ieee")',
     'v, acc, input_precision="ieee").to(tl.float16).to(ACC)', "fp32 inputs, fp32 tolerance"),
    ("backward_weights_in_fp16", "p_t.to(do.dtype)", "p_t.to(tl.float16).to(do.dtype)", "fp32 inputs: dV"),
]  # fmt: skip

CAUSAL = [
    ("alignments_swapped", '"bottom_right" else 0', '"top_left" else 0', "causal, l != s"),
    ("forward_causal_off_by_one", "allowed = allowed & (keys[None, :] <= rows",
     "allowed = allowed & (keys[None, :] < rows", "causal"),
    ("dk_dv_causal_off_by_one", "allowed_t = allowed_t & (keys[:, None] <= rows",
     "allowed_t = allowed_t & (keys[:, None] < rows", "causal: dK, dV"),
    ("dq_causal_off_by_one", "allowed_q = allowed_q & (keys[None, :] <= rows",
     "allowed_q = allowed_q & (keys[None, :] < rows", "causal: dQ"),
    ("forward_stops_a_tile_early", "stop = tl.minimum(S, tile * BM + BM + shift)",
     "stop = tl.minimum(S, tile * BM + shift)", "causal"),
    ("dq_stops_a_tile_early", "end = tl.minimum(S, tile * BM + BM + shift)",
     "end = tl.minimum(S, tile * BM + shift)", "causal: dQ"),
    ("dk_dv_begins_a_tile_late", "tl.maximum(0, tile * BN - shift) // BM * BM",
     "(tl.maximum(0, tile * BN - shift) + BM - 1) // BM * BM",
     "causal bottom_right, s - l not a multiple of the tile: dK, dV"),
    ("forward_stop_ignores_the_shift", "stop = tl.minimum(S, tile * BM + BM + shift)",
     "stop = tl.minimum(S, tile * BM + BM)", "causal bottom_right, s > l by over a tile"),
]  # fmt: skip

SCALE = [
    ("forward_ignores_scale", 's = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * scale',
     's = tl.dot(q, tl.trans(k), input_precision="ieee").to(ACC) * D**-0.5', "a custom scale"),
    ("dk_dv_recomputes_without_scale", 's_t = tl.dot(k, tl.trans(q), input_precision="ieee").to(ACC) * scale',
     's_t = tl.dot(k, tl.trans(q), input_precision="ieee").to(ACC) * D**-0.5', "a custom scale: dK, dV"),
    ("dk_ignores_scale", "dk = dk * scale", "dk = dk * D**-0.5", "a custom scale: dK"),
    ("dq_ignores_scale", "dq = dq * scale", "dq = dq * D**-0.5", "a custom scale: dQ"),
    ("scale_of_the_padded_width", "q.shape[-1] ** -0.5 if scale is None",
     "max(16, triton.next_power_of_2(q.shape[-1])) ** -0.5 if scale is None", "head dim not a power of two"),
    ("scale_zero_means_default", "float(scale)", "float(scale or q.shape[-1] ** -0.5)", "scale 0"),
]  # fmt: skip

LAYOUT = [
    ("forward_k_has_q_strides", "K, k_strides, b, h_kv,", "K, q_strides, b, h_kv,",
     "l != s, or k and q laid out apart"),
    ("forward_v_has_k_strides", "V, v_strides, b, h_kv,", "V, k_strides, b, h_kv,", "v and k laid out apart"),
    ("dk_dv_v_has_k_strides", "V, v_strides, b, hk,", "V, k_strides, b, hk,", "v and k laid out apart: dK"),
    ("dq_v_has_k_strides", "V, v_strides, b, group,", "V, k_strides, b, group,",
     "v and k laid out apart: dQ"),
    ("delta_do_has_o_strides", "do_strides, b, h, rows, dims), mask=inside",
     "o_strides, b, h, rows, dims), mask=inside", "dO not contiguous: dQ, dK"),
    ("dk_dv_do_has_q_strides", "do_strides, b, h, rows, dims), mask=rows_ok_t",
     "q_strides, b, h, rows, dims), mask=rows_ok_t", "dO laid out unlike q: dK, dV"),
    ("dq_do_has_dq_strides", "do_strides, b, h, rows, dims), mask=rows_ok_q",
     "dq_strides, b, h, rows, dims), mask=rows_ok_q", "dO not contiguous: dQ"),
    ("last_dimension_contiguous", "cols[None, :].to(tl.int64) * strides[3]", "cols[None, :].to(tl.int64)",
     "a last stride that is not 1: transposed, or a broadcast mask"),
    ("dlse_contiguous", "rows.to(tl.int64) * dlse_strides[2]", "rows.to(tl.int64)", "dLSE not contiguous"),
]  # fmt: skip

HEADS_AND_MASKS = [
    ("forward_heads_interleaved", "h_kv = h // GROUP", "h_kv = h % (H // GROUP)",
     "GQA with 2 key heads or more"),
    ("dq_heads_interleaved", "group = h // GROUP", "group = h % (H // GROUP)",
     "GQA with 2 key heads or more: dQ"),
    ("dk_dv_heads_interleaved", "h = hk * GROUP + member", "h = member * HK + hk",
     "GQA with 2 key heads or more: dK, dV"),
    ("dk_dv_of_the_last_head_only", "for member in range(0, GROUP)", "for member in range(GROUP - 1, GROUP)",
     "GQA: dK, dV"),
    ("dk_dv_rows_of_another_batch", "b * HK * GROUP + h)", "b * HK + h)", "GQA with batch 2 or more: dK, dV"),
    ("forward_mask_of_batch_zero", "Mask, mask_strides, b, h, rows, keys), mask=allowed,",
     "Mask, mask_strides, b * 0, h, rows, keys), mask=allowed,", "a mask that differs between examples"),
    ("dq_mask_of_head_zero", "Mask, mask_strides, b, h, rows, keys), mask=allowed_q,",
     "Mask, mask_strides, b, h * 0, rows, keys), mask=allowed_q,", "a mask that differs between heads: dQ"),
    ("dk_dv_ignores_the_mask", "allowed_t & (tl.load(tl.trans(seen), mask=allowed_t, other=0) != 0)",
     "allowed_t", "a mask: dK, dV"),
    ("dq_ignores_the_mask", "allowed_q & (seen != 0)", "allowed_q", "a mask: dQ"),
]  # fmt: skip

GRADIENTS = [
    ("delta_without_output", "o.to(ACC) * do.to(ACC)", "do.to(ACC)", "any backward: dQ, dK"),
    ("dlse_ignored", "delta = delta - dlse", "delta = delta", "a loss that uses the LSE"),
    ("dlse_sign", "delta = delta - dlse", "delta = delta + dlse", "a loss that uses the LSE"),
    ("dk_delta_sign", "(dp_t - delta[None, :])", "(dp_t + delta[None, :])", "any backward: dK"),
    ("dq_without_delta", "(dp_q - delta[:, None])", "dp_q", "any backward: dQ"),
    ("ds_in_fp16", "ds_t.to(q.dtype)", "ds_t.to(tl.float16).to(q.dtype)", "fp32 inputs: dK"),
]  # fmt: skip

MUTANTS: list[tuple[str, str, str, str]] = (
    TAILS + SOFTMAX + CAUSAL + SCALE + LAYOUT + HEADS_AND_MASKS + GRADIENTS
)
