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

from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead

HEADS = ("markov_head.", "confidence_head.")


class DraftHeads(nn.Module):
    """Adds ``markov_head`` and ``confidence_head`` (either may be None) to a draft model of vLLM's."""

    config: Any
    model: Any
    draft_id_to_target_id: Any

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

    ModelRegistry.register_model("Qwen3DSparkModel", Qwen3DSparkDraft)
    ModelRegistry.register_model("Gemma4DSparkModel", Gemma4DSparkDraft)
