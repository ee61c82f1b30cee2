"""Draft models: vLLM's backbones with this package's heads, whatever their type.

The backbone's parameters keep vLLM's loader. The heads' tensors are taken out before it sees them, because it
renames anything called ``gate_proj``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.gemma4_dspark import Gemma4DSparkForCausalLM
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from vllm_dspark.engine.pair import ARCHITECTURES
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.heads.drawn import Stage

HEADS = ("markov_head.", "confidence_head.")


class DraftHeads(nn.Module):
    """Adds ``markov_head`` and ``confidence_head`` (either may be None) to a draft model of vLLM's."""

    config: Any
    model: Any
    draft_id_to_target_id: Any
    compute_draft_logits: Any
    stage: Stage

    def build_heads(self) -> None:
        """Make the heads the config names. Confidence is float32, as in vLLM."""
        config = self.config
        kind: HeadKind = getattr(config, "markov_head_type", None) or "vanilla"
        rank = getattr(config, "markov_rank", 0) or 0
        draft_vocab = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        if rank and kind != "none":
            self.markov_head = MarkovHead(kind, config.vocab_size, draft_vocab, rank, config.hidden_size)
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

    def allocate(self, requests: int, slots: int) -> None:
        """Make what the sequential stage keeps on the V2 runner, before a graph is captured.

        Args:
            requests: the most in a batch. slots: drafted tokens per block.
        """
        self.stage = Stage(self.markov_head, self.confidence_head, requests, slots)
        device = next(self.parameters()).device
        self.not_finite = torch.zeros((), dtype=torch.long, device=device)

    def sample_sequential(self, speculator: Any, num_reqs: int, head_hidden: Tensor) -> bool:
        """The sequential stage of one step on the V2 runner; vLLM 0.33 asks its draft models for it by this name.

        A request whose hidden states are not finite is drafted from zeros: q stays a distribution, so verification stays
        exact. Its confidences become 0, and ``not_finite`` counts it.

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
        hidden = head_hidden[speculator.sample_indices[:count]].view(num_reqs, slots, -1)
        finite = torch.isfinite(hidden).flatten(1).all(1)
        self.not_finite += (~finite & (requests[:, 0] >= 0)).sum()
        hidden = hidden.masked_fill(~finite[:, None, None], 0.0)
        confidences = speculator.block_confidences[:num_reqs]
        self.stage.run(
            hidden,
            self.compute_draft_logits(hidden.flatten(0, 1)).view(num_reqs, slots, -1),
            speculator.input_buffers.input_ids[speculator._anchor_idx[:num_reqs]],
            lambda logits, k: speculator._sample_logits(logits, requests[:, k], positions[:, k], k),
            speculator.draft_tokens[:num_reqs],
            confidences if self.confidence_head is not None else None,
            speculator._draft_topk,
        )
        if self.confidence_head is not None:
            confidences.mul_(finite.unsqueeze(1))
        return True

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
        self.model.markov_head = None
        self.model.confidence_head = None
        self.build_heads()


def register() -> None:
    """Make vLLM build these classes for the draft architectures, in this process."""
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture, draft in zip(ARCHITECTURES, (Qwen3DSparkDraft, Gemma4DSparkDraft), strict=True):
        ModelRegistry.register_model(architecture, draft)
