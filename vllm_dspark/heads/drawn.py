"""The sequential stage on fixed buffers, for an engine that captures it in a graph and draws with a sampler of its own.

The formulas are ``reference.draft_block``'s. Nothing here reads a device value on the host or branches on one, and what
outlives a call stands at the same address in every call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_dspark.heads.modules import ConfidenceHead, MarkovHead

Draw = Callable[[Tensor, int], Tensor]
"""Corrected logits of one slot over draft ids, ``[B, V_draft]``, and the slot's number, to target ids ``[B]``."""


class Stage:
    """Corrects and draws blocks of up to ``requests`` requests, ``slots`` slots each.

    Args:
        markov: the correction head, or None for rank 0. confidence: the confidence head, or None.
    """

    def __init__(self, markov: MarkovHead | None, confidence: ConfidenceHead | None, requests: int, slots: int) -> None:
        self.markov = markov
        self.confidence = confidence
        self.embeddings: Tensor | None = None
        if markov is not None and confidence is not None and confidence.with_markov:
            self.embeddings = markov.markov_w1.weight.new_zeros(requests, slots, markov.rank)

    def run(
        self,
        hidden: Tensor,
        logits: Tensor,
        anchors: Tensor,
        draw: Draw,
        tokens: Tensor,
        confidences: Tensor | None = None,
        candidates: int | None = None,
    ) -> None:
        """Draft a block for each of B requests, left to right.

        Args:
            hidden: ``[B, K, d]``. logits: base logits ``[B, K, V_draft]``; overwritten if ``candidates`` is given.
            anchors: target ids ``[B]``.
            tokens: receives the drafted target ids, ``[B, K]``. confidences: receives c, ``[B, K]``, if there is a head.
            candidates: only so many ids with the best base logits can be drafted at each slot; None for all.
        """
        best = None
        if candidates is not None:
            best = logits.topk(candidates, dim=-1)
            logits.fill_(float("-inf"))
        projected = None if self.markov is None else self.markov.project_hidden(hidden)
        state, previous = None, anchors
        for k in range(hidden.shape[1]):
            code = None
            if self.markov is not None:
                embedding = self.markov.embed(previous)
                if self.embeddings is not None:
                    self.embeddings[: hidden.shape[0], k] = embedding
                code, state = self.markov.step(embedding, None if projected is None else projected[:, k], state)
            corrected = self._corrected(logits[:, k], code, None if best is None else (best.values[:, k], best.indices[:, k]))
            previous = draw(corrected, k)
            tokens[:, k] = previous
        if confidences is not None and self.confidence is not None:
            embeddings = None if self.embeddings is None else self.embeddings[: hidden.shape[0]]
            confidences.copy_(torch.sigmoid(self.confidence(hidden, embeddings)))

    def _corrected(self, base: Tensor, code: Tensor | None, best: tuple[Tensor, Tensor] | None) -> Tensor:
        """U + B for one slot, ``[B, V_draft]``; -inf wherever ``best`` (values and draft ids, ``[B, m]``) has no entry."""
        if best is None:
            return base if code is None or self.markov is None else base + self.markov.bias(code)
        values, ids = best
        if code is not None and self.markov is not None:
            rows = self.markov.markov_w2.weight[ids]
            values = values + (rows @ code.unsqueeze(-1)).squeeze(-1)
        return base.scatter_(1, ids, values)
