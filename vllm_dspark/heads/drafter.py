"""A whole DSpark drafter for Qwen3-family targets in plain torch: to train one, and to check the engine against.

Parameter names are the checkpoints'. The engine does not use this class: it runs the backbone on vLLM's paged
cache. Source: arXiv 2607.05147, the released checkpoints' tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead


@dataclass(frozen=True)
class DrafterConfig:
    """Shapes of a drafter; the names are those of the checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    markov_head_type: HeadKind = "vanilla"
    markov_rank: int = 0
    confidence_head_with_markov: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (half-split pairs) of ``x`` ``[B, H, T, head_dim]`` at ``positions`` ``[B, T]``."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = positions[:, None, :, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class DraftAttention(nn.Module):
    """Attention of block queries over injected context K/V and the block itself."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """K and V, each ``[B, groups, T, head_dim]``, of ``x`` ``[B, T, d]``."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        keys = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        return rotate(keys, positions, self.config.rope_theta), self.v_proj(x).view(shape).transpose(1, 2)

    def forward(self, x: Tensor, positions: Tensor, context: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.config.head_dim)
        queries = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), positions, self.config.rope_theta)
        keys, values = (torch.cat(pair, 2) for pair in zip(context, self.keys_values(x, positions), strict=True))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    """A Qwen3 decoder layer whose attention also sees the context."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
            }
        )

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer keeps of context states: no norm of its own, no query, no MLP."""
        return self.self_attn.keys_values(x, positions)

    def forward(self, x: Tensor, positions: Tensor, context: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, context, mask)
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Drafter(nn.Module):
    """Backbone, correction head and confidence head. Embeddings and LM head are the target's, passed in."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers: Sequence[DraftLayer] = nn.ModuleList(  # type: ignore[assignment]
            DraftLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.markov_head: MarkovHead | None = None
        if config.markov_head_type != "none" and config.markov_rank:
            self.markov_head = MarkovHead(
                config.markov_head_type, config.vocab_size, config.vocab_size, config.markov_rank, config.hidden_size
            )
        with_markov = config.confidence_head_with_markov and self.markov_head is not None
        self.confidence_head = ConfidenceHead(config.hidden_size, config.markov_rank, with_markov)

    def context(self, aux: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """K/V of every draft layer from the target's hidden states ``[B, T, m*d]`` at ``positions`` ``[B, T]``."""
        states = self.hidden_norm(self.fc(aux))
        return [layer.keys_values(states, positions) for layer in self.layers]

    def forward(self, embeddings: Tensor, positions: Tensor, context: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        """Hidden states ``[B, Q, d]`` of Q block queries.

        Args:
            embeddings: the anchors' and mask tokens' embeddings, ``[B, Q, d]``.
            positions: ``[B, Q]``.
            context: what :meth:`context` returned.
            mask: True where a query (rows) may attend to context, then queries: ``[B or 1, 1, Q, T + Q]``.
        """
        for layer, keys_values in zip(self.layers, context, strict=True):
            embeddings = layer(embeddings, positions, keys_values, mask)
        return self.norm(embeddings)
