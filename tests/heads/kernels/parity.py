"""Run an implementation of the sequential stage on a case and hold it to the specification, token by token.

The reference, in float64 on the same values (W2 as its format keeps it), is led along the drafted tokens. A greedy token
must then be its arg max, a sampled one the arg max of z / T + noise, but for ties: the reference's own two best within
``tie`` of each other. Ties are counted and bounded. Outputs are poisoned before each run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sequential_cases import Case
from torch import Tensor

from vllm_dspark.heads.kernels.stage import FusedStage
from vllm_dspark.heads.stage import Draws, EagerStage, Round, Stage
from vllm_dspark.heads.weights import HeadWeights, prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = -77
SPARE = 3  # request slots beyond the batch


@dataclass
class KernelCase(Case):
    """A case in a W2 format, on a runner's slots: some rows padding, the rest at permuted request slots."""

    w2_format: Any = "native"
    padded: tuple[int, ...] = ()
    indexed: bool = True
    processed_dtype: torch.dtype = torch.float32
    soft_cap: float = 0.0
    scale: float = 1.0
    weights: HeadWeights = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, module in (("markov", self.markov), ("confidence_head", self.confidence_head)):
            setattr(self, name, None if module is None else module.to(DEVICE))
        ids = None if self.target_ids is None else self.target_ids.to(DEVICE)
        if self.markov is not None:
            self.markov.soft_cap, self.markov.scale = self.soft_cap, self.scale
        self.weights = prepare(self.markov, self.confidence_head, ids, self.w2_format)
        self.slot_of = torch.randperm(self.batch + SPARE, generator=torch.Generator().manual_seed(self.seed))[: self.batch]
        self.seeds = torch.randint(-(2**62), 2**62, (self.batch + SPARE,), generator=torch.Generator().manual_seed(self.seed))
        self.positions = torch.arange(self.batch)[:, None] * 1000 + torch.arange(self.slots) + 1
        if not self.indexed:
            self.slot_of = torch.arange(self.batch)
        self.real = torch.ones(self.batch, dtype=torch.bool)
        self.real[list(self.padded)] = False

    def tensors(self) -> dict[str, Tensor]:
        named = {name: tensor.cpu() for name, tensor in super().tensors().items()}
        if self.weights.w2 is not None:
            named["markov_head.markov_w2.weight"] = self.weights.w2.dequantise().double().cpu()
        return named


@dataclass
class Outcome:
    """What a stage wrote, by row of the batch, on the CPU. ``processed`` is by request slot."""

    tokens: Tensor
    confidences: Tensor
    processed: Tensor
    broken: Tensor


def build(case: KernelCase, fused: bool = True, max_batch: int | None = None) -> Stage:
    rows = max(max_batch or case.batch, 1)
    return FusedStage(case.weights, rows, case.slots, DEVICE) if fused else EagerStage(case.weights, rows, DEVICE)


def run(case: KernelCase, stage: Stage, sampled: bool = True, injected: bool = True, fill: float | None = None) -> Outcome:
    """One round into poisoned outputs; anchors of padded rows are poison too. ``fill`` is what processed logits start as."""
    tokens = torch.full((case.batch + SPARE, case.slots), POISON, device=DEVICE)
    confidences = torch.full((case.batch + SPARE, case.slots), float("nan"), device=DEVICE)
    if fill is None:
        fill = float("nan") if case.target_ids is None else float("-inf")
    processed = torch.full((case.batch + SPARE, case.slots, case.vocab), fill, dtype=case.processed_dtype, device=DEVICE)
    temperature = torch.full((case.batch + SPARE,), float("nan"))
    temperature[case.slot_of] = case.temperature
    anchors = torch.where(case.real, case.anchors, POISON)
    index = torch.where(case.real, case.slot_of, -1)
    draws = Draws(
        temperature.to(DEVICE), case.seeds.to(DEVICE), case.positions.to(DEVICE),
        case.noise.to(DEVICE) if injected else None, processed,
    )  # fmt: skip
    stage.broken.fill_(POISON)
    stage.draft(
        Round(
            case.hidden.to(DEVICE), case.logits.to(DEVICE), anchors.to(DEVICE), tokens[: case.batch],
            confidences[: case.batch], index.to(DEVICE) if case.indexed else None, draws if sampled else None,
        )
    )  # fmt: skip
    assert bool((tokens[case.batch :] == POISON).all())
    assert bool(confidences[case.batch :].isnan().all())
    broken = stage.broken.cpu()
    assert not bool((broken == POISON).any())
    return Outcome(tokens[: case.batch].cpu(), confidences[: case.batch].cpu(), processed.cpu(), broken)


def check(case: KernelCase, outcome: Outcome, sampled: bool = True, tie: float = 2e-5, error: float = 1e-5) -> int:
    """Assert parity; returns the number of tokens decided by a tie.

    Args:
        tie: of scores, times their largest magnitude. error: of processed logits, relative in norm, centred.
    """
    real, chosen_at = case.real, outcome.tokens
    assert bool((chosen_at[~real] == POISON).all()), "a padded row was written"
    assert bool(outcome.confidences[~real].isnan().all())
    hot = real & case.sampled if sampled else torch.zeros_like(real)
    nothing = 0 if case.target_ids is None else int(case.target_ids[0])
    ids = case.draft_ids(torch.where(real[:, None], chosen_at, nothing))
    assert bool(((ids >= 0) & (ids < case.logits.shape[-1])).all())
    led = torch.ones_like(case.noise, dtype=torch.float64).scatter_(-1, ids.unsqueeze(-1), 1e-200)
    block = case.specified(torch.ones(case.batch, dtype=torch.float64), led)
    assert torch.equal(block.tokens[real], chosen_at[real]), "the reference could not be led"
    z = block.probabilities.log()
    scores = torch.where(hot[:, None, None], z / case.temperature.double()[:, None, None] - case.noise.double().log(), z)
    short = scores.amax(-1) - scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    scale = scores.abs().amax(-1).clamp_min(1.0)
    assert bool((short <= tie * scale)[real].all()), f"not the best by {(short / scale)[real].max():.2e}"
    if case.confidence_head is not None:
        torch.testing.assert_close(outcome.confidences[real].double(), block.confidences[real], rtol=1e-5, atol=1e-6)
    _check_processed(case, outcome, hot, z, error)
    return int((short > 0)[real].sum())


def _check_processed(case: KernelCase, outcome: Outcome, hot: Tensor, z: Tensor, error: float) -> None:
    """Written for sampled rows alone, in their slots and columns; equal to the reference up to a constant."""
    written = outcome.processed[case.slot_of]
    others = torch.ones(outcome.processed.shape[0], dtype=torch.bool)
    others[case.slot_of[hot]] = False
    untouched = torch.isnan if case.target_ids is None else torch.isneginf
    assert bool(untouched(outcome.processed[others]).all()), "processed logits of a row that is not sampled were written"
    if case.target_ids is not None:
        left = torch.ones(case.vocab, dtype=torch.bool)
        left[case.target_ids] = False
        assert bool(torch.isneginf(written[:, :, left]).all())
        written = written[:, :, case.target_ids]
    if bool(hot.any()):
        found, expected = written[hot].double(), z[hot]
        found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
        relative = (found - expected).norm() / expected.norm()
        assert relative < error, f"processed logits are off by {relative:.2e}"
