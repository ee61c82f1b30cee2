"""Folders that vLLM loads with ``load_format="dummy"``: configs, and for the drafter headers of weights that are not there."""

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from vllm_dspark.checkpoint.layouts import build_spec, recognise
from vllm_dspark.checkpoint.tensors import expected_tensors


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen3 target and of its drafter; ``layers`` and ``draft_layers`` are decoder layers."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    draft_layers: int
    target_layer_ids: tuple[int, ...]
    rank: int
    mask: int
    block: int = 7


QWEN3_8B = Sizes(
    vocabulary=151936, hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, positions=40960,
    draft_layers=5, target_layer_ids=(1, 9, 17, 25, 33), rank=256, mask=151669,
)  # fmt: skip
TINY = Sizes(
    vocabulary=128, hidden=64, intermediate=96, layers=4, heads=4, kv_heads=2, head_dim=32, positions=512,
    draft_layers=2, target_layer_ids=(0, 2), rank=8, mask=127,
)  # fmt: skip


def write(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Write a target and a drafter; returns their folders."""
    return write_target(folder / "target", sizes), write_drafter(folder / "drafter", sizes)


def write_target(folder: Path, sizes: Sizes) -> Path:
    return _config(folder, {"architectures": ["Qwen3ForCausalLM"], **_backbone(sizes, sizes.layers)})


def write_drafter(folder: Path, sizes: Sizes) -> Path:
    """A DeepSpec checkpoint with a vanilla head, which vLLM serves too. It shares the target's embeddings and output head.

    The file of weights has real headers and a hole for the rest, so it takes no space.
    """
    config = {
        "architectures": ["Qwen3DSparkModel"], **_backbone(sizes, sizes.draft_layers),
        "num_target_layers": sizes.layers, "target_layer_ids": list(sizes.target_layer_ids), "block_size": sizes.block,
        "mask_token_id": sizes.mask, "markov_head_type": "vanilla", "markov_rank": sizes.rank,
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    name = str(_config(folder, config))
    kind = recognise(config, name)
    spec = build_spec(kind, {}, model=name, revision=None, commit=None, tokenizer=None, sample_from_anchor=True)
    tensors = expected_tensors(replace(spec, confidence="markov"))  # which shows in the weights, not in the config alone
    shapes = {tensor: want.shape for tensor, want in tensors.items() if want.required}
    _hollow(folder / "model.safetensors", shapes)
    return folder


def _backbone(sizes: Sizes, layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "dtype": "bfloat16", "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate, "num_hidden_layers": layers, "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim, "max_position_embeddings": sizes.positions,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "use_sliding_window": False,
        "sliding_window": None, "layer_types": ["full_attention"] * layers, "max_window_layers": layers,
        "initializer_range": 0.02, "use_cache": True, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    return folder


def _hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
