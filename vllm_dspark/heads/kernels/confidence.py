"""The hidden-state part of the confidences, for all slots at once, before the first step.

    out[b, k] = w_h h_k + b,  accumulated in float32

The rest, W1[x_{k-1}] w_e, is a table of V scalars made at load; ``common.record`` adds it and applies the sigmoid. Reads
B K d hidden values; it is separate from the projections' GEMM because it is float32 and they are not.
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.heads.kernels.buffers import strides


@triton.jit
def _confidence_kernel(
    hidden, hidden_row, hidden_slot, weight, bias, out,
    SLOTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    k = tl.program_id(1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + row.to(tl.int64) * hidden_row + k * hidden_slot + at, mask=at < SIZE, other=0.0)
        total += h.to(tl.float32) * tl.load(weight + at, mask=at < SIZE, other=0.0)
    tl.store(out + row * SLOTS + k, tl.sum(total, axis=0) + tl.load(bias))


def hidden_confidences(hidden: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """``hidden`` ``[B, K, d]``, ``weight`` ``[d]`` and ``bias`` ``[1]`` float32, ``out`` ``[>= B, K]`` float32, contiguous."""
    batch, slots, size = hidden.shape
    _confidence_kernel[(batch, slots)](hidden, *strides(hidden), weight, bias, out, slots, size, 1024, num_warps=4)
