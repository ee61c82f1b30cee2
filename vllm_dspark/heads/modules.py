"""The heads as modules whose parameters carry the checkpoints' tensor names.

``markov_head.markov_w1.weight``, ``markov_head.markov_w2.weight``, ``markov_head.gate_proj.*``,
``markov_head.joint_proj.*`` and ``confidence_head.proj.*`` load by name from either checkpoint layout.
The formulas are those of ``reference.py``, which is the specification; shapes are written there.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HeadKind = Literal["vanilla", "gated", "rnn", "none"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)


class MarkovHead(nn.Module):
    """One correction step: the bias that token x_{k-1} puts on the logits of x_k.

    Args:
        kind: "vanilla", "gated" or "rnn" ("none" is a drafter without this module).
        vocab_size: V, rows of ``markov_w1``: previous tokens are target ids.
        draft_vocab_size: V_draft, rows of ``markov_w2``: the bias is over draft ids.
        rank: r. hidden_size: d, the size of the block's hidden states.
        soft_cap, scale: the bias is capped at ±soft_cap by tanh (None: not), then multiplied by scale, as vLLM's
            LogitsProcessor treats it; base logits come already so treated.
    """

    def __init__(
        self,
        kind: HeadKind,
        vocab_size: int,
        draft_vocab_size: int,
        rank: int,
        hidden_size: int,
        soft_cap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in ("vanilla", "gated", "rnn"):
            raise ValueError(f"head type {kind!r} has no module; expected one of vanilla, gated, rnn")
        self.kind = kind
        self.rank = rank
        self.soft_cap, self.scale = soft_cap or 0.0, scale
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def embed(self, previous: Tensor) -> Tensor:
        """e = W1[x_{k-1}]: ids ``[B]`` to ``[B, r]``."""
        return F.embedding(previous, self.markov_w1.weight)

    def project_hidden(self, hidden: Tensor) -> Tensor | None:
        """The part of the head that needs only the block's hidden states, for all slots in one product.

        ``[..., d]`` to ``[..., r]`` (gated), ``[..., 3r]`` (rnn) or None (vanilla), bias included.
        """
        if self.kind == "gated":
            return F.linear(hidden, self.gate_proj.weight[:, : -self.rank], self.gate_proj.bias)
        if self.kind == "rnn":
            return F.linear(hidden, self.joint_proj.weight[:, 2 * self.rank :], self.joint_proj.bias)
        return None

    def step(self, embedding: Tensor, projected: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The ``[B, r]`` code that ``markov_w2`` turns into the bias, and the next state (rnn only; None is zero)."""
        if self.kind == "vanilla":
            return embedding, None
        assert projected is not None
        if self.kind == "gated":
            gate = F.linear(embedding, self.gate_proj.weight[:, -self.rank :])
            return torch.sigmoid(projected + gate) * embedding, None
        if state is None:
            joint = F.linear(embedding, self.joint_proj.weight[:, self.rank : 2 * self.rank])
            state = torch.zeros_like(embedding)
        else:
            joint = F.linear(torch.cat((state, embedding), -1), self.joint_proj.weight[:, : 2 * self.rank])
        keep, candidate, output = (projected + joint).chunk(3, dim=-1)
        keep = torch.sigmoid(keep)
        state = keep * state + (1 - keep) * torch.tanh(candidate)
        return torch.tanh(output), state

    def bias(self, code: Tensor) -> Tensor:
        """B_k = W2 code: ``[B, r]`` to ``[B, V_draft]``."""
        bias = F.linear(code, self.markov_w2.weight)
        if self.soft_cap:
            bias = torch.tanh(bias / self.soft_cap) * self.soft_cap
        return bias if self.scale == 1.0 else bias * self.scale


class ConfidenceHead(nn.Module):
    """c_k = sigmoid(w [h_k ; e_k] + b), or of h_k alone: the chance that x_k survives if x_1..x_{k-1} did."""

    def __init__(self, hidden_size: int, rank: int, with_markov: bool) -> None:
        super().__init__()
        self.with_markov = with_markov
        self.proj = nn.Linear(hidden_size + (rank if with_markov else 0), 1)

    def forward(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        """Logits of the confidences, ``[..., d]`` and ``[..., r]`` to ``[...]``, in float32."""
        features = torch.cat((hidden, embedding), -1) if self.with_markov and embedding is not None else hidden
        return F.linear(features.float(), self.proj.weight.float(), self.proj.bias.float()).squeeze(-1)
