"""The sequential stage on fixed buffers: what one round needs, and the implementation in plain torch.

Two implementations do the same to the same :class:`Round`: :class:`EagerStage` here, on any device, and
``kernels.stage.FusedStage``. Both write into tensors that exist, never synchronise and branch on host values only, so
either can be captured in a CUDA graph (torch's temporaries then come from the graph's pool).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_dspark.heads import noise as noises
from vllm_dspark.heads.candidates import Candidates, outside
from vllm_dspark.heads.weights import HeadWeights

GREEDY_BELOW = 1e-5
FLOOR = -30000.0  # in place of logits that are not numbers: q stays a distribution, in every float type

Sampler = Callable[[Tensor, int], Tensor]
"""An engine's own: corrected logits of one slot over draft ids, ``[B, V_draft]``, and the slot, to target ids ``[B]``."""


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn. Tensors by request slot have as many rows as the runner has slots.

    Attributes:
        temperature: float32, by slot; below 1e-5 is greedy. seeds: int64, by slot.
        positions: of the tokens to be drafted (not the ones before them), ``[B, K]`` int64.
        noise: exponential(1) ``[B, K, V_draft]`` float32, contiguous, in place of the salted noise of seeds and positions.
        processed: corrected logits before temperature over target ids, ``[slots, K, V]``, any float type; written for
            sampled rows and sampled from as rounded there. With a reduced draft vocabulary the other columns must hold
            -inf; they are never written.
    """

    temperature: Tensor
    seeds: Tensor | None = None
    positions: Tensor | None = None
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
        sampler: instead of ``draws``, given corrected logits in the type of ``logits``; only :class:`EagerStage` can call one.
    """

    hidden: Tensor | None
    logits: Tensor
    anchors: Tensor
    tokens: Tensor
    confidences: Tensor | None = None
    index: Tensor | None = None
    draws: Draws | None = None
    sampler: Sampler | None = None


class Stage(Protocol):
    """An implementation.

    Attributes:
        broken: ``[max_batch]`` int32, 1 where the last round met a corrected logit that is NaN or +inf. Such logits are taken
            for very low ones, so that the tokens are still draws from the q that verification is told, and all confidences
            of the row are 0.
    """

    name: str
    weights: HeadWeights
    broken: Tensor
    candidates: Candidates | None

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
        real = None if round.index is None else round.index[:batch] >= 0
        projected = None
        if weights.outer is not None:
            assert round.hidden is not None
            projected = F.linear(round.hidden.float(), weights.outer.float(), _float(weights.outer_bias))
        previous, before, peaks = _kept(real, round.anchors.long(), 0), [], []
        state = None
        if weights.kind == "rnn":
            state = torch.zeros(batch, weights.rank, device=round.logits.device)
        for k in range(slots):
            before.append(previous)
            z, state = self._correct(previous, round.logits[:, k], None if projected is None else projected[:, k], state)
            peaks.append(z.amax(-1))  # NaN and +inf show up in it
            z = z.nan_to_num(nan=FLOOR, posinf=FLOOR, neginf=-torch.inf)
            excluded = None if self.candidates is None else outside(self.candidates, round.logits[:, k], previous)
            if excluded is not None:
                z = z.masked_fill(excluded, -torch.inf)
            previous = _kept(real, self._next(z, k, round, real), 0)
            round.tokens[:, k] = _kept(real, previous, round.tokens[:, k])
        sound = (torch.stack(peaks) < torch.inf).all(0)
        self.broken[:batch] = _kept(real, ~sound, False)
        if round.confidences is not None and weights.confidence is not None:
            assert round.hidden is not None
            logits = round.hidden.float() @ weights.confidence[0] + weights.confidence[1]
            if weights.confidence_table is not None:
                logits = logits + weights.confidence_table[torch.stack(before, 1)]
            sure = torch.sigmoid(logits).masked_fill(~sound[:, None], 0.0)
            round.confidences.copy_(sure if real is None else torch.where(real[:, None], sure, round.confidences))

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
                assert state is not None
                keep, fresh, shown = (projected + F.linear(torch.cat((state, e), -1), inner)).chunk(3, dim=-1)
                keep = torch.sigmoid(keep)
                state = keep * state + (1 - keep) * torch.tanh(fresh)
                code = torch.tanh(shown)
        bias = F.linear(code.to(self.w2.dtype), self.w2).float()
        if weights.soft_cap:
            bias = torch.tanh(bias / weights.soft_cap) * weights.soft_cap
        return base.float() + (bias if weights.scale == 1.0 else bias * weights.scale), state

    def _next(self, z: Tensor, k: int, round: Round, real: Tensor | None) -> Tensor:
        """Target ids ``[B]`` of slot ``k``."""
        if round.sampler is not None:
            return round.sampler(z.to(round.logits.dtype), k)
        choice = z.argmax(-1) if round.draws is None else self._draw(z, k, round, round.draws, real)
        return choice if self.weights.target_ids is None else self.weights.target_ids[choice]

    def _draw(self, z: Tensor, k: int, round: Round, draws: Draws, real: Tensor | None) -> Tensor:
        """Draft ids ``[B]``; writes the processed logits of slot ``k``."""
        rows = torch.arange(z.shape[0], device=z.device)
        request = rows if round.index is None else _kept(real, round.index[: z.shape[0]].long(), 0)
        temperature = _kept(real, draws.temperature[request], 0.0)
        hot = temperature >= GREEDY_BELOW
        if draws.processed is not None:
            z = torch.where(hot[:, None], z.to(draws.processed.dtype).float(), z)
            self._keep(z, hot, request, draws.processed[:, k])
        if draws.noise is None:
            assert draws.seeds is not None
            assert draws.positions is not None
            ids = torch.arange(z.shape[1], device=z.device) if self.weights.target_ids is None else self.weights.target_ids
            g = noises.gumbel(draws.seeds[request][:, None], draws.positions[:, k, None] - 1, ids[None], k)
        else:
            g = -torch.log(draws.noise[:, k])
        noisy = z / torch.where(hot, temperature, 1.0)[:, None] + g
        return torch.where(hot[:, None], noisy, z).argmax(-1)

    def _keep(self, z: Tensor, hot: Tensor, request: Tensor, processed: Tensor) -> None:
        """Write z of hot rows to their slots; slot by slot, so that padded rows write nothing and no two to one place."""
        slots, ids = processed.shape[0], self.weights.target_ids
        row_of = torch.full((slots + 1,), -1, dtype=torch.long, device=z.device)
        row_of.scatter_(0, torch.where(hot, request, slots), torch.arange(len(z), device=z.device))
        row_of = row_of[:-1]
        old = processed[:, : z.shape[1]] if ids is None else processed[:, ids]
        new = torch.where((row_of >= 0)[:, None], z[row_of.clamp_min(0)].to(old.dtype), old)
        if ids is None:
            old.copy_(new)
        else:
            processed[:, ids] = new


def _kept(real: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` in real rows, ``old`` in padded ones; None: no row is padding."""
    return new if real is None else torch.where(real, new, old)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
