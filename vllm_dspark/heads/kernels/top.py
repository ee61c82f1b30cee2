"""The ids that compete in candidate mode: the best of the base logits, by the best of each of G groups.

    pool[g] = max over ids v = g mod G of (U_k[v], v);  chosen = the ``top`` largest of pool

``heads/candidates.py`` says what that leaves out. Two launches for all slots of all rows: one reads the base logits once
(B K V of them) and leaves G packed maxima a row; one finds, by bisection, the packed value that exactly ``top`` of a
row's maxima reach. All maxima are distinct, since they hold their ids. (``torch.topk`` is exact, in about ten launches: it
finds the digits of its threshold one after the other.)
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_dspark.heads.candidates import group_count
from vllm_dspark.heads.kernels.buffers import Arguments, strides
from vllm_dspark.heads.kernels.common import follow, request_slots
from vllm_dspark.heads.kernels.launch import Device
from vllm_dspark.heads.kernels.pack import pack, unpack

POOL_ROWS = 1024  # rows (of a request and a slot) whose maxima are kept at once

_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit(do_not_specialize=["first", "batch"])
def pool_kernel(
    base, base_row, base_slot, vocab, index, index_row, pool, first, batch, slots: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    follow(OVERLAP)
    row = first + tl.program_id(0)
    b = row // slots + tl.arange(0, 1)
    _, valid = request_slots(index, index_row, b, batch)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    from_here = base + (row // slots).to(tl.int64) * base_row + (row % slots) * base_slot
    deep = tl.arange(0, DEPTH) * GROUPS
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_id = tl.zeros([BLOCK], dtype=tl.int32) + group
    for start in tl.range(0, vocab, GROUPS * DEPTH):
        v = start + deep[:, None] + group[None, :]
        x = tl.load(from_here + v, mask=(v < vocab) & valid[:, None], other=float("-inf")).to(tl.float32)
        top, at = tl.max(tl.where(x != x, float("inf"), x), axis=0, return_indices=True)
        better = top > best
        best_id = tl.where(better, start + at * GROUPS + group, best_id)
        best = tl.where(better, top, best)
    packed = tl.where(group < vocab, pack(best, best_id), _LOWEST)
    tl.store(pool + tl.program_id(0).to(tl.int64) * GROUPS + group, packed)


@triton.jit(do_not_specialize=["first", "batch"])
def choose_kernel(
    pool, chosen, index, index_row, first, batch, slots: tl.constexpr, TOP: tl.constexpr, GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    follow(OVERLAP)
    row = first + tl.program_id(0)
    b = row // slots + tl.arange(0, 1)
    _, valid = request_slots(index, index_row, b, batch)
    packed = tl.load(pool + tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))
    # ``low`` is reached by TOP maxima or more, ``high`` by fewer; half of each, since their difference may not fit.
    low = tl.min(packed, axis=0)
    high = tl.max(packed, axis=0) + 1
    count = GROUPS + tl.sum(tl.zeros([GROUPS], dtype=tl.int32), axis=0)
    while count != TOP:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reached = tl.sum((packed >= middle).to(tl.int32), axis=0)
        enough = reached >= TOP
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
    taken = packed >= low
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(chosen + row.to(tl.int64) * TOP + place, unpack(packed).to(tl.int32), mask=taken & valid)


def arguments(
    base: Tensor, index: Tensor | None, top: int, pool: Tensor, chosen: Tensor, first: int, device: Device
) -> tuple[Arguments, Arguments]:
    """Both launches of :func:`choose` for the rows from ``first`` on that the pool has room for."""
    batch, slots, vocab = base.shape
    rows = min(batch * slots - first, POOL_ROWS)
    groups = group_count(top)
    block = min(groups, 256)  # one warp: groups never meet in a reduction, and eight loads of 16 bytes a thread are on the way
    index_row = strides(index)[0]
    return (
        (rows, groups // block),
        (base, *strides(base), vocab, index, index_row, pool, first, batch),
        {"slots": slots, "GROUPS": groups, "BLOCK": block, "DEPTH": 8, "num_warps": 1, **device.follow(False)},
    ), (
        (rows,),
        (pool, chosen, index, index_row, first, batch),
        {"slots": slots, "TOP": top, "GROUPS": groups, "num_warps": 8, **device.follow(True)},
    )


def choose(base: Tensor, index: Tensor | None, top: int, pool: Tensor, chosen: Tensor, device: Device) -> None:
    """Write the ids of every slot's candidates, unordered.

    Args:
        base: U, ``[B, K, V_draft]``, V_draft at least ``top``. index: request slots ``[B]``, -1 for padding, or None.
        pool: scratch, ``[POOL_ROWS * group_count(top)]`` int64. chosen: out, ``[>= B, K, top]`` int32, contiguous.
    """
    for first in range(0, base.shape[0] * base.shape[1], POOL_ROWS):
        pooled, chose = arguments(base, index, top, pool, chosen, first, device)
        for kernel, (grid, values, options) in ((pool_kernel, pooled), (choose_kernel, chose)):
            kernel[grid](*values, **options)
