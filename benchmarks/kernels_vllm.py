"""What the fused stage replaces, from public operators: vLLM 0.32's sequential loop for vanilla heads and its sampler.

Its sampler takes two stages: a kernel that leaves the best noisy logit of every block of 1,024 ids and keeps the logits for
verification, then an argmax over the blocks and a gather. The noise is the package's, which has the bits of vLLM's.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.heads.kernels.noise import gumbel, hash_prefix
from vllm_dspark.heads.modules import MarkovHead
from vllm_dspark.heads.stage import Draws, Round

BLOCK = 1024


@triton.jit
def _block_maxima(
    logits, logits_row, requests, temperature, seeds, positions, kept, kept_row, kept_slot, slot, ids, values, blocks, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    request = tl.load(requests + row).to(tl.int64)
    k = tl.load(slot)
    raw = tl.load(logits + row.to(tl.int64) * logits_row + v, mask=v < vocab, other=float("-inf"))
    tl.store(kept + request * kept_row + k * kept_slot + v, raw, mask=v < vocab)
    heat = tl.load(temperature + request)
    score = raw.to(tl.float32)
    if heat != 0.0:
        prefix = hash_prefix(tl.load(seeds + request), tl.load(positions + row), k)
        score = tl.where(v < vocab, score / heat + gumbel(prefix, v), float("-inf"))
    best, at = tl.max(score, axis=0, return_indices=True)
    tl.store(values + row * blocks + block, best)
    tl.store(ids + row * blocks + block, (block * BLOCK + at).to(tl.int64))


class Sampler:
    """Draws one slot's tokens as vLLM's ``_sample_logits`` does, on the state that a runner would have."""

    def __init__(self, batch: int, draws: Draws, device: torch.device) -> None:
        assert draws.positions is not None
        self.draws = draws
        self.requests = torch.arange(batch, device=device)[:, None].expand(-1, draws.positions.shape[1]).contiguous()
        self.slots = torch.arange(draws.positions.shape[1], dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, k: int) -> Tensor:
        draws = self.draws
        assert draws.positions is not None
        assert draws.seeds is not None
        assert draws.processed is not None
        requests, positions = self.requests[:, k].contiguous(), (draws.positions[:, k] - 1).contiguous()
        batch, vocab = logits.shape
        blocks = -(-vocab // BLOCK)
        ids = logits.new_empty(batch, blocks, dtype=torch.int64)
        values = logits.new_empty(batch, blocks, dtype=torch.float32)
        kept = draws.processed
        _block_maxima[(batch, blocks)](
            logits, logits.stride(0), requests, draws.temperature, draws.seeds, positions, kept, kept.stride(0), kept.stride(1),
            self.slots[k], ids, values, blocks, vocab, BLOCK=BLOCK,
        )  # fmt: skip
        return ids.gather(-1, values.argmax(-1, keepdim=True)).view(-1)


def sequence(head: MarkovHead, round: Round, sample: Callable[[Tensor, int], Tensor] | None) -> None:
    """The operators of DSparkSpeculator._sample_sequential; ``sample`` is None for greedy drafts."""
    previous = round.anchors
    for k in range(round.logits.shape[1]):
        bias = F.linear(F.embedding(previous, head.markov_w1.weight), head.markov_w2.weight)
        logits = round.logits[:, k] + bias
        previous = logits.argmax(-1) if sample is None else sample(logits, k)
        round.tokens[:, k] = previous
