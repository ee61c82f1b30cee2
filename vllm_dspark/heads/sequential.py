"""The sequential stage, batched: the eager implementation of ``reference.draft_block``."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_dspark.heads.modules import ConfidenceHead, MarkovHead


class Drafts(NamedTuple):
    """One block for each of B requests.

    Attributes:
        tokens: target ids, ``[B, K]`` int64.
        confidences: ``[B, K]`` float32, or None without a confidence head.
        probabilities: q over draft ids, ``[B, K, V_draft]`` float32, exactly what the tokens were drawn from; None
            when every request is greedy. Rows of greedy requests hold the softmax at temperature 1 and are not q.
    """

    tokens: Tensor
    confidences: Tensor | None
    probabilities: Tensor | None


def exponential_noise(like: Tensor, generators: Mapping[int, torch.Generator]) -> Tensor:
    """Exponential(1) noise of ``like``'s shape; rows named in ``generators`` draw from theirs (seeded requests)."""
    noise = torch.empty_like(like).exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return noise


def draft_block(
    markov: MarkovHead | None,
    confidence: ConfidenceHead | None,
    hidden: Tensor,
    logits: Tensor,
    anchors: Tensor,
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    target_ids: Tensor | None = None,
) -> Drafts:
    """Correct and sample a block left to right.

    Args:
        markov: the correction head, or None for rank 0. confidence: the confidence head, or None.
        hidden: ``[B, K, d]``. logits: base logits ``[B, K, V_draft]``. anchors: target ids ``[B]``.
        temperature: ``[B]``, 0 for greedy requests; None when all are greedy.
        noise: exponential(1) noise ``[B, K, V_draft]``; drawn here when absent and needed.
        target_ids: the target id of each draft id ``[V_draft]``; None where they are the same.
    """
    batch, slots, _ = logits.shape
    projected = markov.project_hidden(hidden) if markov is not None else None
    sampler = None if temperature is None else Sampler(temperature, logits, noise)
    tokens = torch.empty(batch, slots, dtype=torch.long, device=logits.device)
    embeddings, state, previous = [], None, anchors.long()
    for k in range(slots):
        corrected = logits[:, k]
        if markov is not None:
            embedding = markov.embed(previous)
            embeddings.append(embedding)
            code, state = markov.step(embedding, None if projected is None else projected[:, k], state)
            corrected = corrected + markov.bias(code)
        choice = corrected.argmax(-1) if sampler is None else sampler.draw(corrected, k)
        previous = choice if target_ids is None else target_ids[choice]
        tokens[:, k] = previous
    confidences = None
    if confidence is not None:
        confidences = torch.sigmoid(confidence(hidden, torch.stack(embeddings, 1) if embeddings else None))
    return Drafts(tokens, confidences, None if sampler is None else sampler.probabilities)


class Sampler:
    """Draws from softmax(logits / temperature) and keeps that q; greedy rows take the arg max."""

    def __init__(self, temperature: Tensor, logits: Tensor, noise: Tensor | None) -> None:
        self.greedy = temperature < 1e-5
        self.inverse = torch.where(self.greedy, 1.0, temperature).reciprocal().unsqueeze(-1)
        self.noise = exponential_noise(logits.float(), {}) if noise is None else noise
        self.probabilities = torch.empty_like(self.noise)

    def draw(self, logits: Tensor, k: int) -> Tensor:
        """Draft ids ``[B]`` for slot ``k`` from its corrected logits ``[B, V_draft]``."""
        q = torch.softmax(logits.float() * self.inverse, dim=-1)
        self.probabilities[:, k] = q
        return torch.where(self.greedy, logits.argmax(-1), (q / self.noise[:, k]).argmax(-1))
