"""Writes small random drafters in every published layout, loadable by this package and by vLLM 0.32.

Shapes and field names are written out here rather than taken from the package, so that the tests compare two
independent statements of the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny drafter and of the target it fits; the head width is one that vLLM's CPU attention takes."""

    vocab_size: int = 128
    draft_vocab_size: int = 128
    hidden_size: int = 64
    target_hidden_size: int = 64
    num_target_layers: int = 4
    target_layer_ids: tuple[int, ...] = (0, 2)
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 96
    rank: int = 8
    block_size: int = 4
    mask_token_id: int = 127
    max_position_embeddings: int = 512


def write_drafter(
    folder: Path | str,
    *,
    head: str = "vanilla",
    layout: str = "deepspec",
    family: str = "qwen3",
    sample_from_anchor: bool | None = True,
    draft_vocab_size: int | None = None,
    confidence: str | None = None,
    owns_embeddings: bool = True,
    owns_lm_head: bool = True,
    k_eq_v: bool = True,
    attention_bias: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    drop_config: Collection[str] = (),
    drop_tensors: Collection[str] = (),
    **sizes: Any,
) -> Path:
    """Write config.json and safetensors for a random drafter into `folder` (created) and return it.

    `layout` is deepspec or speculators; `family` qwen3 or gemma4, the latter in deepspec's layout only. `head` is
    vanilla, gated, rnn or none; `confidence` is markov, hidden or none, by default what the head allows.
    `sample_from_anchor=None` leaves the field out and says γ−1 drafts, as speculators did before the field existed.
    `sizes` are `Tiny`'s fields. `config` overrides top-level config values; `drop_config` and `drop_tensors` remove
    entries by name. vLLM 0.32 itself loads head="vanilla" only (the others need this package, and "none" crashes its
    CPU matmul).
    """
    if "vocab_size" in sizes:
        sizes.setdefault("mask_token_id", sizes["vocab_size"] - 1)
    sizes["draft_vocab_size"] = draft_vocab_size or sizes.get("vocab_size", Tiny.vocab_size)
    if "hidden_size" in sizes:
        sizes.setdefault("target_hidden_size", sizes["hidden_size"])
    tiny = Tiny(**sizes)
    confidence = confidence or ("hidden" if head == "none" else "markov")
    tensors = _tensors(tiny, family, head, confidence, k_eq_v, attention_bias, dtype, seed)
    shared = [*(() if owns_embeddings else ["embed_tokens.weight"]), *(() if owns_lm_head else ["lm_head.weight"])]
    for name in (*drop_tensors, *shared):
        tensors.pop(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors, shards=shards)
    parts = _backbone(tiny, family, k_eq_v, attention_bias, dtype), _dspark_fields(tiny, head, confidence)
    build = _speculators_config if layout == "speculators" else _deepspec_config
    content = {**build(tiny, family, *parts, sample_from_anchor), **(config or {})}
    content = {name: value for name, value in content.items() if name not in drop_config}
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    return folder


def write_weights(folder: Path, tensors: Tensors, *, shards: int = 1) -> None:
    """model.safetensors, or `shards` numbered files with an index; replaces what an earlier call wrote."""
    for stale in folder.glob("*.safetensors*"):
        stale.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _dspark_fields(tiny: Tiny, head: str, confidence: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "block_size": tiny.block_size,
        "mask_token_id": tiny.mask_token_id,
        "markov_rank": 0 if head == "none" else tiny.rank,
        "enable_confidence_head": confidence != "none",
        "confidence_head_with_markov": confidence == "markov",
    }
    if head != "none":
        fields["markov_head_type"] = head
    return fields


def _backbone(tiny: Tiny, family: str, k_eq_v: bool, attention_bias: bool, dtype: torch.dtype) -> dict[str, Any]:
    common = {
        "vocab_size": tiny.vocab_size,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "head_dim": tiny.head_dim,
        "max_position_embeddings": tiny.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * tiny.num_layers,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if family == "qwen3":
        rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
        return {**common, "model_type": "qwen3", "hidden_act": "silu", "rope_parameters": rope, "sliding_window": None}
    return {
        **common,
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        # Half of the full layers' width, so that a reader who takes the wrong one of the two is caught.
        "head_dim": tiny.head_dim // 2,
        "num_key_value_heads": tiny.num_kv_heads if not k_eq_v else tiny.num_heads,
        "global_head_dim": tiny.head_dim,
        "num_global_key_value_heads": tiny.num_kv_heads if k_eq_v else None,
        "attention_k_eq_v": k_eq_v,
        "sliding_window": 64,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def _deepspec_config(
    tiny: Tiny, family: str, backbone: Mapping[str, Any], dspark: Mapping[str, Any], sample_from_anchor: bool | None
) -> dict[str, Any]:
    content: dict[str, Any] = {
        **backbone,
        **dspark,
        "architectures": ["Qwen3DSparkModel" if family == "qwen3" else "Gemma4DSparkModel"],
        "target_layer_ids": list(tiny.target_layer_ids),
        "num_target_layers": tiny.num_target_layers,
        "num_anchors": 512,
    }
    # DeepSpec writes neither field; they appear only where they say something.
    if sample_from_anchor is False:
        content["sample_from_anchor"] = False
    if tiny.draft_vocab_size != tiny.vocab_size:
        content["draft_vocab_size"] = tiny.draft_vocab_size
    if tiny.target_hidden_size != tiny.hidden_size:
        content["target_hidden_size"] = tiny.target_hidden_size
    return content


def _speculators_config(
    tiny: Tiny, family: str, backbone: Mapping[str, Any], dspark: Mapping[str, Any], sample_from_anchor: bool | None
) -> dict[str, Any]:
    assert family == "qwen3", "speculators drafters have Qwen3 layers whatever the target is"
    tokens = tiny.block_size if sample_from_anchor else tiny.block_size - 1
    content: dict[str, Any] = {
        **dspark,
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "tiny/target"},
        },
        "transformer_layer_config": dict(backbone),
        "aux_hidden_state_layer_ids": [layer + 1 for layer in tiny.target_layer_ids],
        "draft_vocab_size": tiny.draft_vocab_size,
        "target_hidden_size": None if tiny.target_hidden_size == tiny.hidden_size else tiny.target_hidden_size,
        "dtype": backbone["dtype"],
    }
    if sample_from_anchor is not None:
        content["sample_from_anchor"] = sample_from_anchor
    return content


def _tensors(
    tiny: Tiny, family: str, head: str, confidence: str, k_eq_v: bool, bias: bool, dtype: torch.dtype, seed: int
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Width-scaled, so that logits and confidences of an untrained drafter are neither flat nor saturated.
        values: torch.Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.to(dtype)

    d, r, vocab, drafts = tiny.hidden_size, tiny.rank, tiny.vocab_size, tiny.draft_vocab_size
    tensors = {
        "embed_tokens.weight": random(vocab, d),
        "lm_head.weight": random(drafts, d),
        "fc.weight": random(d, len(tiny.target_layer_ids) * tiny.target_hidden_size),
        "hidden_norm.weight": torch.ones(d, dtype=dtype),
        "norm.weight": torch.ones(d, dtype=dtype),
    }
    for layer in range(tiny.num_layers):
        tensors.update(_layer_tensors(tiny, f"layers.{layer}.", family, k_eq_v, bias, random))
    if head != "none":
        tensors["markov_head.markov_w1.weight"] = random(vocab, r)
        tensors["markov_head.markov_w2.weight"] = random(drafts, r)
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = random(r, d + r)
        tensors["markov_head.gate_proj.bias"] = random(r)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = random(3 * r, 2 * r + d)
        tensors["markov_head.joint_proj.bias"] = random(3 * r)
    if confidence != "none":
        tensors["confidence_head.proj.weight"] = random(1, d + r if confidence == "markov" else d)
        tensors["confidence_head.proj.bias"] = random(1)
    if drafts < vocab:
        kept = torch.randperm(vocab, generator=generator)[:drafts].sort().values
        tensors["d2t"] = kept - torch.arange(drafts)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept, True)
    return tensors


def _layer_tensors(
    tiny: Tiny, prefix: str, family: str, k_eq_v: bool, bias: bool, random: Callable[..., torch.Tensor]
) -> Tensors:
    d, q, kv = tiny.hidden_size, tiny.num_heads * tiny.head_dim, tiny.num_kv_heads * tiny.head_dim
    outputs: Sequence[tuple[str, int, int]] = [("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)]
    tensors = {}
    for name, rows, columns in outputs:
        if name == "v" and family == "gemma4" and k_eq_v:
            continue
        tensors[f"{prefix}self_attn.{name}_proj.weight"] = random(rows, columns)
        if bias:
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = random(rows)
    tensors[f"{prefix}mlp.gate_proj.weight"] = random(tiny.intermediate_size, d)
    tensors[f"{prefix}mlp.up_proj.weight"] = random(tiny.intermediate_size, d)
    tensors[f"{prefix}mlp.down_proj.weight"] = random(d, tiny.intermediate_size)
    dtype = tensors[f"{prefix}mlp.up_proj.weight"].dtype
    for name in ("q_norm", "k_norm"):
        tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(tiny.head_dim, dtype=dtype)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma4":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        tensors[f"{prefix}layer_scalar"] = torch.ones(1, dtype=dtype)
    for name in norms:
        tensors[f"{prefix}{name}.weight"] = torch.ones(d, dtype=dtype)
    return tensors
