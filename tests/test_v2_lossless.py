"""Sampled output keeps the target's distribution while the policy of the V2 runner decides what is verified.

The target and the drafter are Markov chains over three tokens, verified by rejection sampling as vLLM's sampler does it. A
confidence depends on the token before its draft, as a head's does, so a decision that looks at them too early tells what was
drafted. Rounds, flights and lengths are the engine's own; on the device the budget is spent by vLLM's own ranking.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from v2_world import WIDTH, World
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import _assign_draft_token_budget

from vllm_dspark.verification import history
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.survival import logit, sigmoid

TARGET = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])  # P(next | token)
DRAFTER = np.array([[0.4, 0.4, 0.2], [0.3, 0.5, 0.2], [0.3, 0.4, 0.3]])
SURE = np.array([0.9, 0.05, 0.6])  # confidence in the draft that follows each token
# One draft alone does not pay for what verifying takes, two that are likely do: of one request, or of two.
ONE = CostTable((1, 2, 3, 4, 64), (0.010, 0.019, 0.020, 0.030, 0.5), (1, 64), (0.0001, 0.0002))
TWO = CostTable((1, 2, 4, 5, 64), (0.009, 0.010, 0.015, 0.030, 0.5), (1, 64), (0.0001, 0.0002), captured=4)
ROUNDS = 6000
# Standard normal quantile beyond which a statistic is called wrong: one false alarm in 30,000 runs.
LIMIT = 4.0


class Chains(World):
    """Requests whose drafts are real tokens. ``early`` plants the error: what is verified follows from this round's drafts."""

    def __init__(self, early: bool, table: CostTable, **given: Any) -> None:
        super().__init__(table, **given)
        self.early = early
        self.policy._judge.reason = lambda *_: "pays"  # type: ignore[method-assign]  # whoever loses drafts on, so that it shows
        count = len(self.names)
        self.anchors, self.drafts = np.zeros(count, dtype=int), np.zeros((count, WIDTH), dtype=int)
        self.counts = np.zeros_like(TARGET)
        self.lengths_seen: set[int] = set()

    def draw(self, rows: np.ndarray) -> np.ndarray:
        return (self.rng.random(len(rows))[:, None] > rows.cumsum(axis=1)).sum(axis=1).clip(max=2)

    def before(self) -> np.ndarray:
        """The token before each draft, ``(R, WIDTH)``."""
        return np.concatenate([self.anchors[:, None], self.drafts[:, :-1]], axis=1)

    def spread(self, caps: dict[str, int]) -> dict[str, int]:
        if not self.on_device:
            return super().spread(caps)
        most = torch.tensor([caps[name] for name in self.names], dtype=torch.int32)
        budget = self.rounds.allotment.budget
        if budget < int(most.sum()):
            scale, shift = self.rounds.corrections(len(self.names), WIDTH)
            sure = torch.from_numpy(sigmoid(scale * logit(SURE[self.before()]) + shift))
            _assign_draft_token_budget(sure, torch.arange(len(self.names)), most, budget, WIDTH)
        return dict(zip(self.names, most.tolist(), strict=True))

    def turn(self) -> None:
        """One step: what of the last block is right, what comes out, the next block."""
        before = self.before()
        p, q = TARGET[before], DRAFTER[before]
        one = (
            np.take_along_axis(p, self.drafts[..., None], 2)[..., 0] / np.take_along_axis(q, self.drafts[..., None], 2)[..., 0]
        )
        hits = np.cumprod(self.rng.random(one.shape) < one, axis=1).sum(axis=1)
        if self.early and self.rounds._flight.slots.size:
            flight = self.rounds._flight
            slots = flight.slots
            known = history.survivals(SURE[before][flight.rows])
            self.policy.history.mean[slots] = self.policy.history.recent[slots] = known
        self.step(lambda verified, accepted: self.emit(verified, accepted, p, q), hits)

    def emit(self, verified: np.ndarray, accepted: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Write down the tokens of this step; draft the next block. Returns its confidences."""
        self.lengths_seen |= set(verified.tolist())
        rows = np.arange(len(self.names))
        for place in range(WIDTH):
            kept = accepted > place
            np.add.at(self.counts, (self.anchors[kept], self.drafts[kept, place]), 1)
            self.anchors[kept] = self.drafts[kept, place]
        place = np.minimum(accepted, WIDTH - 1)
        left = np.maximum(p[rows, place] - q[rows, place], 0.0)
        left /= np.maximum(left.sum(axis=1, keepdims=True), 1e-12)
        last = self.draw(np.where((accepted < verified)[:, None], left, TARGET[self.anchors]))
        np.add.at(self.counts, (self.anchors, last), 1)
        self.anchors = last
        token = last
        for place in range(WIDTH):
            token = self.drafts[:, place] = self.draw(DRAFTER[token])
        return SURE[self.before()]

    def statistic(self) -> float:
        """Chi-square of the transitions as a standard normal variate (Wilson-Hilferty)."""
        wanted = self.counts.sum(axis=1, keepdims=True) * TARGET
        chi_square, freedom = float(((self.counts - wanted) ** 2 / wanted).sum()), TARGET.size - len(TARGET)
        return float(((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


def play(early: bool, on_device: bool) -> Chains:
    table, names = (TWO, ("a", "b")) if on_device else (ONE, ("a",))
    chains = Chains(early, table, names=names, on_device=on_device)
    for _ in range(ROUNDS):
        chains.turn()
    return chains


@pytest.mark.parametrize("on_device", [False, True])
def test_sampled_output_keeps_the_targets_distribution(on_device: bool) -> None:
    chains = play(early=False, on_device=on_device)
    assert any(0 < length < WIDTH for length in chains.lengths_seen), "the policy never trimmed"
    assert chains.counts.sum() > 1.1 * ROUNDS
    assert chains.statistic() < LIMIT


@pytest.mark.parametrize("on_device", [False, True])
def test_the_test_fails_when_lengths_follow_from_this_rounds_drafts(on_device: bool) -> None:
    chains = play(early=True, on_device=on_device)
    assert chains.statistic() > 2 * LIMIT
