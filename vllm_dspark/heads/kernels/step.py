"""One draft step for the whole vocabulary: correct, sample and leave the maxima.

    z = U_k + cap(W2 code) * scale                    cap(b) = c tanh(b / c), or b itself
    score = z                                          greedy rows (T < 1e-5)
    score = z / T + g,  g = Gumbel(seed, position, token)      sampled rows
    packed[row, part] = max over the part's ids of (score, id)

``code`` is W1[x_{k-1}] (vanilla, fused: this launch reduces the last one's maxima to x_{k-1} itself) or what
``advance.py`` wrote. z of a sampled row is rounded to the type of ``processed`` before it is sampled from, and the same
rounded z is written there, so verification sees the very distribution. W2 may be int8 or e4m3 with one scale a row:

    W2 code = scale_v * (q_v code)

Cost: V r weight bytes (once, for all rows) + B V base-logit bytes + B V processed bytes if asked for; 2 B V r flops.
A program owns one contiguous part of the vocabulary and loops over tiles of it; row blocks are the fast grid axis, so
those that share a part run together and read W2 from memory once.
"""

import torch
import triton
import triton.language as tl

from vllm_dspark.heads.kernels.buffers import Arguments, Buffers, strides
from vllm_dspark.heads.kernels.common import dequantise, follow, previous_tokens, product, record, request_slots, tanh
from vllm_dspark.heads.kernels.launch import Device, StepLaunch, ceiling, power_of_two
from vllm_dspark.heads.kernels.narrow import digit_product, digits, half_product, halves
from vllm_dspark.heads.kernels.noise import gumbel, hash_prefix
from vllm_dspark.heads.kernels.pack import pack
from vllm_dspark.heads.stage import FLOOR, Round
from vllm_dspark.heads.weights import HeadWeights

_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def load_tile(w2, v, r, end, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """Rows ``v`` of W2, ``[BLOCK_V, RANK_PAD]``, zeros beyond ``end`` and RANK."""
    mask = (v < end)[:, None]
    if RANK != RANK_PAD:
        mask = mask & (r < RANK)[None, :]
    return tl.load(w2 + v[:, None] * RANK + r[None, :], mask=mask, other=0.0)


@triton.jit
def correct(acc, w2_scale, base, v, live, in_part, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr):
    """z ``[M, BLOCK_V]`` float32 from the raw product; ``base`` are pointers to U_k, ``live`` the mask of both."""
    if w2_scale is not None:
        acc *= tl.load(w2_scale + v, mask=in_part, other=0.0)[None, :]
    if SOFT_CAP != 0.0:
        acc = tanh(acc / SOFT_CAP) * SOFT_CAP
    return tl.load(base, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32) + acc * SCALE


@triton.jit
def mend(z, live):
    """z with a very low number for each that is NaN or +inf, and which rows had one (int32)."""
    bad = ((z != z) | (z == float("inf"))) & live
    return tl.where(bad, _FLOOR, z), tl.max(bad.to(tl.int32), axis=1)


@triton.jit
def draw_scores(z, temperature, hot, prefix, keys, noise, live):
    """z for greedy rows, z / T + g for sampled ones; ``noise`` are pointers to exponential(1) noise, or None."""
    divisor = tl.where(hot, temperature, 1.0)[:, None]
    if noise is None:
        noisy = z / divisor + gumbel(prefix[:, None], keys[None, :])
    else:
        noisy = z / divisor - tl.log(tl.load(noise, mask=live, other=1.0))
    return tl.where(hot[:, None], noisy, z)


@triton.jit(do_not_specialize=["batch", "k", "parts"])
def step_kernel(
    base, base_row, base_slot, vocab, w2, w2_scale, codes, w1,
    anchors, anchor_row, last_partials, partials, parts, chunk, target_ids, index, index_row,
    temperature, seeds, positions, positions_row, positions_slot, noise, processed, processed_row, processed_slot,
    tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row, broken,
    batch, k, slots: tl.constexpr,
    FIRST: tl.constexpr, FUSED: tl.constexpr, SAMPLED: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_PARTS: tl.constexpr, FILLED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = part * chunk
    end = tl.minimum(start + chunk, vocab)
    r = tl.arange(0, RANK_PAD)
    # One row waits for nothing but memory: its first tile is on the way while the last step's maxima are reduced.
    PREFETCH: tl.constexpr = BLOCK_ROWS == 1 and w2 is not None
    if PREFETCH:
        ahead = load_tile(w2, start + tl.arange(0, BLOCK_V), r, end, RANK, RANK_PAD)
    follow(OVERLAP)
    request, valid = request_slots(index, index_row, rows, batch)
    if FUSED:
        previous = previous_tokens(
            anchors, anchor_row, last_partials, parts, target_ids, vocab, rows, valid, FIRST, BLOCK_PARTS, FILLED
        )  # fmt: skip
        if part == 0:
            record(
                previous, tokens, tokens_row, hidden_confidences, confidence_table, confidences, confidences_row, slots,
                k, rows, valid, FIRST, False,
            )  # fmt: skip
        if w2 is not None:
            code = tl.load(w1 + previous[:, None] * RANK + r[None, :], mask=valid[:, None] & (r < RANK)[None, :], other=0.0)
    elif w2 is not None:
        code = tl.load(codes + rows[:, None] * RANK + r[None, :], mask=valid[:, None] & (r < RANK)[None, :], other=0.0)
    # Eight-bit weights meet tensor cores in their own type; beside many rows widening them costs less than more products.
    DIGITS: tl.constexpr = FORMAT == "int8" and BLOCK_ROWS > 1 and BLOCK_ROWS <= 32
    HALVES: tl.constexpr = FORMAT == "fp8" and BLOCK_ROWS > 1
    if DIGITS:
        first_digit, second_digit, third_digit, unit = digits(code)
    elif HALVES:
        first_half, second_half, unit = halves(code)
    hot = valid
    heat = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    prefix = tl.zeros([BLOCK_ROWS], dtype=tl.uint32)
    if SAMPLED:
        heat = tl.load(temperature + request, mask=valid, other=0.0)
        hot = heat >= 1e-5
        if noise is None:
            seed = tl.load(seeds + request, mask=valid, other=0)
            place = tl.load(positions + rows * positions_row + k * positions_slot, mask=valid, other=1)
            prefix = hash_prefix(seed, place.to(tl.int64) - 1, k)
    any_hot = tl.max(hot.to(tl.int32), axis=0) > 0
    best = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    best_id = tl.zeros([BLOCK_ROWS], dtype=tl.int32) + start
    bad = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    wide = rows.to(tl.int64)
    for first in tl.range(start, end, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        in_part = v < end
        live = valid[:, None] & in_part[None, :]
        acc = tl.zeros([BLOCK_ROWS, BLOCK_V], dtype=tl.float32)
        if w2 is not None:
            if PREFETCH:
                tile = ahead
                ahead = load_tile(w2, v + BLOCK_V, r, end, RANK, RANK_PAD)
            else:
                tile = load_tile(w2, v, r, end, RANK, RANK_PAD)
            if DIGITS:
                acc = digit_product(first_digit, second_digit, third_digit, unit, tile)
            elif HALVES:
                acc = half_product(first_half, second_half, unit, dequantise(tile, FORMAT), SPLIT)
            else:
                acc = product(code, dequantise(tile, FORMAT), w1.dtype.element_ty, SPLIT)
        z = correct(acc, w2_scale, base + wide[:, None] * base_row + k * base_slot + v[None, :], v, live, in_part,
                    SOFT_CAP, SCALE)  # fmt: skip
        z, here = mend(z, live)
        bad |= here
        keys = v
        if target_ids is not None and SAMPLED:
            keys = tl.load(target_ids + v, mask=in_part, other=0).to(tl.int32)
        score = z
        if SAMPLED:
            if processed is not None:
                rounded = z.to(processed.dtype.element_ty)
                z = tl.where(hot[:, None], rounded.to(tl.float32), z)
                place_z = processed + request[:, None] * processed_row + k * processed_slot + keys[None, :]
                tl.store(place_z, rounded, mask=live & hot[:, None], eviction_policy="evict_first")
            score = z
            if any_hot:
                injected = noise
                if noise is not None:
                    injected = noise + (wide[:, None] * slots + k) * vocab + v[None, :]
                score = draw_scores(z, heat, hot, prefix, keys, injected, live)
        score = tl.where(in_part[None, :], score, float("-inf"))
        top, at = tl.max(score, axis=1, return_indices=True)
        better = top > best
        best_id = tl.where(better, first + at, best_id)
        best = tl.where(better, top, best)
    tl.store(partials + rows * parts + part, pack(best, best_id), mask=valid)
    tl.store(broken + rows, 1, mask=valid & (bad > 0))


def splits(weights: HeadWeights) -> bool:
    """Whether a code needs two numbers of the type that tensor cores take it in."""
    narrow = weights.dtype == torch.float32 and weights.w2 is not None and weights.w2.format == "fp8"
    return narrow or weights.kind in ("gated", "rnn")


def arguments(weights: HeadWeights, buffers: Buffers, round: Round, k: int, launch: StepLaunch, device: Device) -> Arguments:
    """Grid, arguments and options of :func:`step`'s launch."""
    batch, slots, vocab = round.logits.shape
    w2, draws = weights.w2, round.draws
    confidences = round.confidences if weights.confidence is not None else None
    positions = None if draws is None else draws.positions
    processed = None if draws is None else draws.processed
    return (ceiling(batch, launch.block_rows), launch.parts), (
        round.logits, *strides(round.logits), vocab,
        None if w2 is None else w2.values, None if w2 is None else w2.scale,
        None if launch.fused or w2 is None else buffers.codes, weights.w1,
        round.anchors, round.anchors.stride(0), buffers.partials[(k + 1) % 2], buffers.partials[k % 2], launch.parts,
        launch.chunk, weights.target_ids, round.index, strides(round.index)[0],
        None if draws is None else draws.temperature, None if draws is None else draws.seeds,
        positions, *strides(positions), None if draws is None else draws.noise, processed, *strides(processed),
        round.tokens, round.tokens.stride(0), buffers.hidden_confidences, weights.confidence_table, confidences,
        strides(confidences)[0], buffers.broken, batch, k,
    ), {
        "slots": slots, "FIRST": k == 0, "FUSED": launch.fused, "SAMPLED": draws is not None,
        "FORMAT": "native" if w2 is None else w2.format, "SPLIT": splits(weights),
        "SOFT_CAP": weights.soft_cap, "SCALE": weights.scale, "RANK": weights.rank, "RANK_PAD": power_of_two(weights.rank, 32),
        "BLOCK_ROWS": launch.block_rows, "BLOCK_V": launch.block_vocab, "BLOCK_PARTS": power_of_two(launch.parts),
        "FILLED": launch.block_rows if k == 0 else min(power_of_two(batch), launch.block_rows),
        "num_warps": launch.warps, "num_stages": launch.stages, **device.follow(k > 0),
    }  # fmt: skip


def step(weights: HeadWeights, buffers: Buffers, round: Round, k: int, launch: StepLaunch, device: Device) -> None:
    """Leave the packed maxima of slot ``k`` of ``round`` in ``buffers.partials[k % 2]``."""
    grid, values, options = arguments(weights, buffers, round, k, launch, device)
    step_kernel[grid](*values, **options)
