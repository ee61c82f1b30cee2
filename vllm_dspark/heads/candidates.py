"""Candidate mode: each draft is chosen among a few ids instead of the whole vocabulary.

The candidates of slot k are the ``top`` ids of the base logits U_k, united with the ids that the previous token's list
names. Everything else has probability 0, and that truncated q is what verification is told, so nothing but the number of
accepted drafts can change. The base top ids do not depend on drafted tokens and are found for all slots at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dspark.heads.weights import HeadWeights


@dataclass(frozen=True)
class Candidates:
    """How many base ids compete, and which more each previous token adds.

    Attributes:
        top: base ids a slot. lists: draft ids by previous target id, ``[V, n]`` int32, -1 for none, or None.
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


def outside(candidates: Candidates, logits: Tensor, previous: Tensor) -> Tensor:
    """True where an id is no candidate: ``[B, V_draft]`` from one slot's base logits and previous target ids ``[B]``."""
    excluded = torch.ones_like(logits, dtype=torch.bool)
    excluded.scatter_(-1, logits.topk(candidates.top, dim=-1).indices, False)
    if candidates.lists is not None:
        ids = candidates.lists[previous].long()
        # An absent entry repeats a base candidate.
        ids = torch.where(ids >= 0, ids, logits.argmax(-1, keepdim=True))
        excluded.scatter_(-1, ids, False)
    return excluded
