"""Sizes of the drafter's decoder layers, from a flattened config of either family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_dspark.checkpoint.errors import ConfigError
from vllm_dspark.checkpoint.spec import Family, Layout

# What transformers' Qwen3Config and Gemma4TextConfig assume when the field is left out.
QWEN3_HEAD_DIM = 128
GEMMA4_GLOBAL_HEAD_DIM = 512


class BackboneSizes(NamedTuple):
    """The `DrafterSpec` fields that describe decoder layers, under the same names."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    attention_bias: bool
    k_eq_v: bool


def backbone_sizes(body: Mapping[str, Any], model: str, layout: Layout, family: Family, notes: list[str]) -> BackboneSizes:
    """All sizes, checked to be positive integers; raises `ConfigError` naming the field that is not."""

    def size(name: str, default: int | None = None) -> int:
        return integer(body, model, name, minimum=1, default=default)

    layers, hidden, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
    if family == "gemma4":
        head_dim, kv_heads, k_eq_v = _gemma4_attention(body, model, layers, notes)
    else:
        # A speculators backbone is a bare config to vLLM, without Qwen3Config's default.
        head_dim = size("head_dim", default=QWEN3_HEAD_DIM if layout == "deepspec" else hidden // heads)
        kv_heads, k_eq_v = size("num_key_value_heads"), False
    if heads % kv_heads:
        raise ConfigError(
            f"{model}: {heads} attention heads cannot share {kv_heads} key/value heads; wanted a divisor of {heads}."
        )
    return BackboneSizes(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=size("intermediate_size"),
        attention_bias=bool(body.get("attention_bias", False)),
        k_eq_v=k_eq_v,
    )


def integer(body: Mapping[str, Any], model: str, *names: str, minimum: int | None = None, default: int | None = None) -> int:
    """The first of `names` that has a value, as an integer ≥ `minimum`; raises `ConfigError`."""
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
            wanted = "an integer" if minimum is None else f"an integer ≥ {minimum}"
            raise ConfigError(f"{model}: {name} is {value!r} in config.json; wanted {wanted}.")
        return value
    if default is None:
        raise ConfigError(
            f"{model}: config.json has no {names[0]}; wanted an integer there. Use the config the drafter was saved with."
        )
    return default


def _gemma4_attention(body: Mapping[str, Any], model: str, layers: int, notes: list[str]) -> tuple[int, int, bool]:
    """Head width, key/value heads and whether keys double as values, the same in every layer.

    Full-attention layers use the global head width and, with k_eq_v, the global key/value heads (Gemma4TextConfig).
    vLLM 0.32 stacks all layers' projections (models/gemma4_dspark.py), so layers that differ cannot be served.
    """
    types = body.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"{model}: layer_types is {types!r}; wanted one type for each of the {layers} layers.")
    head_dim = integer(body, model, "head_dim", minimum=1, default=256)
    kv_heads = integer(body, model, "num_key_value_heads", minimum=1)
    k_eq_v = bool(body.get("attention_k_eq_v", False))
    global_dim = integer(body, model, "global_head_dim", minimum=1, default=GEMMA4_GLOBAL_HEAD_DIM)
    global_kv = integer(body, model, "num_global_key_value_heads", minimum=1, default=kv_heads) if k_eq_v else kv_heads
    overrides = body.get("per_layer_config")
    shapes = set()
    for index, layer_type in enumerate(types):
        full = layer_type == "full_attention"
        own: Mapping[str, Any] = {}
        if isinstance(overrides, Mapping):
            # The resolved form newer transformers save instead of the two global fields.
            own = overrides.get(str(index)) or {}
            default_dim, default_kv = head_dim, kv_heads
        else:
            default_dim, default_kv = (global_dim, global_kv) if full else (head_dim, kv_heads)
        dim = integer(own, model, "head_dim", minimum=1, default=default_dim)
        kv = integer(own, model, "num_key_value_heads", minimum=1, default=default_kv)
        shapes.add((dim, kv, k_eq_v and full))
    if len(shapes) > 1:
        raise ConfigError(
            f"{model}: its layers differ in (head width, key/value heads, keys as values): {sorted(shapes)}; wanted "
            "the same in all, because the drafter's context keys and values are projected together. layer_types is "
            f"{types}."
        )
    if not k_eq_v:
        notes.append("attention_k_eq_v is false: vLLM 0.32 serves Gemma 4 drafters only when it is true.")
    return shapes.pop()
