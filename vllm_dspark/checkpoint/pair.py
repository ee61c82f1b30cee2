"""Does this drafter fit this target? Asked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dspark.checkpoint.errors import (
    BlockSizeError,
    ConfigError,
    HiddenSizeError,
    MaskTokenError,
    TargetLayersError,
    VocabularyError,
)
from vllm_dspark.checkpoint.spec import DrafterSpec
from vllm_dspark.checkpoint.tensors import check_tensors
from vllm_dspark.checkpoint.tokenizers import warn_if_tokenizers_differ

# Where multimodal configs keep the language model's sizes; Qwen3-Omni nests two deep.
_NESTED = ("thinker_config", "text_config", "language_config", "llm_config")


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What a drafter has to fit."""

    model: str
    """Name for messages: Hub id or folder."""
    vocab_size: int
    """Rows of its embedding table."""
    hidden_size: int
    """Width of its layers' outputs."""
    num_hidden_layers: int
    """Decoder layers, so valid layer ids are −1 (embedding) to this minus one."""
    tokenizer: str | None = None
    """A local tokenizer.json or the folder it is in; None skips the comparison."""

    @classmethod
    def from_config(cls, config: object, *, model: str, tokenizer: str | None = None) -> TargetFacts:
        """From a Hugging Face config, as an object or as parsed JSON, descending into a multimodal one's text part.

        Raises `ConfigError` when a size is missing.
        """
        for name in _NESTED:
            nested = _get(config, name)
            if nested is not None:
                return cls.from_config(nested, model=model, tokenizer=tokenizer)
        sizes = {}
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            value = _get(config, name)
            if not isinstance(value, int):
                raise ConfigError(f"The target {model} has {name} {value!r} in its config; wanted an integer.")
            sizes[name] = value
        return cls(model=model, tokenizer=tokenizer, **sizes)


def check_pair(spec: DrafterSpec, target: TargetFacts, num_speculative_tokens: int | None = None) -> None:
    """Raise the first `CheckpointError` that keeps `spec` from drafting for `target`; warn where it only might.

    `num_speculative_tokens` is k, the drafts per round that will be asked for; None stands for as many as the drafter
    makes. Mismatched tokenizers are a `TokenizerMismatchWarning`, because the vocabularies may still agree on all that
    matters.
    """
    _check_block(spec, num_speculative_tokens)
    _check_hidden(spec, target)
    _check_layers(spec, target)
    _check_vocabulary(spec, target)
    _check_mask(spec)
    check_tensors(spec, target_vocab_size=target.vocab_size, target_hidden_size=target.hidden_size)
    warn_if_tokenizers_differ(spec.tokenizer, target.tokenizer, spec.model, target.model)


def _check_block(spec: DrafterSpec, k: int | None) -> None:
    if k is None or 1 <= k <= spec.num_draft_tokens:
        return
    layout = "" if spec.sample_from_anchor else " and slot 0 does not predict (sample_from_anchor is false)"
    cost = "Positions it was not trained for are never accepted and spoil the others. " if k > 0 else ""
    raise BlockSizeError(
        f"num_speculative_tokens is {k}, but {spec.model} drafts 1 to {spec.num_draft_tokens} tokens per round: its "
        f"block_size is {spec.block_size}{layout}. {cost}Set num_speculative_tokens to {spec.num_draft_tokens} or less."
    )


def _check_hidden(spec: DrafterSpec, target: TargetFacts) -> None:
    if spec.target_hidden_size != target.hidden_size:
        raise HiddenSizeError(
            f"{spec.model} reads hidden states of width {spec.target_hidden_size}, but {target.model} produces width "
            f"{target.hidden_size}. Use a drafter trained for {target.model}."
        )
    if spec.hidden_size != target.hidden_size and not (spec.owns_embeddings and spec.owns_lm_head):
        raise HiddenSizeError(
            f"{spec.model} has width {spec.hidden_size} and {target.model} width {target.hidden_size}, so their "
            "embeddings cannot be shared; wanted embed_tokens.weight and lm_head.weight in the drafter. Export it with "
            "both."
        )


def _check_layers(spec: DrafterSpec, target: TargetFacts) -> None:
    ids, layers = list(spec.target_layer_ids), target.num_hidden_layers
    beyond = [layer for layer in ids if not -1 <= layer < layers]
    if beyond:
        raise TargetLayersError(
            f"{spec.model} reads target layers {ids}, but {target.model} has {layers} layers, so {beyond} do not "
            f"exist; wanted ids from -1 (embedding) to {layers - 1}. Use a drafter trained for {target.model}."
        )
    if ids != sorted(set(ids)):
        # vLLM collects the states in the order the target computes them, not in the order asked for.
        raise TargetLayersError(
            f"{spec.model} lists target layers as {ids}, but {target.model} delivers them as {sorted(set(ids))}; "
            "wanted them ascending and without repeats. Reorder the column blocks of fc.weight to match."
        )


def _check_vocabulary(spec: DrafterSpec, target: TargetFacts) -> None:
    have, want = spec.vocab_size, target.vocab_size
    # vLLM's models/qwen3_dspark.py: a larger (padded) input vocabulary is fine with its own embedding rows.
    if have < want or (have > want and not spec.owns_embeddings):
        remedy = (
            "the head's table has no rows for the other ids"
            if have < want
            else "a padded vocabulary needs embed_tokens.weight of its own, which is not there"
        )
        raise VocabularyError(
            f"{spec.model} has vocab_size {have}, but {target.model} has {want}; wanted {want}: {remedy}. Use a "
            f"drafter trained for {target.model}."
        )
    if spec.draft_vocab_size > have:
        raise VocabularyError(
            f"{spec.model} has draft_vocab_size {spec.draft_vocab_size} but vocab_size {have}, with which "
            f"{target.model} has {want} ids; wanted at most {have}. Correct config.json."
        )
    if spec.family == "gemma4" and spec.draft_vocab_size != have:
        raise VocabularyError(
            f"{spec.model} has draft_vocab_size {spec.draft_vocab_size}, but Gemma 4 drafters propose from all {have} "
            f"ids of {target.model} ({want}); wanted {have}. Correct config.json."
        )


def _check_mask(spec: DrafterSpec) -> None:
    if not 0 <= spec.mask_token_id < spec.vocab_size:
        raise MaskTokenError(
            f"{spec.model} has mask_token_id {spec.mask_token_id}, but its vocab_size is {spec.vocab_size}; wanted an "
            f"id from 0 to {spec.vocab_size - 1}. Set mask_token_id to the id the drafter was trained with."
        )


def _get(config: object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
