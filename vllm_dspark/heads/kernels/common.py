"""What several kernels begin or end with: which rows are real, the token before this slot, what is known once it is known."""

import triton
import triton.language as tl

from vllm_dspark.heads.kernels.pack import unpack

_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def sigmoid(x):
    """Float32; exact limits on both sides."""
    return 1.0 / (1.0 + tl.exp(-x))


# Triton's interpreter keeps bfloat16 as bit patterns, and its dot multiplies those.
INTERPRETED = tl.constexpr(not isinstance(sigmoid, triton.JITFunction))


@triton.jit
def tanh(x):
    """Float32, absolute error about 1e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the launch after this one start, then wait for all that the launch before this one wrote.

    OVERLAP (programmatic dependent launch): launches start while their predecessors end. What comes before this call may read
    nothing but weights, and everything after it may rely on every earlier launch, since each of them waited as well.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def request_slots(index, index_row, rows, batch):
    """Request slots of ``rows`` (int64, 0 where padded) and which rows are real."""
    valid = rows < batch
    slots = rows.to(tl.int64)
    if index is not None:
        slots = tl.load(index + rows * index_row, mask=valid, other=-1).to(tl.int64)
        valid = valid & (slots >= 0)
    return tl.where(valid, slots, 0), valid


@triton.jit
def previous_tokens(
    anchors,
    anchor_row,
    partials,
    parts,
    target_ids,
    vocab,
    rows,
    valid,
    FIRST: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    FILLED: tl.constexpr,
):
    """x_{k-1} as target ids, int64 (0 where padded): the anchors, or the best of the last step's packed maxima.

    FILLED: how many of ``rows`` can be within the batch; the others' maxima are not asked for.
    """
    if FIRST:
        tokens = tl.load(anchors + rows * anchor_row, mask=valid, other=0).to(tl.int64)
    else:
        part = tl.arange(0, BLOCK_PARTS)
        if rows.shape[0] == FILLED:
            mask = valid[:, None] & (part < parts)[None, :]
            packed = tl.load(partials + rows[:, None] * parts + part[None, :], mask=mask, other=_LOWEST)
            best = tl.max(packed, axis=1)
        else:
            few = tl.arange(0, FILLED)  # a batch this small is one row block
            packed = tl.load(partials + few[:, None] * parts + part[None, :], mask=(part < parts)[None, :], other=_LOWEST)
            best = tl.max(tl.where(rows[:, None] == few[None, :], tl.max(packed, axis=1)[None, :], _LOWEST), axis=1)
        tokens = tl.minimum(unpack(best), vocab - 1)
        if target_ids is not None:
            tokens = tl.load(target_ids + tokens, mask=valid, other=0)
    return tokens


@triton.jit
def record(
    previous,
    tokens,
    tokens_row,
    hidden_confidences,
    confidence_table,
    confidences,
    confidences_row,
    slots,
    k,
    rows,
    valid,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Write x_{k-1}, and c_k = sigmoid(w_h h_k + b + w_e W1[x_{k-1}]), whose last term is a table of V scalars."""
    if not FIRST:
        tl.store(tokens + rows * tokens_row + k - 1, previous, mask=valid)
    if not LAST and confidences is not None:
        logit = tl.load(hidden_confidences + rows * slots + k, mask=valid, other=0.0)
        if confidence_table is not None:
            logit += tl.load(confidence_table + previous, mask=valid, other=0.0)
        tl.store(confidences + rows * confidences_row + k, sigmoid(logit), mask=valid)


@triton.jit
def product(x, w, DTYPE: tl.constexpr, SPLIT: tl.constexpr):
    """``x [M, R] @ w [N, R]^T`` in float32. One row is a multiply and sum on CUDA cores; more go through tensor cores.

    Tensor cores take both as DTYPE, which holds ``w`` exactly; SPLIT adds a second product with what rounding ``x`` lost.
    """
    if x.shape[0] == 1:
        out = tl.sum(w.to(tl.float32) * x.to(tl.float32), axis=1)[None, :]
    else:
        high = x.to(DTYPE)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(DTYPE)
        w = w.to(tl.float32).to(DTYPE) if w.dtype == tl.float16 else w.to(DTYPE)  # half to bfloat16 in one step is slow
        if INTERPRETED:
            high, low, w = high.to(tl.float32), low.to(tl.float32), w.to(tl.float32)
        out = tl.dot(high, tl.trans(w), input_precision="ieee")
        if SPLIT:
            out = tl.dot(low, tl.trans(w), out, input_precision="ieee")
    return out


@triton.jit
def dequantise(w, FORMAT: tl.constexpr):
    """Weights as they are stored to a float type that holds them exactly, row scales left out.

    Where the device has no e4m3 they come as bytes: one shifted into a half's exponent is its value times 2^-8 (subnormals
    too), which the row scales make up for.
    """
    if FORMAT == "fp8":
        if w.dtype == tl.uint8:
            bits = w.to(tl.uint16)
            w = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        else:
            w = w.to(tl.float16)
    elif FORMAT == "int8":
        w = w.to(tl.float32)
    return w
