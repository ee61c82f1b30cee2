"""Which tensors a drafter must contain, and with which shapes.

Names and shapes are those DeepSpec and speculators save and vLLM's models/{qwen3,gemma4}_dspark.py load. Every linear
weight is `[out, in]`.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_dspark.checkpoint.errors import TensorsError
from vllm_dspark.checkpoint.spec import DRAFT_TO_TARGET, EMBEDDINGS, LM_HEAD, DrafterSpec

MAX_LISTED = 12


class ExpectedTensor(NamedTuple):
    """Shape a tensor must have, and whether the checkpoint may do without it."""

    shape: tuple[int, ...]
    required: bool = True


def expected_tensors(
    spec: DrafterSpec, *, target_vocab_size: int | None = None, target_hidden_size: int | None = None
) -> dict[str, ExpectedTensor]:
    """Name → `ExpectedTensor` for the drafter `spec` describes.

    The target's sizes (default: the ones `spec` was trained with) decide whether its embeddings and output head can be
    shared, and so whether the checkpoint must bring its own.
    """
    target_vocab = spec.vocab_size if target_vocab_size is None else target_vocab_size
    target_hidden = spec.target_hidden_size if target_hidden_size is None else target_hidden_size
    d, v = spec.hidden_size, spec.vocab_size
    same_width = d == target_hidden
    table = {
        EMBEDDINGS: ExpectedTensor((v, d), required=not (same_width and v <= target_vocab)),
        LM_HEAD: ExpectedTensor(
            (spec.draft_vocab_size, d), required=not (same_width and spec.draft_vocab_size == target_vocab)
        ),
        "fc.weight": ExpectedTensor((d, len(spec.target_layer_ids) * spec.target_hidden_size)),
        "hidden_norm.weight": ExpectedTensor((d,)),
        "norm.weight": ExpectedTensor((d,)),
        DRAFT_TO_TARGET: ExpectedTensor((spec.draft_vocab_size,), required=spec.draft_vocab_size < target_vocab),
    }
    for layer in range(spec.num_layers):
        table.update(_layer(spec, f"layers.{layer}."))
    table.update(_heads(spec))
    return table


def check_tensors(spec: DrafterSpec, *, target_vocab_size: int | None = None, target_hidden_size: int | None = None) -> None:
    """Raise one `TensorsError` that lists every missing, misshapen or foreign tensor (the first dozen).

    A quantised checkpoint stores other names and shapes per module, so for it only the modules' presence is checked.
    """
    expected = expected_tensors(spec, target_vocab_size=target_vocab_size, target_hidden_size=target_hidden_size)
    faults = _missing_modules(spec, expected) if spec.quantized else _wrong_tensors(spec, expected)
    if not faults:
        return
    listed = "; ".join(faults[:MAX_LISTED])
    more = f"; and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    raise TensorsError(
        f"{spec.model}: {len(faults)} of the tensors do not fit the config ({spec.family}, {spec.num_layers} layers, "
        f"head {spec.head!r} of rank {spec.rank}, draft vocabulary {spec.draft_vocab_size} of {spec.vocab_size}): "
        f"{listed}{more}. Use the config.json that was saved with these weights, or export the drafter again."
    )


def _wrong_tensors(spec: DrafterSpec, expected: dict[str, ExpectedTensor]) -> list[str]:
    faults = []
    for name, want in expected.items():
        found = spec.tensors.get(name)
        if found is None and want.required:
            faults.append(f"{name} is missing, wanted {list(want.shape)}{_why(name)}")
        elif found is not None and found.shape != want.shape:
            faults.append(f"{name} is {list(found.shape)}, wanted {list(want.shape)}")
    # A head of another type would load partially, and draft badly without a word.
    for name in spec.tensors:
        if name.startswith("markov_head.") and name not in expected:
            faults.append(f"{name} {list(spec.tensors[name].shape)} belongs to no {spec.head!r} head")
    return faults


def _missing_modules(spec: DrafterSpec, expected: dict[str, ExpectedTensor]) -> list[str]:
    present = {name.rpartition(".")[0] or name for name in spec.tensors}
    return [
        f"{name} is missing (nor is anything else of its module there){_why(name)}"
        for name, want in expected.items()
        if want.required and (name.rpartition(".")[0] or name) not in present
    ]


def _why(name: str) -> str:
    reasons = {
        EMBEDDINGS: " (the target's embeddings have another size and cannot be shared)",
        LM_HEAD: " (the target's output head has another size and cannot be shared)",
        DRAFT_TO_TARGET: " (a reduced draft vocabulary needs the offsets from draft to target ids)",
    }
    return reasons.get(name, "")


def _layer(spec: DrafterSpec, prefix: str) -> dict[str, ExpectedTensor]:
    d, width = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * width, spec.num_kv_heads * width
    shapes = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
        "mlp.gate_proj.weight": (spec.intermediate_size, d),
        "mlp.up_proj.weight": (spec.intermediate_size, d),
        "mlp.down_proj.weight": (d, spec.intermediate_size),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    if spec.attention_bias:
        shapes |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv), ("o", d))}
    if spec.k_eq_v:
        shapes = {name: shape for name, shape in shapes.items() if ".v_proj." not in name}
    if spec.family == "gemma4":
        shapes |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
    table = {prefix + name: ExpectedTensor(shape) for name, shape in shapes.items()}
    if spec.family == "gemma4":
        # A buffer that starts at 1 in DeepSpec and in vLLM alike.
        table[prefix + "layer_scalar"] = ExpectedTensor((1,), required=False)
    return table


def _heads(spec: DrafterSpec) -> dict[str, ExpectedTensor]:
    """Correction and confidence heads: W1 `[V, r]`, W2 `[V_draft, r]` and the head's own projection, with bias."""
    d, r = spec.hidden_size, spec.rank
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.head != "none":
        shapes["markov_head.markov_w1.weight"] = (spec.vocab_size, r)
        shapes["markov_head.markov_w2.weight"] = (spec.draft_vocab_size, r)
    if spec.head == "gated":
        shapes |= {"markov_head.gate_proj.weight": (r, d + r), "markov_head.gate_proj.bias": (r,)}
    if spec.head == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (3 * r, 2 * r + d), "markov_head.joint_proj.bias": (3 * r,)}
    if spec.confidence != "none":
        width = d + r if spec.confidence == "markov" else d
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return {name: ExpectedTensor(shape) for name, shape in shapes.items()}
