"""The policy: who drafts this round, how many drafts are verified, and what is learned from it.

One object serves the proposer, the verification manager and the simulator. Per round: :meth:`Policy.observe` and
:meth:`Policy.observe_step` for the round before, :meth:`Policy.begin_round`, and, if anybody drafts, :meth:`Policy.lengths`.

Lossless (arXiv 2607.05147, appendix A): who drafts, the budget and every cost are fixed before anything of the round is
drafted; after that a draft's fate depends on confidences only through :func:`scheduler.synchronous`'s walk. Deterministic: the
same calls give the same answers, so ranks that are given rank 0's timings agree.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import choice, history, saved, scheduler
from vllm_dspark.verification.choice import Choice
from vllm_dspark.verification.cost import CostModel, StepTiming
from vllm_dspark.verification.exploring import Exploring
from vllm_dspark.verification.feedback import Feedback
from vllm_dspark.verification.history import History
from vllm_dspark.verification.judge import Judge
from vllm_dspark.verification.ledger import Ledger, Yield
from vllm_dspark.verification.online import OnlineSTS
from vllm_dspark.verification.plan import NO_FLOOR, Load, Plan
from vllm_dspark.verification.probing import PROBE_DRAFTS, Probing, price
from vllm_dspark.verification.records import KINDS, NOBODY, DraftDecision, Kind, Outcomes, PolicyOptions, RoundInput, Rows
from vllm_dspark.verification.registry import Registry
from vllm_dspark.verification.standing import EXPLORING, MEASURING, SILENT, TRIAL, TRYING, Standing
from vllm_dspark.verification.survival import Floats, Survival, leading, logit, usable

logger = logging.getLogger("vllm.dspark")

_ADAPTIVE, _FIXED = KINDS.index("adaptive"), KINDS.index("fixed")
_UNTRIED = 32  # requests that draft together until so many have
MANY = 16  # requests from which their last survivals together stand for this round's
_SEVERAL = 8  # requests that could draft where a probe is charged twice its price: new ones keep coming, and all ask for it
FOREVER = 1 << 20  # rounds


class Policy:
    """Decides for one engine; see the module's docstring for the order of calls."""

    def __init__(
        self,
        width: int,
        cost: CostModel | None,
        options: PolicyOptions | None = None,
        temperatures: Floats | float = 1.0,
    ) -> None:
        """Begin without a history.

        Args:
            width: γ. cost: None leaves an adaptive policy with nothing to compare, so it becomes ``options.fallback``.
            temperatures: of the confidences, from a file or the checkpoint's config, until live ones replace them.
        """
        self.width, self.cost = width, cost
        self.options = options or PolicyOptions()
        self.sts = OnlineSTS(width, temperatures)
        self.history = History(width)
        self.probing = Probing()
        # The rest of both shares is for what the estimates of losses and of probes leave out.
        self.ledger = Ledger(loss_share=0.8 * self.options.loss_share, probe_share=0.6 * self.options.probe_share)
        self.counters: Counter[str] = Counter()
        self.failure: str | None = None
        self.round = 0
        self.requests = Registry(self.options.policy)
        self._standing = Standing()
        self._plan: Plan | None = None
        self._choice: Choice | None = None
        self._judge = Judge(self.options.margin, self.ledger)
        self._price, self._floor_age = 0.3, 0
        self._exploring = Exploring(self.history, self.probing, self.ledger, self.options.min_tokens_per_second_per_request)
        self._floor, self._yield = NO_FLOOR, Yield()
        self._feedback = Feedback(self.history, self.ledger, self._yield, self._judge.checks, self._exploring, self.counters)
        if cost is None and self.options.policy == "adaptive":
            self._fail("there is no cost table")

    def add(self, request: str, max_draft_tokens: int | None = None, policy: Kind | None = None) -> None:
        """Announce a request with its own limits; unannounced ones get the engine's. Announcing again changes the limits.

        Raises:
            ValueError: a negative limit or an unknown policy; nothing is changed.
        """
        slot = self.requests.add(request, max_draft_tokens, policy, self.round)
        if slot is not None:
            self.history.reset(slot, self.round)
            self.probing.reset(slot, self.round)
        special = max_draft_tokens is not None or policy is not None
        if slot is None or (self.requests.may_draft(max_draft_tokens, policy) and (special or self._standing.silent)):
            self._standing.drop()

    def finish(self, requests: Iterable[str]) -> None:
        """These requests are done; unknown ones are ignored. Without this, requests unseen for long make room by themselves."""
        self._guarded(self._feedback.drew, self._plan)  # before their slots go to others
        self.requests.finish(requests)

    def begin_round(self, inputs: RoundInput) -> DraftDecision:
        """Who drafts, decided from loads, contexts and past rounds alone. Never raises: trouble makes it the fallback."""
        self.round += 1
        plan = self._plan
        affordable = plan is not None and (not plan.decision.drafting or self.ledger.may_speculate())
        alike = not self.requests.special and self.options.min_tokens_per_second_per_request is None
        if plan is not None and affordable and self._standing.stands(inputs, self.round, alike):
            if plan.decision.drafting and not (self._standing.unchanged(inputs) or self._standing.lowered(inputs, plan)):
                plan = self._plan = self._decided(inputs, everybody=plan.decision.reason)
            plan.again()
        else:
            plan = self._plan = self._decided(inputs)
        self.counters[plan.decision.reason] += 1
        return plan.decision

    def rest(self, requests: Sequence[str]) -> bool:
        """In place of :meth:`begin_round`, where nothing was verified: whether nobody drafts again.

        False: the round is to be begun as usual. True: it needs no beginning, and neither outcomes nor its time need be told.
        Requests must have been added.
        """
        plan = self._plan
        if self._standing.silent and not self.requests.able:  # no rounds pass while nobody ever may draft
            self.counters[SILENT] += 1
            return True
        if plan is None or not self._standing.rests(requests, self.round + 1):
            return False
        self.round += 1
        plan.again()
        self.counters[plan.decision.reason] += 1
        self.ledger.spent(plan.off_seconds, plan.off_seconds)  # of the round before, whose time nobody will tell
        return True

    def resting(self) -> int:
        """Rounds after this one to which :meth:`rest` will say yes, unless requests come or go."""
        if self._standing.silent and not self.requests.able:
            return FOREVER
        return self._standing.left(self.round)

    def _decided(self, inputs: RoundInput, everybody: str | None = None) -> Plan:
        """A new plan; ``everybody``: why everybody drafts, if that is decided already."""
        self._guarded(self._feedback.drew, self._plan)
        plan = self._prepare(inputs)
        try:
            with np.errstate(all="ignore"):
                self._decide(plan, everybody)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            plan.kinds = np.where(plan.kinds == _ADAPTIVE, self._kind(None), plan.kinds)
            self._draft(plan, (plan.kinds == _FIXED).nonzero()[0], NOBODY, "policy failed")
        if everybody and plan.decision.drafting:
            self._standing.made_for(inputs)
            return plan
        idle = plan.decision.reason in ("does not pay", "guarded") and not plan.decision.drafting
        wake = self.probing.wake(plan.slots, self.round, alone=idle)
        if plan.decision.reason == "does not pay" and plan.able > 1:
            wake = min(wake, self.round + 1 + self.history.young(plan.slots, plan.contexts))
        patience = None
        if self._choice is not None and math.isinf(self._choice.risk):
            patience = self.ledger.rounds_until(self.probing.least)
        self._standing.decided(inputs, plan.decision, self.round, wake, plan.able, patience)
        return plan

    def _prepare(self, inputs: RoundInput) -> Plan:
        self.requests.sweep(self.round)
        for name in self.requests.unknown(inputs.requests):
            self.add(name)
        most = self.width if self.options.max_draft_tokens is None else min(self.width, self.options.max_draft_tokens)
        slots, caps, own = self.requests.rows(inputs.requests, self.round, most)
        kinds = np.full(slots.size, self._kind(None)) if own is None else np.array([self._kind(kind) for kind in own])
        if inputs.limits is not None:
            caps = np.maximum(np.minimum(inputs.limits, caps), 0)
        contexts = np.asarray(inputs.contexts, dtype=np.float64)
        tokens = slots.size + inputs.other_tokens
        none = DraftDecision(NOBODY, np.zeros(0, dtype=bool), SILENT)
        load = Load(slots.size, tokens, float(slots.size), 0.0, 0.0)
        return Plan(inputs.requests[:], slots, kinds, caps, contexts, tokens, inputs.other_context, none, load)

    def _kind(self, kind: Kind | None) -> int:
        index = KINDS.index(kind or self.options.policy)
        return KINDS.index(self.options.fallback) if index == _ADAPTIVE and self.failure else index

    def _fixed(self, caps: Rows) -> Rows:
        wanted = self.options.fixed_drafts
        return caps if wanted is None else np.minimum(caps, wanted)

    def _decide(self, plan: Plan, everybody: str | None) -> None:
        forced = ((plan.kinds == _FIXED) & (self._fixed(plan.caps) > 0)).nonzero()[0]
        rows = ((plan.kinds == _ADAPTIVE) & (plan.caps > 0)).nonzero()[0]
        plan.able = forced.size + rows.size
        if self.cost is None or rows.size == 0:
            self._draft(plan, forced, NOBODY, "fixed" if forced.size else plan.decision.reason)
            return
        plan.load = choice.load_of(plan, forced, self._fixed(plan.caps[forced]), self.history.mean[plan.slots[forced]])
        if everybody:
            plan.off_seconds = choice.seconds_off(self.cost, plan.load)
            self.probing.decided(plan.slots[rows], plan.slots[rows], self.round)
            self._draft(plan, rows, NOBODY, everybody)
            self._look_ahead(self.cost, plan, rows)
            return
        found, rows = self._compare(self.cost, plan, rows)
        reason = self._judge.reason(found, plan, self._yield.doubt, self.round)
        if reason == "pays":
            self._price = found.threshold
        if reason == "does not pay":
            explored = self._explored(self.cost, plan, rows)
            reason = EXPLORING if explored.size else reason
        most = found.count if self.history.drafted >= _UNTRIED else min(found.count, _UNTRIED)
        on = explored if reason == EXPLORING else rows[:most] if reason in ("pays", TRYING, TRIAL) else NOBODY
        self.probing.decided(plan.slots[rows], plan.slots[on], self.round, reason == "pays")
        probes = NOBODY if reason in (MEASURING, EXPLORING) else self._probes(self.cost, plan, rows[on.size :], on.size)
        reason = "probing" if probes.size and not on.size else reason
        self._draft(plan, np.sort(np.concatenate([forced, on, probes])), probes, reason)
        self._look_ahead(self.cost, plan, np.sort(on))

    def _compare(self, cost: CostModel, plan: Plan, rows: Rows) -> tuple[Choice, Rows]:
        """The best subset of these rows, and the rows in the order in which they join it."""
        contexts = plan.contexts[rows]
        number, gain = self._expected(plan.slots[rows], plan.caps[rows], contexts)
        if rows.size > 1:
            dear = cost.table.draft_per_context * plan.tokens / max(self.ledger.typical_round, 1e-9)
            best_first = choice.order(number, gain, contexts, self._price, min(dear, 1.0))
            rows, number, gain, contexts = rows[best_first], number[best_first], gain[best_first], contexts[best_first]
        found = choice.choose(cost, plan.load, number, gain, contexts, self.options.min_tokens_per_second_per_request)
        if not (np.isfinite(found.off) and found.off > 0 and np.isfinite(found.best)):
            raise ArithmeticError(f"throughput without drafting is {found.off}, with drafting {found.best} tokens/s")
        self._choice, plan.off_seconds, plan.time_limit = found, found.off_seconds, found.time_limit
        self.ledger.begin(found.off_seconds)
        return found, rows

    def _explored(self, cost: CostModel, plan: Plan, rows: Rows) -> Rows:
        """Rows that draft though it does not pay."""
        return self._exploring.select(
            cost, plan, rows, lambda some: self._expected(plan.slots[some], plan.caps[some], plan.contexts[some]),
            self._price, self._judge.margin, self.round,
        )  # fmt: skip

    def _expected(self, slots: Rows, caps: Rows, contexts: Floats) -> tuple[Floats, Floats]:
        return self.history.expected(slots, self.round, caps, contexts)

    def _probes(self, cost: CostModel, plan: Plan, idle: Rows, drafting: int) -> Rows:
        already = plan.load.drafted + drafting
        if idle.size == 0 or not self.probing.due_now(plan.slots[idle], self.round, already == 0).any():
            return NOBODY
        if already == 0 and idle.size > 1 and self.round < self.probing.fleet_due and self.history.spread == 0.0:
            return NOBODY  # new ones are like the others
        seconds = price(cost, plan.load, already, float(plan.contexts[idle].mean()))
        plan.probe_times = 1.0 + min((idle.size + drafting - 1) / (_SEVERAL - 1), 1.0)
        probes, plan.probe_seconds = self.probing.select(idle, plan.slots[idle], self.round, seconds, self.ledger, already == 0)
        self.ledger.probed(plan.probe_seconds, plan.probe_times)
        return probes

    def _draft(self, plan: Plan, rows: Rows, probes: Rows, reason: str) -> None:
        """Settle the decision."""
        probing = np.zeros(plan.slots.size, dtype=bool)
        probing[probes] = True
        plan.decision = DraftDecision(rows, probing[rows], reason)
        plan.adaptive = plan.kinds[rows] == _ADAPTIVE
        if rows.size and self.cost is not None:
            plan.draft_seconds = float(self.cost.drafting(rows.size, float(plan.contexts[rows].sum())))

    def _look_ahead(self, cost: CostModel, plan: Plan, rows: Rows) -> None:
        """Carry the walk across cliffs: the best budget over *past* survivals, and for few requests the survival it ends at."""
        plan.floor = self._floor if rows.size else NO_FLOOR
        self._floor_age += 1
        if rows.size == 0 or (rows.size * self.width > 512 and self._floor_age < 8):
            return
        self._floor_age = 0
        slots, caps, exact = plan.slots[rows], plan.caps[rows], bool(rows.size >= MANY)
        stale = (self.history.recent if exact else self.history.mean)[slots].astype(np.float32)
        self._floor = plan.floor = scheduler.carry(stale, plan.curve(cost), plan.load.sure_yield, caps, exact)

    def lengths(self, confidences: NDArray[np.floating] | None) -> Rows:
        """Drafts to verify of each row of the decision, ``(n,)``, in its order.

        Args:
            confidences: raw, of this round, ``(n, γ)``; None: the drafter has no confidence head. Whatever comes at or after
                one that is not within [0, 1] is not verified.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("begin_round comes first")
        raw = None if confidences is None else np.asarray(confidences, dtype=np.float64)
        try:
            return self._lengths(plan, raw)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            rows = plan.decision.rows
            plan.lengths = None
            fixed = self._fixed(plan.caps[rows]) if raw is None else np.minimum(self._fixed(plan.caps[rows]), leading(raw))
            return fixed if self.options.fallback == "fixed" else np.where(plan.kinds[rows] == _FIXED, fixed, 0)

    def _lengths(self, plan: Plan, raw: Floats | None) -> Rows:
        rows = plan.decision.rows
        slots, caps = plan.slots[rows], plan.caps[rows]
        if raw is None:
            plan.good, logits = np.ones(rows.size, dtype=bool), self.history.guess(rows.size)
        else:
            plan.good, said = usable(raw), raw
            if not plan.good.all():
                caps, said = np.minimum(caps, leading(raw)), np.where(plan.good[:, None], raw, 0.5)
                self.counters["rows with unusable confidences"] += int(np.count_nonzero(~plan.good))
            logits = logit(said) / self.sts.temperatures
        plan.raw, plan.conditional = raw, self.history.conditional(slots, logits)
        survival = history.survivals(plan.conditional)
        plan.lengths = lengths = self._allot(plan, survival, caps)
        plan.expected = (survival * (np.arange(self.width) < (lengths * plan.adaptive)[:, None])).sum(axis=1, dtype=np.float64)
        plan.survivals.append(survival)
        plan.drawn = self.round
        if not plan.good.all():
            self._feedback.drew(plan)
        return lengths

    def _allot(self, plan: Plan, survival: Survival, caps: Rows) -> Rows:
        lengths = np.where(plan.adaptive, 0, self._fixed(caps))
        adaptive = plan.adaptive.nonzero()[0]
        if adaptive.size == 0 or self.cost is None:
            return lengths
        caps, survival, seconds = caps[adaptive], survival[adaptive], plan.curve(self.cost)
        chosen = scheduler.synchronous(survival, seconds, plan.load.sure_yield, caps, *plan.floor)
        if plan.probe_seconds:
            least = np.where(plan.decision.probes[adaptive], np.minimum(caps, PROBE_DRAFTS), 0)
            judged = np.maximum(chosen, least)
            extra = seconds[int(judged.sum())] - seconds[int(chosen.sum())]
            chosen = judged if extra <= plan.probe_seconds else chosen
        lengths[adaptive] = chosen
        plan.seconds = float(seconds[int(chosen.sum())])
        return lengths

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from the judged drafts of the last round; requests that did not draft in it, or came before, are ignored."""
        if self._plan is not None and self._plan.lengths is not None:
            self._guarded(self._feedback.judged, self._plan, outcomes, self.sts)

    def observe_step(self, timing: StepTiming) -> None:
        """Learn from the time of the step that verified the last round's drafts (rank 0's, on every rank)."""
        if self._plan is not None and self.cost is not None and not self.failure:
            self._guarded(self._feedback.stepped, self._plan, self.cost, timing, self.round)

    def timed(self, timing: StepTiming) -> None:
        """Learn from the time of a round (rank 0's, on every rank) apart from what was planned for it."""
        if self.cost is not None and not self.failure:
            self._guarded(self._feedback.timed, self.cost, timing, self.round)

    def _guarded(self, learn: Callable[..., object], *arguments: Any) -> None:
        try:
            learn(*arguments)
        except Exception as error:  # learning must never stop the engine
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            logger.warning("the adaptive policy cannot decide (%s); it is %s from now on", reason, self.options.fallback)
        self.failure = reason
        self.counters["failures"] += 1

    def explain(self) -> dict[str, Any]:
        """The numbers of the last decision, JSON-ready."""
        decision = None if self._plan is None else self._plan.decision
        numbers: dict[str, Any] = {
            "round": self.round,
            "reason": decision.reason if decision else "no round yet",
            "failure": self.failure,
            "rows": int(decision.rows.size) if decision else 0,
            "probes": int(decision.probes.sum()) if decision else 0,
            "temperatures": self.sts.temperatures.tolist(),
            "counters": dict(self.counters),
        }
        numbers |= self.ledger.explain()
        if self._choice is not None:
            numbers |= self._choice.explain() | {"margin": self._judge.margin}
        if self.cost is not None:
            numbers |= {"target_error": self.cost.target.error(), "draft_error": self.cost.draft.error()}
        return numbers

    def state(self) -> dict[str, Any]:
        """What is worth keeping over a restart (fleet, temperatures, cost corrections), JSON-ready."""
        return saved.collect(self.history, self.sts, self.cost)

    def load_state(self, state: Mapping[str, Any]) -> bool:
        """Continue from a saved state; False, with one warning and nothing changed, if it does not fit."""
        sts = saved.restore(state, self.history, self.cost)
        self.sts = sts or self.sts
        return sts is not None
