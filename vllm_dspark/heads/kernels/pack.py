"""Maxima that remember where they were: one int64 for a score and a draft id.

    packed = ordered(score) * 2^32 + (2^31 - 1 - id)

``ordered`` maps a float32 to the int32 that sorts as it does, so the largest packed value is the highest score and,
among equals, the lowest id: what ``torch.argmax`` returns. -0 counts as +0. NaNs are kept out by the callers.
"""

import triton
import triton.language as tl

_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def pack(score, index):
    """int64 of float32 ``score`` and ``index`` in [0, 2^31), elementwise."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _LAST)
    return (ordered.to(tl.int64) << 32) | (_LAST - index.to(tl.int64))


@triton.jit
def unpack(packed):
    """The id, int64."""
    return (packed & _LAST) ^ _LAST
