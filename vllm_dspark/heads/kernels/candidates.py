"""One draft step over candidates: what ``step.py`` does, for the ids that compete and no others.

    ids = top ids of U_k, then the list of x_{k-1} less what is among those
    z = U_k[ids] + cap(W2[ids] code) * scale;  scores, noise and maxima as in ``step.py``

Cost: C gathered rows of W2 (C r weight bytes a request) and C base logits; nothing of length V is read or written. Processed
logits are scattered into rows that are -inf elsewhere; the columns written last time are in ``written`` and are wiped before
the first step of the next round.
"""

import torch
import triton
import triton.language as tl

from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.kernels.buffers import Arguments, Buffers, strides
from vllm_dspark.heads.kernels.common import dequantise, follow, previous_tokens, product, record, request_slots
from vllm_dspark.heads.kernels.launch import Device, ceiling, power_of_two
from vllm_dspark.heads.kernels.noise import hash_prefix
from vllm_dspark.heads.kernels.pack import pack
from vllm_dspark.heads.kernels.step import correct, draw_scores, mend
from vllm_dspark.heads.stage import Round
from vllm_dspark.heads.weights import HeadWeights

BLOCK = 32  # candidates of a program

_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _candidate_ids(chosen, lists, previous, lanes, valid, TOP: tl.constexpr, LISTED: tl.constexpr):
    """Draft ids ``[LANES]`` and which compete; ``chosen`` points at the row's top ids, ``previous``, ``valid`` are ``[1]``."""
    live = (lanes < TOP) & valid
    ids = tl.load(chosen + lanes, mask=live, other=-1).to(tl.int32)
    if LISTED > 0:
        named = (lanes >= TOP) & (lanes < TOP + LISTED) & valid
        ids = tl.where(named, tl.load(lists + previous * LISTED + lanes - TOP, mask=named, other=-1), ids)
        again = tl.zeros_like(ids)
        for start in tl.range(0, TOP, 64):
            at = start + tl.arange(0, 64)
            top = tl.load(chosen + at, mask=(at < TOP) & valid, other=-1).to(tl.int32)
            again |= tl.max((ids[:, None] == top[None, :]).to(tl.int32), axis=1)
        live = live | (named & (again == 0) & (ids >= 0))
    return tl.where(live, ids, 0), live


@triton.jit(do_not_specialize=["batch", "k", "parts"])
def candidate_kernel(
    base, base_row, base_slot, vocab, chosen, chosen_row, chosen_slot, lists, w2, w2_scale, codes, w1, known,
    anchors, anchor_row, last_partials, partials, parts, target_ids, index, index_row,
    temperature, seeds, positions, positions_row, positions_slot, noise, processed, processed_row, processed_slot, written,
    tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row, broken,
    batch, k, slots: tl.constexpr,
    FIRST: tl.constexpr, FUSED: tl.constexpr, SAMPLED: tl.constexpr, FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    TOP: tl.constexpr, LISTED: tl.constexpr, LANES: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    follow(OVERLAP)
    part = tl.program_id(1)
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    request, valid = request_slots(index, index_row, rows, batch)
    r = tl.arange(0, RANK_PAD)
    real = valid[:, None] & (r < RANK)[None, :]
    if FUSED:
        previous = previous_tokens(
            anchors, anchor_row, last_partials, parts, target_ids, vocab, rows, valid, FIRST, BLOCK_PARTS, 1
        )  # fmt: skip
        if part == 0:
            record(
                previous, tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row, slots,
                k, rows, valid, FIRST, False,
            )  # fmt: skip
        if w2 is not None:
            code = tl.load(w1 + previous[:, None] * RANK + r[None, :], mask=real, other=0.0)
    else:
        previous = tl.load(known + rows, mask=valid, other=0)
        if w2 is not None:
            code = tl.load(codes + rows[:, None] * RANK + r[None, :], mask=real, other=0.0)
    lanes = part * LANES + tl.arange(0, LANES)
    ids, live = _candidate_ids(
        chosen + row.to(tl.int64) * chosen_row + k * chosen_slot, lists, previous, lanes, valid, TOP, LISTED
    )
    shown = live[None, :] & valid[:, None]
    acc = tl.zeros([1, LANES], dtype=tl.float32)
    if w2 is not None:
        gather = live[:, None] & (r < RANK)[None, :]
        tile = tl.load(w2 + ids[:, None].to(tl.int64) * RANK + r[None, :], mask=gather, other=0.0)
        acc = product(code, dequantise(tile, FORMAT), w1.dtype.element_ty, False)
    wide = rows.to(tl.int64)
    z = correct(acc, w2_scale, base + wide[:, None] * base_row + k * base_slot + ids[None, :], ids, shown, live, SOFT_CAP,
                SCALE)  # fmt: skip
    z, bad = mend(z, shown)
    score = z
    if SAMPLED:
        heat = tl.load(temperature + request, mask=valid, other=0.0)
        hot = heat >= 1e-5
        keys = ids
        if target_ids is not None:
            keys = tl.load(target_ids + ids, mask=live, other=0).to(tl.int32)
        prefix = tl.zeros([1], dtype=tl.uint32)
        injected = noise
        if noise is None:
            seed = tl.load(seeds + request, mask=valid, other=0)
            place = tl.load(positions + rows * positions_row + k * positions_slot, mask=valid, other=1)
            prefix = hash_prefix(seed, place.to(tl.int64) - 1, k)
        else:
            injected = noise + (wide[:, None] * slots + k) * vocab + ids[None, :]
        if processed is not None:
            rounded = z.to(processed.dtype.element_ty)
            z = tl.where(hot[:, None], rounded.to(tl.float32), z)
            write = shown & hot[:, None]
            tl.store(processed + request[:, None] * processed_row + k * processed_slot + keys[None, :], rounded, mask=write)
            spot = written + (request[:, None] * slots + k) * (TOP + LISTED) + lanes[None, :]
            tl.store(spot, tl.broadcast_to(keys[None, :], [1, LANES]), mask=write)
        score = draw_scores(z, heat, hot, prefix, keys, injected, shown)
    packed = tl.where(shown, pack(score, tl.broadcast_to(ids[None, :], [1, LANES])), _LOWEST)
    tl.store(partials + rows * parts + part, tl.max(packed, axis=1), mask=valid)
    tl.store(broken + rows, 1, mask=valid & (bad > 0))


@triton.jit
def wipe_kernel(
    processed, processed_row, processed_slot, written, index, index_row, slots: tl.constexpr, COUNT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Put -inf where the last round of the row's request wrote, and forget where that was."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    k = tl.program_id(1)
    request, valid = request_slots(index, index_row, rows, rows + 1)
    lanes = tl.arange(0, LANES)
    spot = written + (request[:, None] * slots + k) * COUNT + lanes[None, :]
    mask = valid[:, None] & (lanes < COUNT)[None, :]
    columns = tl.load(spot, mask=mask, other=-1)
    place = processed + request[:, None] * processed_row + k * processed_slot + columns
    tl.store(place, float("-inf"), mask=mask & (columns >= 0))
    tl.store(spot, -1, mask=mask)


def wipe(round: Round, written: torch.Tensor) -> None:
    """Run before the first step of a round with processed logits; ``written`` is ``[slots, K, C]`` int32, -1 at first."""
    assert round.draws is not None
    assert round.draws.processed is not None
    batch, slots, _ = round.logits.shape
    count = written.shape[-1]
    wipe_kernel[(batch, slots)](
        round.draws.processed, *strides(round.draws.processed), written, round.index, strides(round.index)[0], slots, count,
        power_of_two(count),
    )  # fmt: skip


def candidate_parts(candidates: Candidates) -> int:
    """Programs, and so maxima, a row."""
    return ceiling(candidates.most, BLOCK)


def arguments(
    weights: HeadWeights, buffers: Buffers, round: Round, k: int, candidates: Candidates, chosen: torch.Tensor,
    written: torch.Tensor | None, device: Device,
) -> Arguments:  # fmt: skip
    """Grid, arguments and options of :func:`candidate_step`'s launch."""
    batch, slots, vocab = round.logits.shape
    w2, draws = weights.w2, round.draws
    fused = weights.kind in ("vanilla", "none")
    parts = candidate_parts(candidates)
    confidences = round.confidences if weights.confidence is not None else None
    positions = None if draws is None else draws.positions
    processed = None if draws is None else draws.processed
    return (batch, parts), (
        round.logits, *strides(round.logits), vocab, chosen, *strides(chosen), candidates.lists,
        None if w2 is None else w2.values, None if w2 is None else w2.scale,
        None if fused or w2 is None else buffers.codes, weights.w1, None if fused else buffers.previous,
        round.anchors, round.anchors.stride(0), buffers.partials[(k + 1) % 2], buffers.partials[k % 2], parts,
        weights.target_ids, round.index, strides(round.index)[0],
        None if draws is None else draws.temperature, None if draws is None else draws.seeds,
        positions, *strides(positions), None if draws is None else draws.noise, processed, *strides(processed), written,
        round.tokens, round.tokens.stride(0), buffers.hidden_confidences, weights.confidence_table, confidences,
        strides(confidences)[0], buffers.broken, batch, k,
    ), {
        "slots": slots, "FIRST": k == 0, "FUSED": fused, "SAMPLED": draws is not None,
        "FORMAT": "native" if w2 is None else w2.format,
        "SOFT_CAP": weights.soft_cap, "SCALE": weights.scale, "RANK": weights.rank, "RANK_PAD": power_of_two(weights.rank, 16),
        "TOP": candidates.top, "LISTED": candidates.listed, "LANES": BLOCK, "BLOCK_PARTS": power_of_two(parts), "num_warps": 4,
        **device.follow(k > 0),
    }  # fmt: skip


def candidate_step(
    weights: HeadWeights, buffers: Buffers, round: Round, k: int, candidates: Candidates, chosen: torch.Tensor,
    written: torch.Tensor | None, device: Device,
) -> None:  # fmt: skip
    """Leave the packed maxima of slot ``k`` in ``buffers.partials[k % 2]``; ``chosen`` ``[>= B, K, top]`` are the top ids."""
    grid, values, options = arguments(weights, buffers, round, k, candidates, chosen, written, device)
    candidate_kernel[grid](*values, **options)
