"""The specification of the sequential stage, in plain torch. Slow and obvious on purpose: all else is tested against it.

Symbols (arXiv 2607.05147, section 3): V vocabulary, V_draft draft vocabulary, d hidden size, r rank, K slots, B
requests; x_0 is the anchor, the token the target produced last.

    vanilla:  B_k = W2 W1[x_{k-1}]
    gated:    g = sigmoid(G [h_k ; e] + b_G);  B_k = W2 (g * e),  e = W1[x_{k-1}]
    rnn:      [a ; c ; o] = J [s_{k-1} ; e ; h_k] + b_J;  s_k = sigmoid(a) s_{k-1} + (1 - sigmoid(a)) tanh(c);
              B_k = W2 tanh(o);  s_0 = 0
    none:     B_k = 0
    c_k = sigmoid(w [h_k ; e] + b), or of h_k alone
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """What the sequential stage makes of one block.

    Attributes:
        tokens: drafted target ids, ``[B, K]``.
        probabilities: q, the distributions the tokens were drawn from, over target ids, ``[B, K, V]``; one-hot where
            the temperature is 0.
        confidences: c, ``[B, K]``; ones where the drafter has no confidence head.
    """

    tokens: Tensor
    probabilities: Tensor
    confidences: Tensor


def draft_block(
    tensors: Mapping[str, Tensor],
    kind: str,
    hidden: Tensor,
    logits: Tensor,
    anchors: Tensor,
    temperature: Tensor,
    noise: Tensor | None = None,
    target_ids: Tensor | None = None,
    vocab_size: int | None = None,
) -> Block:
    """Draft one block left to right, in the precision of ``hidden``.

    Args:
        tensors: the head's tensors by their checkpoint names.
        kind: "vanilla", "gated", "rnn" or "none".
        hidden: h, ``[B, K, d]``. logits: U, the base logits over draft ids, ``[B, K, V_draft]``.
        anchors: x_0 as target ids, ``[B]``. temperature: ``[B]``; 0 takes the arg max.
        noise: exponential(1) noise ``[B, K, V_draft]`` that decides the draws; drawn here when absent.
        target_ids: the target id of each draft id, ``[V_draft]``; None where they are the same.
        vocab_size: V; default V_draft.

    Raises:
        ValueError: ``kind`` is none of the four.
    """
    if kind not in ("vanilla", "gated", "rnn", "none"):
        raise ValueError(f"head type {kind!r}; expected one of vanilla, gated, rnn, none")
    batch, slots, draft_vocab = logits.shape
    if target_ids is None:
        target_ids = torch.arange(draft_vocab)
    if noise is None:
        noise = torch.empty_like(logits).exponential_()
    get = {name: tensor.to(hidden.dtype) for name, tensor in tensors.items()}
    tokens = torch.zeros(batch, slots, dtype=torch.long)
    probabilities = hidden.new_zeros(batch, slots, vocab_size or draft_vocab)
    confidences = hidden.new_ones(batch, slots)
    for row in range(batch):
        previous = int(anchors[row])
        state = hidden.new_zeros(get["markov_head.markov_w1.weight"].shape[1]) if kind != "none" else None
        for k in range(slots):
            h = hidden[row, k]
            bias, e, state = _bias(get, kind, previous, h, state)
            corrected = logits[row, k] + bias
            if "confidence_head.proj.weight" in get:
                weight = get["confidence_head.proj.weight"][0]
                features = h if weight.shape[0] == h.shape[0] else torch.cat((h, e))
                confidences[row, k] = torch.sigmoid(weight @ features + get["confidence_head.proj.bias"][0])
            if temperature[row] == 0:
                choice = int(corrected.argmax())
                q = torch.zeros_like(corrected)
                q[choice] = 1
            else:
                q = torch.softmax(corrected / temperature[row], dim=-1)
                choice = int((q / noise[row, k]).argmax())
            previous = int(target_ids[choice])
            tokens[row, k] = previous
            probabilities[row, k, target_ids] = q
    return Block(tokens, probabilities, confidences)


def _bias(
    get: Mapping[str, Tensor], kind: str, previous: int, h: Tensor, state: Tensor | None
) -> tuple[Tensor | float, Tensor, Tensor | None]:
    """B_k, e and the next state for one request."""
    if kind == "none":
        return 0.0, h.new_zeros(0), state
    e = get["markov_head.markov_w1.weight"][previous]
    code = e
    if kind == "gated":
        gate = get["markov_head.gate_proj.weight"] @ torch.cat((h, e)) + get["markov_head.gate_proj.bias"]
        code = torch.sigmoid(gate) * e
    elif kind == "rnn":
        assert state is not None
        z = get["markov_head.joint_proj.weight"] @ torch.cat((state, e, h)) + get["markov_head.joint_proj.bias"]
        keep, candidate, output = z.chunk(3)
        state = torch.sigmoid(keep) * state + (1 - torch.sigmoid(keep)) * torch.tanh(candidate)
        code = torch.tanh(output)
    return get["markov_head.markov_w2.weight"] @ code, e, state
