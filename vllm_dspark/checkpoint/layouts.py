"""Published config layouts → the one `DrafterSpec`.

Two libraries write DSpark checkpoints. DeepSpec (deepseek-ai/DeepSpec, the paper's own) saves a flat Hugging Face
config of the target's family with a DSpark `architectures`. speculators (vllm-project/speculators) nests the backbone
under `transformer_layer_config`, marks itself with `speculators_model_type: "dspark"` and counts target layers one
higher. vLLM flattens the second into the first (transformers_utils/configs/speculators/algos.py); so does this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from vllm_dspark.checkpoint.backbone import backbone_sizes, integer
from vllm_dspark.checkpoint.errors import ConfigError, NotADrafterError, UnknownHeadError
from vllm_dspark.checkpoint.slots import slot_layout
from vllm_dspark.checkpoint.spec import Confidence, DrafterSpec, Family, Head, Layout, TensorInfo

# Architectures vLLM 0.32 loads with its Qwen3 and Gemma 4 DSpark classes (model_executor/models/registry.py).
_FAMILIES: dict[str, Family] = {
    "Qwen3DSparkModel": "qwen3",
    "Qwen3OmniDSparkModel": "qwen3",
    "Gemma4DSparkModel": "gemma4",
}
# Sections in which vLLM looks before the top level (models/qwen3_dflash.py, v1/worker/gpu/spec_decode/utils.py).
_SECTIONS = ("dflash_config", "dspark_config", "eagle_config")
_CONFIDENCE_WEIGHT = "confidence_head.proj.weight"


@dataclass(frozen=True)
class Kind:
    """Which layout a config is in, and its values flattened into DeepSpec's names and meanings."""

    layout: Layout
    family: Family
    architecture: str
    body: Mapping[str, Any]


def recognise(config: Mapping[str, Any], model: str) -> Kind:
    """The layout of a parsed config.json; raises `NotADrafterError` for other models, `ConfigError` for broken ones."""
    kind = config.get("speculators_model_type")
    if kind is not None and kind != "dspark":
        raise NotADrafterError(
            f"{model} is a speculators checkpoint of type {kind!r}; wanted 'dspark'. Serve it with the method it was "
            "trained for, or give a DSpark drafter."
        )
    if kind == "dspark":
        return _speculators(config, model)
    architectures = _architectures(config)
    if "DSparkDraftModel" in architectures and config.get("model_type") == "qwen3":
        # vLLM renames this one too (config/speculative.py).
        architectures = ["Qwen3DSparkModel"]
    for architecture in architectures:
        if architecture in _FAMILIES:
            return Kind("deepspec", _FAMILIES[architecture], architecture, _flatten(config))
    raise NotADrafterError(_not_a_drafter(config, architectures, model))


def build_spec(
    kind: Kind,
    tensors: Mapping[str, TensorInfo],
    *,
    model: str,
    revision: str | None,
    commit: str | None,
    tokenizer: str | None,
    sample_from_anchor: bool | None,
) -> DrafterSpec:
    """The description of a recognised config and its tensor headers; raises `ConfigError` or `UnknownHeadError`."""
    body, notes = kind.body, list[str]()
    block_size = integer(body, model, "block_size", "dspark_block_size", minimum=1)
    anchor_first = slot_layout(body, model, kind.layout, block_size, sample_from_anchor, notes)
    if not anchor_first and block_size < 2:
        raise ConfigError(f"{model}: block_size is 1, but a fill-in block needs its anchor slot and one more; wanted ≥ 2.")
    sizes = backbone_sizes(body, model, kind.layout, kind.family, notes)
    head, rank = _head(body, model)
    target_hidden_size = integer(body, model, "target_hidden_size", minimum=1, default=sizes.hidden_size)
    return DrafterSpec(
        model=model,
        revision=revision,
        commit=commit,
        layout=kind.layout,
        family=kind.family,
        architecture=kind.architecture,
        block_size=block_size,
        sample_from_anchor=anchor_first,
        target_layer_ids=_target_layer_ids(body, model),
        mask_token_id=integer(body, model, "mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id"),
        head=head,
        rank=rank,
        confidence=_confidence(body, model, rank, sizes.hidden_size, tensors, notes),
        draft_vocab_size=integer(body, model, "draft_vocab_size", minimum=1, default=sizes.vocab_size),
        target_hidden_size=target_hidden_size,
        quantized=bool(body.get("quantization_config") or body.get("compression_config")),
        tensors=dict(tensors),
        tokenizer=tokenizer,
        notes=tuple(notes),
        **sizes._asdict(),
    )


def _speculators(config: Mapping[str, Any], model: str) -> Kind:
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ConfigError(
            f"{model}: transformer_layer_config is {type(layer).__name__}; wanted the backbone's config as an object, "
            "which the speculators library writes."
        )
    ids = config.get("aux_hidden_state_layer_ids")
    if not isinstance(ids, list):
        raise ConfigError(
            f"{model}: aux_hidden_state_layer_ids is {ids!r}; wanted a list of layer numbers (output of layer i is i+1)."
        )
    names = [name for name in _architectures(config) if _FAMILIES.get(name) == "qwen3"]
    # The drafter's own layers are Qwen3's whatever the target is, so other names mean the same class, as in vLLM.
    body = {**layer, **{key: value for key, value in config.items() if value is not None}}
    body["target_layer_ids"] = [number - 1 if _is_int(number) else number for number in ids]
    return Kind("speculators", "qwen3", names[0] if names else "Qwen3DSparkModel", body)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    body = dict(config)
    for section in reversed(_SECTIONS):
        nested = config.get(section)
        if isinstance(nested, Mapping):
            body.update({key: value for key, value in nested.items() if value is not None})
    if body.get("target_layer_ids") is None:
        body["target_layer_ids"] = body.get("dspark_target_layer_ids")
    shifted = body.get("eagle_aux_hidden_state_layer_ids")
    if body["target_layer_ids"] is None and isinstance(shifted, list):
        body["target_layer_ids"] = [number - 1 if _is_int(number) else number for number in shifted]
    return body


def _not_a_drafter(config: Mapping[str, Any], architectures: list[str], model: str) -> str:
    found = ", ".join(architectures) or f"none (model_type {config.get('model_type')!r})"
    message = f"{model} is not a DSpark drafter: its architectures are {found}; wanted one of {', '.join(_FAMILIES)}. "
    if any("DSpark" in name for name in architectures) or any(key.startswith("dspark_") for key in config):
        return (
            message + "vLLM serves this kind of DSpark checkpoint with its own classes; set VLLM_DSPARK=0 to leave it to them."
        )
    if any("DFlash" in name for name in architectures) or "dflash_config" in config:
        return message + "It looks like a DFlash drafter: use method 'dflash'."
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
        return message + (
            "It looks like a target model: serve it as the model, and give a drafter trained for it, such as "
            "deepseek-ai/dspark_qwen3_8b_block7 for Qwen/Qwen3-8B, in the speculative config."
        )
    return message + "Check that the name is the drafter's."


def _target_layer_ids(body: Mapping[str, Any], model: str) -> tuple[int, ...]:
    ids = body.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(map(_is_int, ids)):
        raise ConfigError(f"{model}: target_layer_ids is {ids!r}; wanted a non-empty list of layer numbers such as [1, 9, 17].")
    return tuple(ids)


def _head(body: Mapping[str, Any], model: str) -> tuple[Head, int]:
    rank = integer(body, model, "markov_rank", minimum=0)
    if rank == 0:
        return "none", 0
    known = [name for name in get_args(Head) if name != "none"]
    # Both libraries' default; DeepSpec compares lower case.
    name = str(body.get("markov_head_type") or "vanilla").lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"or rank 0 (found {rank}) for no head."
        raise UnknownHeadError(f"{model}: markov_head_type is {name!r}; wanted one of {', '.join(map(repr, known))}; {hint}")
    return cast(Head, name), rank


def _confidence(
    body: Mapping[str, Any], model: str, rank: int, hidden: int, tensors: Mapping[str, TensorInfo], notes: list[str]
) -> Confidence:
    stored = tensors.get(_CONFIDENCE_WEIGHT)
    enabled, with_markov = body.get("enable_confidence_head"), body.get("confidence_head_with_markov")
    if enabled is None:
        enabled = stored is not None
    if not enabled:
        return "none"
    if stored is None and not body.get("quantization_config"):
        # vLLM, too, serves such a checkpoint without confidences.
        notes.append(f"enable_confidence_head is true but there is no {_CONFIDENCE_WEIGHT}: serving without confidences.")
        return "none"
    if with_markov is None:
        with_markov = stored is not None and stored.shape[-1:] == (hidden + rank,)
    if with_markov and rank == 0:
        raise ConfigError(
            f"{model}: confidence_head_with_markov is true but markov_rank is 0; wanted a rank above 0, or the flag false."
        )
    return "markov" if with_markov else "hidden"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
