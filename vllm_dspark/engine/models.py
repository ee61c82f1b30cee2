"""Draft models: vLLM's backbones with this package's heads, whatever their type.

The backbone's parameters keep vLLM's loader. The heads' tensors are taken out before it sees them, because it
renames anything called ``gate_proj``.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.gemma4_dspark import Gemma4DSparkForCausalLM
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from vllm_dspark.engine.pair import ARCHITECTURES
from vllm_dspark.heads.candidates import Candidates, bias_lists
from vllm_dspark.heads.choose import build_stage
from vllm_dspark.heads.lm_head import QuantisedHead, why_not
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.heads.noise import slot_seeds
from vllm_dspark.heads.stage import Draws, EagerStage, Round, Stage
from vllm_dspark.heads.weights import prepare
from vllm_dspark.options import DSparkOptions

HEADS = ("markov_head.", "confidence_head.")

logger = logging.getLogger("vllm.dspark")


class DraftHeads(nn.Module):
    """Adds ``markov_head`` and ``confidence_head`` (either may be None) to a draft model of vLLM's."""

    config: Any
    model: Any
    draft_id_to_target_id: Any
    lm_head: Any
    logits_processor: Any
    stage: Stage
    quantised_head: QuantisedHead | None = None

    def build_heads(self) -> None:
        """Make the heads the config names. Confidence is float32, as in vLLM."""
        config = self.config
        kind: HeadKind = getattr(config, "markov_head_type", None) or "vanilla"
        rank = getattr(config, "markov_rank", 0) or 0
        draft_vocab = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        if rank and kind != "none":
            cap, scale = self.logits_processor.soft_cap, self.logits_processor.scale
            self.markov_head = MarkovHead(kind, config.vocab_size, draft_vocab, rank, config.hidden_size, cap, scale)
        if getattr(config, "enable_confidence_head", False):
            with_markov = getattr(config, "confidence_head_with_markov", False) and self.markov_head is not None
            self.confidence_head = ConfidenceHead(config.hidden_size, rank, with_markov).float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        heads: dict[str, Tensor] = {}

        def rest() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(HEADS):
                    heads[name] = tensor
                else:
                    yield name, tensor

        super().load_weights(rest())  # type: ignore[misc]
        for prefix, head in (("markov_head.", self.markov_head), ("confidence_head.", self.confidence_head)):
            if head is None:
                continue
            for name, parameter in head.named_parameters():
                default_weight_loader(parameter, heads[prefix + name])

    def allocate(
        self, requests: int, slots: int, options: DSparkOptions, obstacle: str | None = None, top: int | None = None
    ) -> None:
        """Make what drafting needs on the device, before a graph is captured; one line in the log says what drafts.

        Args:
            requests: the most in a batch. slots: drafted tokens per block.
            obstacle: why drafts must be drawn by a sampler of vLLM's, or None. top: candidates, unless options name some.
        """
        device = next(self.parameters()).device
        weights = prepare(self.markov_head, self.confidence_head, self.target_ids, options.w2_format)
        candidates, top = None, options.candidates or top
        if top is not None:
            listed = options.listed_candidates if weights.w2 is not None else 0
            candidates = Candidates(top, bias_lists(weights, listed) if listed else None)
        self.stage = build_stage(weights, requests, slots, device, candidates, options.sequential_stage, obstacle)
        self.not_finite = torch.zeros((), dtype=torch.long, device=device)
        if options.draft_lm_head != "native":
            self._quantise_lm_head(options)

    def _quantise_lm_head(self, options: DSparkOptions) -> None:
        processor, weight = self.logits_processor, self.lm_head.weight
        reason = why_not(weight, processor.org_vocab_size)
        if reason is not None:
            logger.warning("the draft LM head stays as it is, because %s", reason)
            return
        rows = weight[: processor.org_vocab_size]
        self.quantised_head = QuantisedHead(rows, weight.dtype, options.draft_lm_head, processor.soft_cap, processor.scale)

    def compute_draft_logits(self, hidden_states: Tensor) -> Tensor:
        """Base logits over draft ids, ``[T, V_draft]``, of hidden states ``[T, d]``."""
        if self.quantised_head is not None:
            return self.quantised_head(hidden_states)
        logits: Tensor = super().compute_draft_logits(hidden_states)  # type: ignore[misc]
        return logits

    def sample_sequential(self, speculator: Any, num_reqs: int, head_hidden: Tensor) -> bool:
        """The sequential stage of one step on the V2 runner; vLLM 0.33 asks its draft models for it by this name.

        A request whose logits are not finite is drafted from what is left of them: q stays a distribution, so verification
        stays exact. Its confidences become 0, and ``not_finite`` counts it.

        Args:
            speculator: vLLM's, whose buffers say which rows of ``head_hidden`` predict, and take tokens and confidences.
            num_reqs: R, of which those that pad a graph's batch have the request index -1. head_hidden: ``[T, d]``.

        Returns:
            True: there is nothing left to do.
        """
        slots = speculator.num_speculative_steps
        count = num_reqs * slots
        requests = speculator.sample_idx_mapping[:count].view(num_reqs, slots)
        positions = speculator.sample_pos[:count].view(num_reqs, slots)
        hidden = head_hidden[speculator.sample_indices[:count]]
        draws = sampler = None
        if isinstance(self.stage, EagerStage):

            def sampler(logits: Tensor, k: int) -> Tensor:
                with slot_noise(speculator, k):
                    drawn: Tensor = speculator._sample_logits(logits, requests[:, k], positions[:, k], k)
                return drawn
        elif speculator.draft_logits is not None:
            draws = Draws(speculator.temperature, speculator.seeds, positions, processed=speculator.draft_logits)
        self.stage.draft(
            Round(
                hidden.view(num_reqs, slots, -1),
                self.compute_draft_logits(hidden).view(num_reqs, slots, -1),
                speculator.input_buffers.input_ids[speculator._anchor_idx[:num_reqs]],
                speculator.draft_tokens[:num_reqs],
                None if self.confidence_head is None else speculator.block_confidences[:num_reqs],
                requests[:, 0],
                draws,
                sampler,
            )
        )
        self.not_finite += self.stage.broken[:num_reqs].sum()
        return True

    @property
    def writes_every_logit(self) -> bool:
        """Whether processed logits are written over the whole target vocabulary; else the rest has to be -inf beforehand."""
        return self.draft_id_to_target_id is None and self.stage.candidates is None

    @property
    def target_ids(self) -> Tensor | None:
        """The target id of every draft id, ``[V_draft]``, or None where they are the same."""
        offsets = self.draft_id_to_target_id
        if offsets is None:
            return None
        return torch.arange(offsets.shape[0], device=offsets.device) + offsets


class Qwen3DSparkDraft(DraftHeads, Qwen3DSparkForCausalLM):
    """Qwen3 backbone. vLLM's own constructor would build a vanilla head of its own, so it is passed over."""

    def __init__(self, *, vllm_config, prefix: str = "") -> None:  # type: ignore[no-untyped-def]
        DFlashQwen3ForCausalLM.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.target_vocab_size = vllm_config.model_config.get_vocab_size()
        self.model.confidence_head = None
        self.build_heads()


class Gemma4DSparkDraft(DraftHeads, Gemma4DSparkForCausalLM):
    """Gemma 4 backbone, with its embedding scale and logit soft-cap.

    vLLM counts its layers from 0 under the name "model", where a text-only target's layers are too; hence the prefix.
    """

    def __init__(self, *, vllm_config, prefix: str = "") -> None:  # type: ignore[no-untyped-def]
        Gemma4DSparkForCausalLM.__init__(self, vllm_config=vllm_config, prefix=maybe_prefix("draft", prefix))
        self.target_vocab_size = vllm_config.model_config.get_vocab_size()
        self.model.markov_head = None
        self.model.confidence_head = None
        self.build_heads()


@contextmanager
def slot_noise(speculator: Any, k: int) -> Iterator[None]:
    """Let vLLM's sampler draw other noise in every slot; 0.33's does by itself. ``heads/noise.py`` says why."""
    sampler = sys.modules.get("vllm.v1.worker.gpu.sample.gumbel")
    if speculator.draft_logits is None or hasattr(sampler, "spec_step_seed"):
        yield
        return
    seeds = speculator.seeds
    speculator.seeds = slot_seeds(seeds, k)
    try:
        yield
    finally:
        speculator.seeds = seeds


def register() -> None:
    """Make vLLM build these classes for the draft architectures, in this process."""
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture, draft in zip(ARCHITECTURES, (Qwen3DSparkDraft, Gemma4DSparkDraft), strict=True):
        ModelRegistry.register_model(architecture, draft)
