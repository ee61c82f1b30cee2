"""Between two steps: reduce the maxima to x_{k-1}, record it, and make the code that W2 turns into the next bias.

    e = W1[x_{k-1}]
    vanilla:  code = e
    gated:    code = sigmoid(P_k + G_e e) * e
    rnn:      [a ; c ; o] = P_k + J_s s + J_e e;  s' = sigmoid(a) s + (1 - sigmoid(a)) tanh(c);  code = tanh(o)

P is the part of the projections that needs only hidden states, bias included, from one GEMM before the first step.
The grid is row blocks x blocks of the r outputs, so that no program reads all of J. Run once more after the last step,
this writes the last token, and confidence 0 for rows whose logits were not numbers (LAST).
"""

import triton
import triton.language as tl

from vllm_dspark.heads.kernels.buffers import Arguments, Buffers, strides
from vllm_dspark.heads.kernels.common import follow, previous_tokens, product, record, request_slots, sigmoid, tanh
from vllm_dspark.heads.kernels.launch import Device, ceiling, power_of_two
from vllm_dspark.heads.stage import Round
from vllm_dspark.heads.weights import HeadWeights


@triton.jit
def _gate(
    x, inner, gate: tl.constexpr, out, r, offset: tl.constexpr, width: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """x times the tile ``inner[gate * RANK + out, offset + r]``, zeros outside; row and column numbers are within the part."""
    mask = (out < RANK)[:, None] & (r < RANK)[None, :]
    tile = tl.load(inner + (gate * RANK + out)[:, None] * width + offset + r[None, :], mask=mask, other=0.0)
    return product(x, tile, inner.dtype.element_ty, SPLIT)


@triton.jit
def _rows(matrix, row, r, valid, RANK: tl.constexpr):
    """The tile ``matrix[row, r]``, float32."""
    mask = valid[:, None] & (r < RANK)[None, :]
    return tl.load(matrix + row[:, None] * RANK + r[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "k", "parts"])
def advance_kernel(
    anchors, anchor_row, partials, parts, target_ids, vocab, index, index_row,
    tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row,
    w1, inner, projected, projected_row, projected_slot, state, next_state, codes, previous_out, broken,
    batch, k, slots: tl.constexpr,
    KIND: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    follow(OVERLAP)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _, valid = request_slots(index, index_row, rows, batch)
    previous = previous_tokens(
        anchors, anchor_row, partials, parts, target_ids, vocab, rows, valid, FIRST, BLOCK_PARTS, BLOCK_ROWS
    )  # fmt: skip
    if tl.program_id(1) == 0:
        record(
            previous, tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row, slots,
            k, rows, valid, FIRST, LAST,
        )  # fmt: skip
        if not LAST:
            tl.store(previous_out + rows, previous, mask=valid)
        elif confidences is not None:
            bad = tl.load(broken + rows, mask=valid, other=0) > 0
            for slot in range(slots):
                tl.store(confidences + rows * confidences_row + slot, tl.zeros([BLOCK_ROWS], dtype=tl.float32), mask=bad)
    if not LAST and KIND != "none":
        out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        here = valid[:, None] & (out < RANK)[None, :]
        own = _rows(w1, previous, out, valid, RANK)
        code = own
        if KIND != "vanilla":
            hidden_part = projected + rows[:, None] * projected_row + k * projected_slot + out[None, :]
        if KIND == "gated":
            gate = tl.load(hidden_part, mask=here, other=0.0).to(tl.float32)
            for start in tl.range(0, RANK_PAD, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                gate += _gate(_rows(w1, previous, r, valid, RANK), inner, 0, out, r, 0, RANK, RANK, False)
            code = sigmoid(gate) * own
        elif KIND == "rnn":
            keep = tl.load(hidden_part, mask=here, other=0.0).to(tl.float32)
            fresh = tl.load(hidden_part + RANK, mask=here, other=0.0).to(tl.float32)
            shown = tl.load(hidden_part + 2 * RANK, mask=here, other=0.0).to(tl.float32)
            for start in tl.range(0, RANK_PAD, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                e = _rows(w1, previous, r, valid, RANK)
                keep += _gate(e, inner, 0, out, r, RANK, 2 * RANK, RANK, False)
                fresh += _gate(e, inner, 1, out, r, RANK, 2 * RANK, RANK, False)
                shown += _gate(e, inner, 2, out, r, RANK, 2 * RANK, RANK, False)
                if not FIRST:
                    s = _rows(state, rows, r, valid, RANK)
                    keep += _gate(s, inner, 0, out, r, 0, 2 * RANK, RANK, True)
                    fresh += _gate(s, inner, 1, out, r, 0, 2 * RANK, RANK, True)
                    shown += _gate(s, inner, 2, out, r, 0, 2 * RANK, RANK, True)
            keep = sigmoid(keep)
            after = (1 - keep) * tanh(fresh)
            if not FIRST:
                after += keep * _rows(state, rows, out, valid, RANK)
            tl.store(next_state + rows[:, None] * RANK + out[None, :], after, mask=here)
            code = tanh(shown)
        tl.store(codes + rows[:, None] * RANK + out[None, :], code, mask=here)


def arguments(weights: HeadWeights, buffers: Buffers, round: Round, k: int, parts: int, device: Device) -> Arguments:
    """Grid, arguments and options of :func:`advance`'s launch."""
    batch, slots, vocab = round.logits.shape
    last = k == slots
    confidences = round.confidences if weights.confidence is not None else None
    rank_pad = power_of_two(weights.rank, 16)
    block_rows = 1 if batch <= 2 else 16
    block_out = rank_pad if weights.kind in ("vanilla", "none") else 16
    outputs = 1 if last else max(1, ceiling(weights.rank, block_out))
    return (ceiling(batch, block_rows), outputs), (
        round.anchors, round.anchors.stride(0), buffers.partials[(k + 1) % 2], parts, weights.target_ids, vocab,
        round.index, strides(round.index)[0], round.tokens, round.tokens.stride(0),
        buffers.hidden_confidences, weights.confidence_table, confidences, strides(confidences)[0],
        weights.w1, weights.inner, buffers.projected, *strides(buffers.projected),
        buffers.states[k % 2], buffers.states[(k + 1) % 2], buffers.codes, buffers.previous, buffers.broken,
        batch, k,
    ), {
        "slots": slots, "KIND": weights.kind, "FIRST": k == 0, "LAST": last, "RANK": weights.rank, "RANK_PAD": rank_pad,
        "BLOCK_ROWS": block_rows, "BLOCK_OUT": block_out, "BLOCK_R": rank_pad if block_rows == 1 else min(rank_pad, 64),
        "BLOCK_PARTS": power_of_two(parts), "num_warps": 4, "num_stages": 2, **device.follow(k > 0),
    }  # fmt: skip


def advance(weights: HeadWeights, buffers: Buffers, round: Round, k: int, parts: int, device: Device) -> None:
    """Reduce ``parts`` maxima of slot k-1 (for k = 0 take the anchors) and make the codes of slot k (none for k = K)."""
    grid, values, options = arguments(weights, buffers, round, k, parts, device)
    advance_kernel[grid](*values, **options)
