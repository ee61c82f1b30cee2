"""The policy of an engine that runs ahead of its device: what a round drafted is known one round later, its verdict two.

A round is a :class:`Flight`. Per round, in this order: :meth:`AsynchronousPolicy.drew` for the flight before and
:meth:`AsynchronousPolicy.judged` for the one before that, as far as they have landed; :meth:`Policy.begin_round`;
:meth:`AsynchronousPolicy.depart`; and once the step that verifies the flight is planned, :meth:`AsynchronousPolicy.allot`.

Lossless (arXiv 2607.05147, appendix A): the budget is chosen from survivals of rounds before the flight's, so it may be
searched without restriction; which drafts it goes to is either ranked by the flight's own survivals or fixed beforehand too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import history, scheduler
from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.feedback import calibrate
from vllm_dspark.verification.policy import MANY, Policy
from vllm_dspark.verification.probing import PROBE_DRAFTS
from vllm_dspark.verification.records import NOBODY, DraftDecision, RoundInput, Rows
from vllm_dspark.verification.survival import Floats, logit, usable

_NONE: Floats = np.zeros((0, 0))


class BatchCostModel(CostModel):
    """Costs where the block forward runs for the whole batch as soon as anybody drafts.

    Attributes:
        batch: requests and Σ context of the round that is being decided; (0, 0): take the numbers as they are given.
    """

    batch: tuple[int, float] = (0, 0.0)

    def drafting(self, requests: NDArray[np.integer] | int, context: NDArray[np.floating] | float) -> Floats:
        count, total = self.batch
        if not count:
            return super().drafting(requests, context)
        anybody = np.asarray(requests) > 0
        return super().drafting(np.where(anybody, count, 0), np.where(anybody, total, 0.0))


@dataclass
class Flight:
    """A round under way: who drafts in it, ``(n,)`` each, and what its verdict will be compared with.

    Attributes:
        requests: ids. rows: their places in the round. slots, caps, adaptive, probes: as in the plan.
        tenancies: of the slots, see :class:`Registry`.
        contexts: tokens of context. number: of the round. reason: of the decision.
        off_seconds, draft_seconds, probe_seconds, stake, time_limit: see :class:`Plan`. seconds: predicted once it is allotted.
        sure_yield: tokens expected of the step without its drafts.
        raw, conditional, good: confidences, once they have landed.
    """

    requests: Sequence[str]
    rows: Rows
    slots: Rows
    tenancies: Rows
    caps: Rows
    adaptive: NDArray[np.bool_]
    probes: NDArray[np.bool_]
    contexts: Floats
    number: int
    reason: str
    off_seconds: float
    draft_seconds: float
    probe_seconds: float
    stake: float | None
    time_limit: float
    sure_yield: float
    seconds: float = 0.0
    raw: Floats | None = None
    conditional: Floats = field(default_factory=lambda: _NONE)
    good: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))


@dataclass(frozen=True)
class Step:
    """The step that is to verify a flight, without its drafts: tokens, requests, Σ context."""

    tokens: int
    requests: int
    context: float


@dataclass(frozen=True)
class Allotment:
    """What of a flight is verified.

    Attributes:
        caps: most drafts of each request, ``(n,)``. budget: drafts in all. lengths: how they are spread if nothing newer
            ranks them, ``(n,)``.
    """

    caps: Rows
    budget: int
    lengths: Rows


class AsynchronousPolicy(Policy):
    """See the module's docstring for the order of calls."""

    _ranked = True  # whether flights' own survivals ranked their drafts last time

    def begin_round(self, inputs: RoundInput) -> DraftDecision:
        if not isinstance(self.cost, BatchCostModel):
            return super().begin_round(inputs)
        self.cost.batch = len(inputs.requests), float(np.sum(inputs.contexts))
        try:
            return super().begin_round(inputs)
        finally:
            self.cost.batch = (0, 0.0)

    def _expected(self, slots: Rows, caps: Rows, contexts: Floats) -> tuple[Floats, Floats]:
        """N and G; where averages of past rounds set the budget, only what they can choose is promised."""
        number, gain = super()._expected(slots, caps, contexts)
        if self._ranked and slots.size >= MANY:
            return number, gain
        mean = np.where(np.arange(self.width) < caps[:, None], self.history.mean[slots], 0.0)
        return history.yields(np.minimum(mean * (gain[:, :1] / np.maximum(mean.sum(axis=1, keepdims=True), 1e-9)), 1.0))

    def depart(self) -> Flight:
        """The round that was begun last."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("begin_round comes first")
        rows = plan.decision.rows
        wasted = 0.0 if plan.load.drafted else plan.draft_seconds  # if none of it can be verified
        return Flight(
            [plan.requests[row] for row in rows.tolist()], rows, plan.slots[rows],
            self.requests.tenancies[plan.slots[rows]], plan.caps[rows], plan.adaptive,
            plan.decision.probes, plan.contexts[rows], self.round, plan.decision.reason, plan.off_seconds,
            plan.draft_seconds, plan.probe_seconds, plan.stake, plan.time_limit, plan.load.sure_yield,
            seconds=plan.off_seconds + wasted,
        )  # fmt: skip

    def drew(self, flight: Flight, confidences: NDArray[np.floating] | None) -> None:
        """The flight's confidences have landed: raw, ``(n, γ)``; None: the drafter has no confidence head."""
        if flight.slots.size:
            raw = None if confidences is None else np.asarray(confidences, dtype=np.float64)
            self._guarded(self._drew, flight, raw)

    def _drew(self, flight: Flight, raw: Floats | None) -> None:
        count = flight.slots.size
        flight.raw = raw
        if raw is None:
            flight.good, logits = np.ones(count, dtype=bool), self.history.guess(count)
        else:
            flight.good = usable(raw)
            self.counters["rows with unusable confidences"] += int(np.count_nonzero(~flight.good))
            logits = logit(np.where(flight.good[:, None], raw, 0.5)) / self.sts.temperatures
        flight.conditional = self.history.conditional(flight.slots, logits)
        keep = flight.good & self._held(flight)
        survival = history.survivals(flight.conditional[keep]).astype(np.float64)
        self.history.drew(flight.slots[keep], survival[None], flight.number, flight.contexts[keep], settled=raw is None)

    def _held(self, flight: Flight) -> NDArray[np.bool_]:
        """Which of the flight's requests still have their slots, ``(n,)``."""
        return np.asarray(self.requests.tenancies[flight.slots] == flight.tenancies)

    def allot(self, flight: Flight, step: Step, limits: Rows, ranked_later: bool, whole: bool = False) -> Allotment:
        """How much of the flight is verified. Never raises: trouble makes it the fallback.

        Args:
            limits: drafts the step has room for, ``(n,)``; 0 where a request is gone. ranked_later: the flight's own survivals
                will say which drafts the budget goes to. whole: verify everything or nothing.
        """
        self._ranked = ranked_later
        caps = np.minimum(np.where(flight.adaptive, flight.caps, self._fixed(flight.caps)), limits)
        lengths = np.where(flight.adaptive, 0, caps)
        adaptive = (flight.adaptive & (caps > 0)).nonzero()[0]
        if adaptive.size and self.cost is not None and not self.failure:
            try:
                lengths[adaptive] = self._spread(
                    self.cost, flight, step, caps, adaptive, int(lengths.sum()), ranked_later, whole
                )
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")
        if adaptive.size and self.failure and self.options.fallback == "fixed":
            lengths[adaptive] = self._fixed(caps[adaptive])
        return Allotment(caps, int(lengths.sum()), lengths)

    def _spread(
        self, cost: CostModel, flight: Flight, step: Step, caps: Rows, rows: Rows, forced: int, ranked_later: bool, whole: bool
    ) -> Rows:
        """Lengths of these adaptive rows, from survivals of earlier rounds."""
        caps, slots, contexts = caps[rows], flight.slots[rows], flight.contexts[rows]
        known = self.history.recent if ranked_later and rows.size >= MANY else self.history.mean
        survival = known[slots].astype(np.float32)
        room = int(caps.sum())
        seconds = cost.curve(step.tokens + forced, room, step.requests, step.context, float(contexts.mean()))
        seconds = seconds + flight.draft_seconds
        if whole:
            seconds[1:room] = np.inf
        if flight.time_limit < np.inf:
            seconds[1:][seconds[1:] > flight.time_limit] = np.inf
        found, _ = scheduler.search(survival, seconds, flight.sure_yield + forced, caps)
        lengths = scheduler.asynchronous(survival, found.drafts, caps)
        if flight.probe_seconds:
            least = np.where(flight.probes[rows], caps if whole else np.minimum(caps, PROBE_DRAFTS), 0)
            judged = np.maximum(lengths, least)
            if seconds[int(judged.sum())] - seconds[int(lengths.sum())] <= flight.probe_seconds:
                lengths = judged
        flight.seconds = float(seconds[int(lengths.sum())])
        return lengths

    def judged(self, flight: Flight, verified: Rows, accepted: Rows) -> None:
        """The verdict has landed: drafts verified and accepted of each of the flight's requests, ``(n,)``; 0 where gone."""
        self._guarded(self._judged, flight, np.asarray(verified), np.asarray(accepted))

    def _judged(self, flight: Flight, verified: Rows, accepted: Rows) -> None:
        if not flight.off_seconds:
            return
        if not flight.slots.size or not flight.conditional.size:
            self.ledger.spent(flight.off_seconds, flight.off_seconds)
            return
        verified = np.minimum(verified, self.width).astype(np.int64)
        accepted = np.minimum(accepted.astype(np.int64), verified)
        survival = history.survivals(flight.conditional)
        expected = (survival * (np.arange(self.width) < verified[:, None])).sum(axis=1, dtype=np.float64)
        likely, came = float(expected[flight.adaptive].sum()), float(accepted[flight.adaptive].sum())
        self.ledger.spent(flight.seconds, flight.off_seconds)
        gained = self._yield.gained(likely, came)
        self.ledger.saved(flight.off_seconds * (1.0 + gained / max(flight.sure_yield, 1.0)) - flight.seconds, flight.stake)
        keep = flight.good & self._held(flight) & (verified > 0)
        if not keep.any():
            return
        self._yield.learn(likely, came)
        self.history.judged(flight.slots[keep], flight.conditional[keep], verified[keep], accepted[keep])
        if flight.raw is not None:
            calibrate(self.sts, self.history, flight.raw[keep], verified[keep], accepted[keep])

    def explain(self) -> dict[str, Any]:
        return super().explain() | {"fleet_survival": self.history.fleet_mean.tolist()}


def nobody(number: int, reason: str) -> Flight:
    """A flight without drafts."""
    none = np.zeros(0, dtype=bool)
    return Flight([], NOBODY, NOBODY, NOBODY, NOBODY, none, none, np.zeros(0), number, reason, 0.0, 0.0, 0.0, None, np.inf, 0.0)
