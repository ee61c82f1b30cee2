"""Noise for draws that vLLM's Model Runner V2 can repeat, in plain torch: the specification of ``kernels/noise.py``.

A draw is ``argmax(logits / T + g)`` with g standard Gumbel. g is a pure function of the request's seed, the position
before the drawn token, the slot and the token's target id, so it does not depend on batch, tile or launch.

- Drafts use positions shifted by ``DRAFT_SALT``: verification is a ratio test, and a proposal that shared its noise with the
  target's own draw of the same position would no longer be independent of it.
- The slot is mixed into the seed. A position whose draft was rejected or cut is drafted again in a later round, always in an
  earlier slot. With the same noise the new draft would depend on what the old one led to: on a block verified as a whole, or
  on a budget made from confidences of that round.

Source: vLLM 0.33's sampler (v1/worker/gpu/sample/gumbel.py, ``is_drafting`` and ``spec_step_seed``; 0.32 has no slots); the
hash is MurmurHash3 x86 32-bit (public domain) of the 16 bytes seed, position mod 2^32, token id.
"""

import torch
from torch import Tensor

DRAFT_SALT = 1 << 30
_WORD = 0xFFFFFFFF


def _rotate(h: Tensor, left: int) -> Tensor:
    return ((h << left) | (h >> (32 - left))) & _WORD


def _mix(h: Tensor, word: Tensor) -> Tensor:
    word = _rotate((word & _WORD) * 0xCC9E2D51 & _WORD, 15) * 0x1B873593 & _WORD
    return (_rotate(h ^ word, 13) * 5 + 0xE6546B64) & _WORD


def murmur3(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32-bit hashes in int64 of int64 operands of any shapes that broadcast."""
    h = torch.zeros((), dtype=torch.int64, device=seeds.device)
    for word in (seeds, seeds >> 32, positions, tokens):
        h = _mix(h, word)
    h = h ^ 16  # the length in bytes
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


def uniform(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Float32 in (0, 1]: (hash + 1/2) / 2^32, all 32 bits of it near 0."""
    h = murmur3(seeds, positions, tokens)
    return (h >> 16).float() * 2.0**-16 + ((h & 0xFFFF).float() + 0.5) * 2.0**-32


def slot_seeds(seeds: Tensor, slot: int | Tensor) -> Tensor:
    """Seeds for the draws of one slot, from 0: the slot goes into their upper words."""
    return seeds ^ (slot << 32)


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor, slots: int | Tensor) -> Tensor:
    """Salted standard Gumbel noise, float32: -log(-log(1 - u)).

    Args:
        seeds: of the requests. positions: before the drawn token, without the salt. tokens: target ids. slots: k - 1, from 0.
            All int64.
    """
    u = uniform(slot_seeds(seeds, slots), positions + DRAFT_SALT, tokens)
    return -torch.log(-torch.log1p(-u.double())).float()
