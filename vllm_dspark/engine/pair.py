"""The drafter's description inside vLLM: checked before any weight is read, then written onto its config."""

import logging
from collections.abc import Mapping
from typing import Any

from vllm_dspark.checkpoint import DrafterSpec, NotADrafterError, TargetFacts, check_pair, load_spec
from vllm_dspark.options import DSparkOptions

logger = logging.getLogger("vllm.dspark")

ARCHITECTURES = ("Qwen3DSparkModel", "Gemma4DSparkModel")
"""Draft architectures that vLLM builds with our classes."""


def check(given: Mapping[str, Any], target: Any, chosen: DSparkOptions) -> DrafterSpec | None:
    """Read the drafter's description and check it against the target.

    Args:
        given: ``speculative_config`` as the user wrote it. target: vLLM's ``ModelConfig`` of the target.

    Returns:
        The description, or None for families whose drafter lives in the target's files: those stay vLLM's business.

    Raises:
        CheckpointError: the pair does not fit, or there is no such drafter.
    """
    model = given.get("model")
    if model is None or model == target.model:
        return None
    try:
        spec = load_spec(model, revision=given.get("revision"), sample_from_anchor=chosen.sample_from_anchor)
    except NotADrafterError:
        if _loaded_by_vllm(given, target):
            return None
        raise
    facts = TargetFacts.from_config(target.hf_config, model=target.model, tokenizer=target.tokenizer)
    check_pair(spec, facts, given.get("num_speculative_tokens"))
    logger.info(
        "DSpark drafter %s: %s head, rank %d, block of %d from %s, confidence %s",
        spec.model, spec.head, spec.rank, spec.block_size,
        "the anchor" if spec.sample_from_anchor else "the first mask", spec.confidence,
    )  # fmt: skip
    return spec


def _loaded_by_vllm(given: Mapping[str, Any], target: Any) -> bool:
    """Whether vLLM has a DSpark class of its own for a checkpoint that we do not describe (DeepSeek, Kimi, Omni)."""
    from vllm.transformers_utils.config import get_config

    config = get_config(given["model"], trust_remote_code=target.trust_remote_code, revision=given.get("revision"))
    names = getattr(config, "architectures", None) or []
    return any("DSpark" in name or name.startswith(("DeepseekV4", "DeepseekV41")) for name in names)


def complete(config: Any, spec: DrafterSpec) -> None:
    """Write the description onto the draft model's config, where every process finds it."""
    if config.num_speculative_tokens > spec.num_draft_tokens:
        # vLLM defaults to the block size, one too many where slot 0 does not predict.
        config.num_speculative_tokens = spec.num_draft_tokens
    hf_config = config.draft_model_config.hf_config
    hf_config.sample_from_anchor = spec.sample_from_anchor
    hf_config.eagle_aux_hidden_state_layer_ids = list(spec.aux_hidden_state_layer_ids)
    hf_config.markov_head_type = spec.head
    hf_config.markov_rank = spec.rank
    hf_config.enable_confidence_head = spec.confidence != "none"
    hf_config.confidence_head_with_markov = spec.confidence == "markov"
    hf_config.block_size = spec.block_size


def block_queries(hf_config: Any) -> int:
    """Queries of one block forward: the block size as trained, whichever slot predicts first."""
    return int(getattr(hf_config, "block_size", 0))


def block_drafts(vllm_config: Any) -> int:
    """Tokens that the V2 runner drafts per block: all that the drafter was trained for, wherever their queries fit.

    Fewer queries than trained see fewer neighbours, and less of what they draft is accepted (vllm#41834). Drafters of
    vLLM's own families, and lengths that vLLM changes with the batch, are left at ``num_speculative_tokens``.
    """
    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    asked: int = speculative.num_speculative_tokens
    hf_config = speculative.draft_model_config.hf_config
    described = set(getattr(hf_config, "architectures", None) or ()) & set(ARCHITECTURES)
    if not described or getattr(speculative, "num_speculative_tokens_per_batch_size", None):
        return asked
    queries = block_queries(hf_config)
    if scheduler.max_num_seqs * queries > scheduler.max_num_batched_tokens:
        return asked
    return max(asked, queries - (0 if hf_config.sample_from_anchor else 1))
