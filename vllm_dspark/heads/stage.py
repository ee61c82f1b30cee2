"""The sequential stage on fixed buffers: what one round needs, and the implementation in plain torch.

Two implementations do the same to the same :class:`Round`: :class:`EagerStage` here, on any device, and
``kernels.stage.FusedStage``. Both write into tensors that exist, never synchronise and branch on host values only, so
either can be captured in a CUDA graph (torch's temporaries then come from the graph's pool).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.heads import noise as noises
from vllm_dspark.heads.candidates import Candidates, outside
from vllm_dspark.heads.weights import HeadWeights

GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn. Tensors by request slot have as many rows as the runner has slots.

    Attributes:
        temperature: float32, by slot; below 1e-5 is greedy. seeds: int64, by slot.
        positions: of the tokens to be drafted (not the ones before them), ``[B, K]`` int64.
        noise: exponential(1) ``[B, K, V_draft]`` float32, contiguous, in place of the salted noise; for tests.
        processed: corrected logits before temperature over target ids, ``[slots, K, V]``, any float type; written for
            sampled rows and sampled from as rounded there. With a reduced draft vocabulary the other columns must hold
            -inf; they are never written.
    """

    temperature: Tensor
    seeds: Tensor
    positions: Tensor
    noise: Tensor | None = None
    processed: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """Inputs and outputs of one round for B requests (padded ones included).

    Attributes:
        hidden: h, ``[B, K, d]``, contiguous if the head is gated or rnn (else it is copied); may be None for a vanilla
            head or none without confidences.
        logits: U, ``[B, K, V_draft]``, the last dimension contiguous. anchors: target ids ``[B]``.
        tokens: out, target ids, ``[B, K]`` int64, rows may be strided.
        confidences: out, ``[B, K]`` float32, or None if not wanted.
        index: request slot of each row, ``[B]``, -1 for padding, which is left untouched; None: row b is slot b.
        draws: None when every request is greedy.
    """

    hidden: Tensor | None
    logits: Tensor
    anchors: Tensor
    tokens: Tensor
    confidences: Tensor | None = None
    index: Tensor | None = None
    draws: Draws | None = None


class Stage(Protocol):
    """An implementation. ``broken`` ``[max_batch]`` int32 is 1 where the last round met a logit that is NaN or +inf."""

    name: str
    broken: Tensor

    def draft(self, round: Round) -> None: ...


class EagerStage:
    """The sequential stage in torch operations, in float32; ``compiled`` fuses each step with torch.compile."""

    def __init__(
        self,
        weights: HeadWeights,
        max_batch: int,
        device: torch.device,
        candidates: Candidates | None = None,
        compiled: bool = False,
    ) -> None:
        self.name = "torch.compile" if compiled else "eager"
        self.weights = weights
        self.candidates = candidates
        self.broken = torch.zeros(max_batch, dtype=torch.int32, device=device)
        # Dequantised to the model's type here: a fallback is not where memory is saved.
        self.w2 = None if weights.w2 is None else weights.w2.dequantise(weights.dtype)
        self._correct = torch.compile(self._corrected, dynamic=True) if compiled else self._corrected

    def draft(self, round: Round) -> None:
        """Write tokens, confidences and processed logits of ``round``."""
        weights, (batch, slots, _) = self.weights, round.logits.shape
        self.broken.zero_()
        if batch == 0:
            return
        real = torch.ones(batch, dtype=torch.bool, device=round.logits.device)
        if round.index is not None:
            real = round.index[:batch] >= 0
        projected = None
        if weights.outer is not None:
            assert round.hidden is not None
            projected = F.linear(round.hidden.float(), weights.outer.float(), _float(weights.outer_bias))
        base_confidence = None
        if round.confidences is not None and weights.confidence is not None:
            assert round.hidden is not None
            base_confidence = round.hidden.float() @ weights.confidence[0] + weights.confidence[1]
        previous, state = torch.where(real, round.anchors.long(), 0), None
        for k in range(slots):
            if base_confidence is not None and round.confidences is not None:
                table = weights.confidence_table
                logit = base_confidence[:, k] if table is None else base_confidence[:, k] + table[previous]
                round.confidences[:, k] = torch.where(real, torch.sigmoid(logit), round.confidences[:, k])
            z, state = self._correct(previous, round.logits[:, k], None if projected is None else projected[:, k], state)
            excluded = None if self.candidates is None else outside(self.candidates, round.logits[:, k], previous)
            if excluded is not None:
                z = z.masked_fill(excluded, -torch.inf)
            self.broken[:batch] |= (real & (z.isnan() | (z == torch.inf)).any(-1)).int()
            choice = z.argmax(-1) if round.draws is None else self._draw(z, k, round, round.draws, real)
            previous = choice if weights.target_ids is None else weights.target_ids[choice]
            previous = torch.where(real, previous, 0)
            round.tokens[:, k] = torch.where(real, previous, round.tokens[:, k])

    def _corrected(
        self, previous: Tensor, base: Tensor, projected: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """z ``[B, V_draft]`` float32 and the next state of an rnn head."""
        weights = self.weights
        if weights.w1 is None or self.w2 is None:
            return base.float(), None
        e = weights.w1[previous].float()
        code = e
        if weights.kind != "vanilla":
            assert projected is not None
            assert weights.inner is not None
            inner = weights.inner.float()
            if weights.kind == "gated":
                code = torch.sigmoid(projected + F.linear(e, inner)) * e
            else:
                state = torch.zeros_like(e) if state is None else state
                keep, fresh, shown = (projected + F.linear(torch.cat((state, e), -1), inner)).chunk(3, dim=-1)
                keep = torch.sigmoid(keep)
                state = keep * state + (1 - keep) * torch.tanh(fresh)
                code = torch.tanh(shown)
        bias = F.linear(code.to(self.w2.dtype), self.w2).float()
        if weights.soft_cap:
            bias = torch.tanh(bias / weights.soft_cap) * weights.soft_cap
        return base.float() + bias * weights.scale, state

    def _draw(self, z: Tensor, k: int, round: Round, draws: Draws, real: Tensor) -> Tensor:
        """Draft ids ``[B]``; writes the processed logits of slot ``k``."""
        rows = torch.arange(z.shape[0], device=z.device)
        request = rows if round.index is None else torch.where(real, round.index[: z.shape[0]].long(), 0)
        temperature = torch.where(real, draws.temperature[request], 0.0)
        hot = temperature >= GREEDY_BELOW
        ids = torch.arange(z.shape[1], device=z.device) if self.weights.target_ids is None else self.weights.target_ids
        if draws.processed is not None:
            z = torch.where(hot[:, None], z.to(draws.processed.dtype).float(), z)
            # By slot, not by row: padded rows then write nothing, and no two rows write to one place.
            row_of = torch.full((draws.processed.shape[0] + 1,), -1, dtype=torch.long, device=z.device)
            row_of.scatter_(0, torch.where(hot, request, draws.processed.shape[0]), rows)
            row_of = row_of[:-1]
            kept = draws.processed[:, k, ids]
            draws.processed[:, k, ids] = torch.where((row_of >= 0)[:, None], z[row_of.clamp_min(0)].to(kept.dtype), kept)
        if draws.noise is None:
            g = noises.gumbel(draws.seeds[request][:, None], draws.positions[:, k, None] - 1, ids[None])
        else:
            g = -torch.log(draws.noise[:, k])
        noisy = z / torch.where(hot, temperature, 1.0)[:, None] + g
        return torch.where(hot[:, None], noisy, z).argmax(-1)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
