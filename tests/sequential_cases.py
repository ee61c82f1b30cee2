"""Random heads, inputs and noise for tests of the sequential stage, and what the specification makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.heads import reference, sequential
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.heads.stage import EagerStage
from vllm_dspark.heads.weights import prepare

CONFIDENCE = {"none": "hidden"}  # every other head's confidence also reads its embedding, unless a case says otherwise
TEMPERATURES = (0.0, 0.7, 1.0, 0.0, 1.6, 0.3, 1.0)


@dataclass
class Case:
    """Random heads and inputs, float64 ``values`` of which are what the reference sees."""

    kind: HeadKind
    dtype: torch.dtype = torch.float32
    batch: int = 7
    slots: int = 5
    hidden_size: int = 12
    rank: int = 4
    vocab: int = 31
    reduced: bool = False
    confidence: str | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        random = partial(torch.randn, generator=generator, dtype=torch.float64)
        draft_vocab = max(self.vocab // 2, 2) if self.reduced else self.vocab
        kept = torch.randperm(self.vocab, generator=generator)[:draft_vocab].sort().values
        self.target_ids = kept if self.reduced else None
        self.confidence = self.confidence or CONFIDENCE.get(self.kind, "markov")
        self.markov = None
        if self.kind != "none":
            self.markov = MarkovHead(self.kind, self.vocab, draft_vocab, self.rank, self.hidden_size).to(self.dtype)
        with_markov = self.confidence == "markov"
        self.confidence_head = None
        if self.confidence != "absent":
            self.confidence_head = ConfidenceHead(self.hidden_size, self.rank, with_markov).to(self.dtype).float()
        for module in (self.markov, self.confidence_head):
            for parameter in module.parameters() if module is not None else ():
                parameter.data = (0.8 * random(*parameter.shape)).to(self.dtype).to(parameter.dtype)
                parameter.requires_grad_(False)
        self.hidden = random(self.batch, self.slots, self.hidden_size).to(self.dtype)
        self.logits = (2 * random(self.batch, self.slots, draft_vocab)).to(self.dtype)
        self.anchors = torch.randint(self.vocab, (self.batch,), generator=generator)
        self.temperature = torch.tensor([self.temperatures[i % len(self.temperatures)] for i in range(self.batch)])
        self.noise = torch.empty(self.batch, self.slots, draft_vocab).exponential_(generator=generator)

    @property
    def sampled(self) -> Tensor:
        """Rows that are not greedy."""
        return self.temperature >= 1e-5

    def tensors(self) -> dict[str, Tensor]:
        heads = {"markov_head": self.markov, "confidence_head": self.confidence_head}
        named = {f"{prefix}.{n}": p for prefix, head in heads.items() if head is not None for n, p in head.named_parameters()}
        return {name: parameter.double() for name, parameter in named.items()}

    def draft(self, **changes: Any) -> sequential.Drafts:
        """The eager stage's block; its q is over draft ids here, as :meth:`specified`'s is."""
        weights = prepare(self.markov, self.confidence_head, self.target_ids)
        arguments = {
            "stage": EagerStage(weights, self.batch, torch.device("cpu")), "hidden": self.hidden, "logits": self.logits,
            "anchors": self.anchors, "temperature": self.temperature, "noise": self.noise, "vocab_size": self.vocab,
        }  # fmt: skip
        drafts = sequential.draft_block(**{**arguments, **changes})
        if drafts.probabilities is not None and self.target_ids is not None:
            drafts = drafts._replace(probabilities=drafts.probabilities[..., self.target_ids])
        return drafts

    def specified(self, temperature: Tensor | None = None, noise: Tensor | None = None) -> reference.Block:
        """The reference on the same values in float64; its q is over draft ids here, as the other's is."""
        block = reference.draft_block(
            self.tensors(), self.kind, self.hidden.double(), self.logits.double(), self.anchors,
            (self.temperature if temperature is None else temperature).double(),
            (self.noise if noise is None else noise).double(), self.target_ids, self.vocab,
        )  # fmt: skip
        if self.target_ids is not None:
            block = block._replace(probabilities=block.probabilities[..., self.target_ids])
        return block

    def draft_ids(self, tokens: Tensor) -> Tensor:
        return tokens if self.target_ids is None else torch.searchsorted(self.target_ids, tokens)
