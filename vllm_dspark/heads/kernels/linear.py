"""A matrix product with weights in any format: the projections of gated and rnn heads, and the draft LM head in fp8.

    y = cap(x W^T s + bias) * scale,    W = q (native), or int8 / e4m3 with one scale s a row; accumulated in float32

What cuBLAS has no form of: eight-bit weights under sixteen-bit activations that are not quantised, and float32 out of
sixteen-bit operands (rounding the projections would move gated and rnn logits by a thousandth). W is read once for
every block of up to 64 rows of x: N d weight bytes, 2 M N d flops. e4m3 beside bfloat16 would be widened twice; beside the
halves of :func:`halved` once, a third of the instructions less, which at few rows is what they take longer than memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.heads.formats import Stored
from vllm_dspark.heads.kernels.buffers import Arguments
from vllm_dspark.heads.kernels.common import dequantise, product, tanh
from vllm_dspark.heads.kernels.launch import ceiling, power_of_two
from vllm_dspark.heads.kernels.narrow import halves


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, x_row, x_unit, w, w_scale, bias, out, out_row, rows, columns, SIZE: tl.constexpr, FORMAT: tl.constexpr,
    SOFT_CAP: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    wide_m, wide_n = m.to(tl.int64), n.to(tl.int64)
    for start in tl.range(0, SIZE, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = (at < SIZE)[None, :]
        a = tl.load(x + wide_m[:, None] * x_row + at[None, :], mask=(m < rows)[:, None] & inside, other=0.0)
        b = tl.load(w + wide_n[:, None] * SIZE + at[None, :], mask=(n < columns)[:, None] & inside, other=0.0)
        acc += product(a, dequantise(b, FORMAT), a.dtype, False)
    if x_unit is not None:
        acc *= tl.load(x_unit + m, mask=m < rows, other=0.0)[:, None]
    if w_scale is not None:
        acc *= tl.load(w_scale + n, mask=n < columns, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if SOFT_CAP != 0.0:
        acc = tanh(acc / SOFT_CAP) * SOFT_CAP
    acc *= SCALE
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out + wide_m[:, None] * out_row + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def halve_kernel(x, x_row, half, unit, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values, _, one = halves(tl.load(x + row * x_row + at, mask=at < SIZE, other=0.0)[None, :])
    tl.store(half + row * SIZE + at[None, :], values, mask=(at < SIZE)[None, :])
    tl.store(unit + row + tl.arange(0, 1), one)


def halved(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` ``[M, d]`` as halves of its rows' units ``[M]``, for :func:`linear` with e4m3 weights: exact for bfloat16 but for
    what is below 2^-24 of a row's largest."""
    rows, size = x.shape
    half, unit = x.new_empty(rows, size, dtype=torch.float16), x.new_empty(rows, dtype=torch.float32)
    if rows:
        halve_kernel[(rows,)](x, x.stride(0), half, unit, size, power_of_two(size), num_warps=8)
    return half, unit


def arguments(
    x: Tensor,
    w: Stored,
    out: Tensor,
    bias: Tensor | None = None,
    soft_cap: float = 0.0,
    scale: float = 1.0,
    unit: Tensor | None = None,
) -> Arguments:
    """Grid, arguments and options of :func:`linear`'s launch."""
    rows, size = x.shape
    columns = w.values.shape[0]
    block_m = min(power_of_two(rows, 16), 64)
    block_n = 64 if columns >= 8192 else 16
    block_k = 128 if w.values.element_size() == 1 else 64
    if w.values.element_size() == 4:
        block_k = 32
    return (ceiling(rows, block_m), ceiling(columns, block_n)), (
        x, x.stride(0), unit, w.values, w.scale, bias, out, out.stride(0), rows, columns,
    ), {
        "SIZE": size, "FORMAT": w.format, "SOFT_CAP": soft_cap, "SCALE": scale, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def linear(
    x: Tensor,
    w: Stored,
    out: Tensor,
    bias: Tensor | None = None,
    soft_cap: float = 0.0,
    scale: float = 1.0,
    unit: Tensor | None = None,
) -> None:
    """Write ``out`` ``[M, N]`` from ``x`` ``[M, d]``, its rows times ``unit`` ``[M]`` if given, and ``w`` of ``[N, d]``.

    Last dimensions are contiguous.
    """
    if x.shape[0] == 0:
        return
    grid, values, options = arguments(x, w, out, bias, soft_cap, scale, unit)
    linear_kernel[grid](*values, **options)
