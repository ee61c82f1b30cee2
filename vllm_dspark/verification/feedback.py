"""What a round teaches once it is over: its survivals and verdicts the history, its time the costs and the account."""

import math
from collections import Counter

import numpy as np

from vllm_dspark.verification.checks import Checks
from vllm_dspark.verification.cost import CostModel, StepTiming
from vllm_dspark.verification.exploring import Exploring
from vllm_dspark.verification.history import History
from vllm_dspark.verification.ledger import Ledger, Yield
from vllm_dspark.verification.online import OnlineSTS
from vllm_dspark.verification.plan import Plan
from vllm_dspark.verification.records import Outcomes, Rows
from vllm_dspark.verification.standing import EXPLORING
from vllm_dspark.verification.survival import Floats

_STALL = 1.25  # longest that a stalled step counts against drafting, times what was expected
_COLD = 3.0  # most that a probe by itself is charged for, times what was expected
_SHARED = 0.7  # largest error (log) of the expected time that is put down to the machine being slower or faster today


def calibrate(sts: OnlineSTS, history: History, raw: Floats, verified: Rows, accepted: Rows) -> None:
    """Let the temperatures learn from judged drafts, and tell the history where they have changed.

    Args:
        raw: confidences, ``(n, γ)``. verified, accepted: drafts of each request, ``(n,)``.
    """
    before = sts.temperatures.copy()
    sts.observe(raw, verified, accepted)
    if sts.tick():
        history.fitted(sts.temperatures != before)


class Feedback:
    """Hands what became of a plan to whoever learns from it."""

    def __init__(
        self, history: History, ledger: Ledger, yields: Yield, checks: Checks, exploring: Exploring, counters: Counter[str]
    ) -> None:
        self._history, self._ledger, self._yield = history, ledger, yields
        self._checks, self._exploring, self._counters = checks, exploring, counters

    def drew(self, plan: Plan | None) -> None:
        """What the rounds drafted for which this plan has stood since it was told last; nothing is decided before it is."""
        if plan is None or not plan.survivals:
            return
        rows, survival = plan.decision.rows[plan.good], np.array(plan.survivals, dtype=np.float64)[:, plan.good]
        plan.survivals.clear()
        self._history.drew(plan.slots[rows], survival, plan.drawn, plan.contexts[rows], settled=plan.raw is None)

    def judged(self, plan: Plan, outcomes: Outcomes, sts: OnlineSTS) -> None:
        """The verdict on a round's drafts."""
        places = plan.places(outcomes.requests)
        known = places >= 0
        places = places[known]
        verified = np.minimum(np.asarray(outcomes.verified)[known], self._history.width).astype(np.int64)
        accepted = np.minimum(np.asarray(outcomes.accepted)[known].astype(np.int64), verified)
        plan.accepted = (plan.accepted or 0.0) + float(accepted[plan.adaptive[places]].sum())
        keep = plan.good[places] & (verified > 0)
        if not keep.all():
            places, verified, accepted = places[keep], verified[keep], accepted[keep]
        if places.size == 0:
            return
        conditional = plan.conditional[places]
        self._yield.learn(float(plan.expected[places].sum()), float(accepted[plan.adaptive[places]].sum()))
        self._history.judged(plan.slots[plan.decision.rows[places]], conditional, verified, accepted)
        if plan.raw is not None:
            calibrate(sts, self._history, plan.raw[places], verified, accepted)

    def timed(self, cost: CostModel, timing: StepTiming, now: int) -> bool:
        """What a step took, whatever was planned for it, in round ``now``; False: an outlier."""
        if timing.tokens == timing.requests:
            self._checks.measured(timing.tokens, timing.target_seconds, cost.step(timing)[0], now)
        used = cost.observe(timing)
        if not used:
            self._counters["steps ignored as outliers"] += 1
        return used

    def stepped(self, plan: Plan, cost: CostModel, timing: StepTiming, now: int) -> None:
        """What the step took that verified this plan's drafts, and so what they have brought, in round ``now``."""
        shared, most = 0.0, 2.0
        if cost.wants(timing):
            shared = cost.shared_error(timing, plan.tokens)
            if not self.timed(cost, timing, now):
                most = _STALL
        if not plan.off_seconds:
            return
        if plan.lengths is None or not plan.adaptive.any():
            self._ledger.spent(plan.off_seconds, plan.off_seconds)
            return
        off, spent, measured = plan.off_seconds, plan.seconds, timing.target_seconds + timing.draft_seconds
        as_planned = timing.tokens == plan.tokens + int(plan.lengths.sum())
        if as_planned:  # the clock knows better, but for stalls
            spent = min(max(measured, 0.5 * spent), most * spent)
            off *= math.exp(min(max(shared, -_SHARED), _SHARED))
        if plan.probe_seconds:
            self._charge(plan, timing, measured + timing.late_seconds - off, as_planned)
        gained = self._yield.gained(float(plan.expected.sum()), plan.accepted)
        saved = off * (1.0 + gained / max(plan.load.sure_yield, 1.0)) - spent
        if as_planned and plan.decision.reason == EXPLORING:
            saved = self._exploring.settle(plan, saved - timing.late_seconds)
        self._ledger.spent(spent, plan.off_seconds)
        self._ledger.saved(saved, plan.stake)

    def _charge(self, plan: Plan, timing: StepTiming, took: float, as_planned: bool) -> None:
        """Correct what the round's probes were charged for."""
        if as_planned and plan.decision.probes.all():  # now and then is dearer than again and again
            took = min(max(took, 0.5 * plan.probe_seconds), _COLD * plan.probe_seconds)
            self._ledger.probed(took - plan.probe_seconds, plan.probe_times)
        elif timing.draft_seconds < 0.5 * plan.draft_seconds:  # not nearly as dear as was feared
            less = plan.probe_seconds * (timing.draft_seconds / plan.draft_seconds - 1.0)
            self._ledger.probed(less, plan.probe_times)
