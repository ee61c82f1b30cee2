"""The sequential stage for an engine that wants q itself and draws with torch generators: V1's."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_dspark.heads.stage import GREEDY_BELOW, Draws, Round, Stage


class Drafts(NamedTuple):
    """One block for each of B requests.

    Attributes:
        tokens: target ids, ``[B, K]`` int64.
        confidences: ``[B, K]`` float32, or None without a confidence head.
        probabilities: q over target ids, ``[B, K, V]`` float32, exactly what the tokens were drawn from; zeros for greedy
            requests, None when every request is.
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
    stage: Stage,
    hidden: Tensor,
    logits: Tensor,
    anchors: Tensor,
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    vocab_size: int | None = None,
) -> Drafts:
    """Correct and sample a block left to right.

    Args:
        stage: whose buffers have at least B rows. hidden: ``[B, K, d]``. logits: base logits ``[B, K, V_draft]``.
        anchors: target ids ``[B]``. temperature: ``[B]``, 0 for greedy requests; None when all are greedy.
        noise: exponential(1) noise ``[B, K, V_draft]`` float32; drawn here when absent and needed.
        vocab_size: V; default V_draft.
    """
    batch, slots, draft_vocab = logits.shape
    tokens = torch.empty(batch, slots, dtype=torch.long, device=logits.device)
    confidences = logits.new_empty(batch, slots, dtype=torch.float32) if stage.weights.confidence is not None else None
    draws = processed = None
    if temperature is not None:
        noise = exponential_noise(logits.float(), {}) if noise is None else noise
        processed = logits.new_full((batch, slots, vocab_size or draft_vocab), -torch.inf, dtype=torch.float32)
        draws = Draws(temperature.float(), noise=noise.contiguous(), processed=processed)
    stage.draft(Round(hidden.contiguous(), logits, anchors, tokens, confidences, draws=draws))
    if temperature is None or processed is None:
        return Drafts(tokens, confidences, None)
    hot = (temperature >= GREEDY_BELOW)[:, None, None]
    q = torch.softmax(processed / torch.where(hot, temperature[:, None, None], 1.0), dim=-1)
    return Drafts(tokens, confidences, torch.where(hot, q, 0.0))
