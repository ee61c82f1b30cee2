"""DSpark on vLLM's V2 runner: what is ours of the speculator. vLLM keeps its buffers, its context K/V, its block forward.

Drafters of the families we describe get our draft classes and our sequential stage. Those that live in the target's files
(DeepSeek-V4, Kimi, ...) keep vLLM's.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dspark.engine import models, pair

logger = logging.getLogger("vllm.dspark")


class SpeculatorParts:
    """Put before vLLM's ``DSparkSpeculator`` among the bases: loading, the sequential stage, and whole blocks.

    Everything runs inside vLLM's graph of the draft step: buffers are made when the model is loaded, and nothing is read
    back. Confidences go to ``draft_token_confidence_probs`` ``[R, k]`` whenever the drafter has a confidence head, whether
    or not adaptive verification is on; 1 where there is none.

    Attributes:
        num_speculative_steps: drafts of a block, γ or less; ``asked`` is k, how many of them are handed on.
        block_confidences: ``[R, num_speculative_steps]``, of which ``draft_token_confidence_probs`` is the first k columns.
    """

    device: torch.device
    model: nn.Module
    max_num_reqs: int
    num_speculative_steps: int
    enable_adaptive_verification: bool

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        self.asked: int = speculative.num_speculative_tokens
        speculative.num_speculative_tokens = pair.block_drafts(vllm_config)
        try:
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        finally:
            speculative.num_speculative_tokens = self.asked
        self.draft_token_confidence_probs: Tensor
        self.block_confidences = self.draft_token_confidence_probs.fill_(1.0)
        self.draft_token_confidence_probs = self.block_confidences[:, : self.asked]

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first k drafts of every request's block, ``[R, k]``."""
        drafts: Tensor = super().propose(*args, **kwargs)  # type: ignore[misc]
        return drafts[:, : self.asked]

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        models.register()
        model: nn.Module = super().load_draft_model(target_model, target_attn_layer_names)  # type: ignore[misc]
        if not isinstance(model, models.DraftHeads):
            logger.info("DSpark on the V2 runner: %s drafts as vLLM has it", type(model).__name__)
            return model
        model.allocate(self.max_num_reqs, self.num_speculative_steps)
        self.use_confidence_head = model.confidence_head is not None
        # vLLM looks for the head on the backbone and finds none there; its estimator is for drafters without one.
        self.use_acceptance_estimator = self.enable_adaptive_verification and not self.use_confidence_head
        logger.info(
            "DSpark on the V2 runner: %s head, %d of %d drafts verified, confidence %s, sequential stage in torch",
            "no" if model.markov_head is None else model.markov_head.kind,
            self.asked,
            self.num_speculative_steps,
            "from the drafter" if self.use_confidence_head else "none",
        )
        return model

    def _sample_sequential(self, num_reqs: int, head_hidden: Tensor) -> None:
        """Ask the draft model first, as vLLM 0.33 does by itself."""
        if isinstance(self.model, models.DraftHeads):
            self.model.sample_sequential(self, num_reqs, head_hidden)
        else:
            super()._sample_sequential(num_reqs, head_hidden)  # type: ignore[misc]


def speculator(original: Any) -> Any:
    """vLLM's ``DSparkSpeculator`` with our parts."""

    class DSparkSpeculator(SpeculatorParts, original): ...

    return DSparkSpeculator
