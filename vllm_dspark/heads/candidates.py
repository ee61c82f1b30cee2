"""Candidate mode: each draft is chosen among a few ids instead of the whole vocabulary.

The candidates of slot k are the ``top`` ids of the base logits U_k, united with the ids that the previous token's list
names. Everything else has probability 0, and that truncated q is what verification is told, so nothing but the number of
accepted drafts can change. The base top ids do not depend on drafted tokens and are found for all slots at once.

Of ids that are equal modulo G, a power of two and at least 16 ``top``, the best alone is considered: one pass over the
logits then does. Up to G ids that is no limit. Beyond, the t-th best id is missed by chance t / G, and the next best takes
its place: the best never, of the first 256 one in thirty on the average.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.heads.weights import HeadWeights


@dataclass(frozen=True)
class Candidates:
    """How many base ids compete, and which more each previous token adds.

    Attributes:
        top: base ids a slot, at most V_draft. lists: draft ids by previous target id, ``[V, n]`` int32, -1 for none, or None.
    """

    top: int
    lists: Tensor | None = None

    @property
    def listed(self) -> int:
        """n, 0 without lists."""
        return 0 if self.lists is None else self.lists.shape[1]

    @property
    def most(self) -> int:
        """The most candidates a slot can have."""
        return self.top + self.listed


@torch.no_grad()
def bias_lists(weights: HeadWeights, count: int, rows: int = 256) -> Tensor:
    """The ``count`` draft ids that W2 W1[x] raises most, for every target id x: ``[V, count]`` int32.

    2 V V_draft r flops, made ``rows`` previous tokens at a time. For gated and rnn heads it is what an open gate would raise.

    Raises:
        ValueError: the drafter has no head.
    """
    if weights.w1 is None or weights.w2 is None:
        raise ValueError("a drafter of rank 0 has no bias to list")
    w2 = weights.w2.dequantise(weights.dtype)
    return torch.cat([(some @ w2.T).topk(count).indices.int() for some in torch.split(weights.w1, rows)])


def group_count(top: int) -> int:
    """G, see above."""
    return 1 << (16 * top - 1).bit_length()


def top_ids(logits: Tensor, top: int) -> Tensor:
    """The base ids of one slot, unordered: ``[B, top]`` from ``[B, V_draft]``. Of equal logits the lower id; NaN is largest."""
    ordered = torch.where(logits.isnan(), torch.inf, logits.float() + 0.0).contiguous().view(torch.int32)  # -0 + 0 is +0
    ordered = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    packed = (ordered.long() << 32) | (0x7FFFFFFF - ids)
    groups = group_count(top)
    if logits.shape[-1] > groups:
        packed = F.pad(packed, (0, -logits.shape[-1] % groups), value=-(1 << 63)).view(len(packed), -1, groups).amax(-2)
    return 0x7FFFFFFF - (packed.topk(top, dim=-1, sorted=False).values & 0x7FFFFFFF)


def outside(candidates: Candidates, logits: Tensor, previous: Tensor) -> Tensor:
    """True where an id is no candidate: ``[B, V_draft]`` from one slot's base logits and previous target ids ``[B]``."""
    excluded = torch.ones_like(logits, dtype=torch.bool)
    excluded.scatter_(-1, top_ids(logits, candidates.top), False)
    if candidates.lists is not None:
        ids = candidates.lists[previous].long()
        # An absent entry repeats a base candidate.
        ids = torch.where(ids >= 0, ids, logits.argmax(-1, keepdim=True))
        excluded.scatter_(-1, ids, False)
    return excluded
