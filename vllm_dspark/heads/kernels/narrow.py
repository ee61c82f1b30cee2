"""Products with eight-bit weights on tensor cores, which take both operands in one type: the codes are made to fit the weights.

    int8:  code = u (a + b / 254 + c / 254^2), three int8 digits;  W2 code = u (W a + (W b + (W c) / 254) / 254), sums exact
    fp8:   code = u (a + b), two halves, the second where one does not hold the code;  W2 code = u (W a + W b)

u is a number a row, so that no code is too large or too small for its digits. An eight-bit weight then reaches the tensor core
in one instruction at most, instead of several that widen it: at small batches those, not memory, would be what takes the time.
"""

import triton
import triton.language as tl

_DIGIT = tl.constexpr(254.0)  # the last digit's half step, times this, is at most 127


@triton.jit
def _rounded(x):
    return tl.floor(x + 0.5)


@triton.jit
def digits(code):
    """Three int8 digits ``[M, R]`` of float ``code`` ``[M, R]`` and the rows' units ``[M]``; off by 2^-23 of a row's largest.

    Digits cannot say that a code is no number: the unit then does.
    """
    code = code.to(tl.float32)
    size = tl.abs(code)
    unit = tl.max(size, axis=1) / 127.0
    unit = tl.where(unit > 0.0, unit, 1.0)
    lost = tl.max(((size != size) | (size == float("inf"))).to(tl.int32), axis=1)
    unit = tl.where(lost > 0, float("nan"), unit)
    rest = code / unit[:, None]
    first = _rounded(rest)
    rest = (rest - first) * _DIGIT
    second = _rounded(rest)
    third = _rounded((rest - second) * _DIGIT)
    return first.to(tl.int8), second.to(tl.int8), third.to(tl.int8), unit


@triton.jit
def digit_product(first, second, third, unit, w):
    """``[M, N]`` float32 of int8 weights ``[N, R]``."""
    w = tl.trans(w)
    low = tl.dot(third, w, out_dtype=tl.int32).to(tl.float32)
    middle = tl.dot(second, w, out_dtype=tl.int32).to(tl.float32)
    high = tl.dot(first, w, out_dtype=tl.int32).to(tl.float32)
    return (high + (middle + low / _DIGIT) / _DIGIT) * unit[:, None]


@triton.jit
def halves(code):
    """Two halves ``[M, R]`` of ``code`` and the rows' units, powers of two.

    The first holds a bfloat16 code but for what is below 2^-24 of the row's largest.
    """
    code = code.to(tl.float32)
    largest = tl.max(tl.abs(code), axis=1)
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit > 0.0, unit, 1.0)
    code = code / unit[:, None]
    first = code.to(tl.float16)
    return first, (code - first.to(tl.float32)).to(tl.float16), unit


@triton.jit
def half_product(first, second, unit, w, SPLIT: tl.constexpr):
    """``[M, N]`` float32 of half weights ``[N, R]``; SPLIT: the second halves count."""
    w = tl.trans(w)
    out = tl.dot(first, w)
    if SPLIT:
        out = tl.dot(second, w, out)
    return out * unit[:, None]
