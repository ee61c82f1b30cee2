"""The one description every checkpoint layout is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Layout = Literal["deepspec", "speculators"]
Family = Literal["qwen3", "gemma4"]
Head = Literal["vanilla", "gated", "rnn", "none"]
Confidence = Literal["none", "hidden", "markov"]

EMBEDDINGS = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
DRAFT_TO_TARGET = "d2t"


class TensorInfo(NamedTuple):
    """Shape and safetensors dtype name (`"BF16"`, `"F32"`, `"I64"`, …) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class DrafterSpec:
    """What a drafter checkpoint is, whichever layout it was published in.

    Sizes are counts; token ids are target ids unless a field says otherwise. Symbols: V input vocabulary, d hidden
    size, r head rank, γ block size, m number of target layers read (arXiv 2607.05147 §3).
    """

    model: str
    """Hub id or folder, as asked for."""
    revision: str | None = None
    """Hub revision as asked for; None is the default branch or a local folder."""
    commit: str | None = None
    """Hub commit the description was read from; None for a local folder."""
    layout: Layout
    """Which library's config and naming it was published with."""
    family: Family
    """Backbone: Qwen3 decoder layers or Gemma 4 ones."""
    architecture: str
    """The vLLM model class name that loads it."""

    block_size: int
    """γ as trained: query slots per block."""
    sample_from_anchor: bool
    """True: slot 0, the anchor's own, predicts the next token. False: slot 0 is context and only masks predict."""
    target_layer_ids: tuple[int, ...]
    """Target layers whose outputs feed the drafter, 0-based; −1 is the embedding output."""
    mask_token_id: int
    """Token embedded in the slots to be predicted."""

    head: Head
    """Correction head of the sequential stage; "none" is plain block drafting (rank 0)."""
    rank: int
    """r, width of the head's token embedding; 0 without a head."""
    confidence: Confidence
    """Input of the confidence head: hidden state, hidden state and head embedding, or no such head."""

    vocab_size: int
    """V: rows of the input embedding and of the head's token embedding; ids as in the target."""
    draft_vocab_size: int
    """Ids the drafter can propose; less than V when the vocabulary is reduced."""
    hidden_size: int
    """d, the drafter's own width."""
    target_hidden_size: int
    """Width of one target layer's hidden state, as trained."""
    num_layers: int
    """The drafter's own decoder layers."""
    num_heads: int
    """Query heads per layer."""
    num_kv_heads: int
    """Key and value heads per layer; divides `num_heads`."""
    head_dim: int
    """Width of one head."""
    intermediate_size: int
    """Width inside the MLP."""
    attention_bias: bool = False
    """The attention projections have biases."""
    k_eq_v: bool = False
    """Values come from the key projection (Gemma 4); there is no v_proj then."""
    quantized: bool = False
    """The config declares a quantisation, so stored shapes are the quantiser's business."""

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False, hash=False)
    """Name → shape and dtype of every stored tensor, from the file headers. Read only."""
    tokenizer: str | None = None
    """A local tokenizer.json that came with the drafter."""
    notes: tuple[str, ...] = ()
    """What had to be assumed while reading, in sentences; also warned about where it can cost acceptance."""

    @property
    def num_draft_tokens(self) -> int:
        """The most tokens one round can draft: γ, or γ−1 when slot 0 does not predict."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def owns_embeddings(self) -> bool:
        """Whether the checkpoint has its own input embeddings instead of sharing the target's."""
        return EMBEDDINGS in self.tensors

    @property
    def owns_lm_head(self) -> bool:
        """Whether the checkpoint has its own output head instead of sharing the target's."""
        return LM_HEAD in self.tensors

    @property
    def aux_hidden_state_layer_ids(self) -> tuple[int, ...]:
        """Target layers as vLLM counts them: the *input* of that layer, so one more than `target_layer_ids`."""
        return tuple(layer + 1 for layer in self.target_layer_ids)
