"""Replay a workload through the policy: no model, no engine, the policy's own code.

Per round the true costs and acceptances also tell what not drafting, every fixed k and an oracle would have made of the very
same round. From that comes what each of them would have taken for the same tokens of the same requests: regret is measured on
equal terms and without the noise of sampled outcomes. Adding up the rounds would not do: drafting where a token is dear (long
context) leaves the other arms with the same rounds, but not with the same work.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import history, scheduler
from vllm_dspark.verification.asynchronous import AsynchronousPolicy, BatchCostModel, Flight, Step
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import DraftDecision, Outcomes, PolicyOptions, RoundInput
from vllm_dspark.verification.survival import Floats
from vllm_dspark.verification.traces import Drafter, Trace


@dataclass(frozen=True)
class World:
    """What the policy does not know: the true costs, and how noisily they show.

    Attributes:
        table: true costs. noise: standard deviation of the log of a measured time. stalls: probability of a step measured 20
            times as long as it was worth.
    """

    table: CostTable
    noise: float = 0.03
    stalls: float = 0.0


@dataclass
class Tally:
    """Expected tokens and seconds of one arm."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """One round."""
        self.tokens += tokens
        self.seconds += seconds

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Result:
    """What a run brought.

    Attributes:
        policy: expected tokens over true time. arms: the same tokens of the same requests, and the time they would have taken
            under "off", "fixed 1" … "fixed γ", and "oracle".
        emitted: tokens really produced. rounds, drafted, verified, accepted: counts. probing: seconds that probes added.
        lengths: how often a drafting request had 0…γ drafts verified. speeds: tokens per second of every finished request.
        reasons: rounds by the policy's reason. explained: the last decision's numbers.
    """

    policy: Tally
    arms: dict[str, Tally]
    emitted: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    probing: float = 0.0
    lengths: list[int] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    explained: dict[str, Any] = field(default_factory=dict)

    def regret(self, arm: str) -> float:
        """Share of the arm's throughput that the policy missed on the same tokens; negative where the policy did better."""
        return 1.0 - self.policy.throughput / self.arms[arm].throughput

    @property
    def best_fixed(self) -> str:
        """The fixed k with the largest throughput on these tokens; empty if no other arm was priced."""
        fixed = [name for name in self.arms if name.startswith("fixed")]
        return max(fixed, key=lambda name: self.arms[name].throughput, default="")

    def summary(self) -> dict[str, Any]:
        """Figures, JSON-ready; speeds in tokens per second."""
        seconds = self.policy.seconds
        return {
            "tokens": self.emitted, "seconds": seconds, "rounds": self.rounds,
            "throughput": self.emitted / seconds if seconds else 0.0,
            "speed_per_user": float(np.mean(self.speeds)) if self.speeds else 0.0,
            "drafted": self.drafted, "verified": self.verified, "accepted": self.accepted, "lengths": self.lengths,
            "probing_share": self.probing / seconds if seconds else 0.0,
            "regret": {name: self.regret(name) for name in self.arms}, "best_fixed": self.best_fixed,
            "reasons": self.reasons,
        }  # fmt: skip


class _Active:
    """Requests being served, as arrays.

    Attributes:
        yields, seconds: per request, domain and arm (the policy is the last), ``(R, domains, arms)``: expected tokens of the
            request in the rounds played so far, and its share of their time.
    """

    def __init__(self, trace: Trace, arms: int) -> None:
        """Args: arms: how many are priced beside the policy."""
        self.trace = trace
        self.yields = np.zeros((0, len(trace.domains), arms + 1))
        self.seconds = self.yields.copy()
        self.index = {name: place for place, name in enumerate(trace.domains)}
        self.names: list[str] = []
        self.numbers = np.zeros(0, dtype=np.int64)
        self.produced = np.zeros(0, dtype=np.int64)
        self.contexts = np.zeros(0, dtype=np.int64)
        self.wanted = np.zeros(0, dtype=np.int64)
        self.started = np.zeros(0)

    def join(self, number: int, name: str, now: float) -> None:
        request = self.trace.requests[number % len(self.trace.requests)]
        self.names.append(name)
        self.numbers = np.append(self.numbers, number % len(self.trace.requests))
        self.produced = np.append(self.produced, 0)
        self.contexts = np.append(self.contexts, request.context)
        self.wanted = np.append(self.wanted, request.tokens)
        self.started = np.append(self.started, now)
        fresh = np.zeros((1, *self.yields.shape[1:]))
        self.yields, self.seconds = np.concatenate([self.yields, fresh]), np.concatenate([self.seconds, fresh])

    def price(self, domains: NDArray[np.int64], yields: Floats, seconds: Floats) -> None:
        """One round: tokens of each request under each arm, ``(R, arms)``, and the round's time, ``(arms,)``."""
        rows = np.arange(domains.size)
        self.yields[rows, domains] += yields
        self.seconds[rows, domains] += seconds / domains.size

    def same_tokens(self) -> Floats:
        """Seconds each arm would have taken for what each request produced under the policy, ``(R, arms)``."""
        rounds = self.yields[..., -1:] / np.maximum(self.yields, 1.0)  # an arm goes through a domain at its own mean pace
        return np.asarray((rounds * self.seconds).sum(axis=1))

    def leave(self, done: NDArray[np.bool_]) -> list[str]:
        gone = [name for name, out in zip(self.names, done, strict=True) if out]
        self.names = [name for name, out in zip(self.names, done, strict=True) if not out]
        for array in ("numbers", "produced", "contexts", "wanted", "started", "yields", "seconds"):
            setattr(self, array, getattr(self, array)[~done])
        return gone

    def domains(self, rounds: int, drafted: bool) -> NDArray[np.int64]:
        """Domain of each request in this round, ``(R,)``."""
        trace = self.trace
        if trace.adversary:
            return np.full(len(self.names), self.index[trace.adversary[0 if drafted else 1]])
        found = np.empty(len(self.names), dtype=np.int64)
        for row, (number, produced) in enumerate(zip(self.numbers.tolist(), self.produced.tolist(), strict=True)):
            segments = trace.requests[number].segments
            found[row] = self.index[[name for first, name in segments if first <= produced][-1]]
        if trace.period:
            found = (found + rounds // trace.period) % len(self.index)
        return found


def simulate(
    trace: Trace,
    world: World,
    options: PolicyOptions | None = None,
    concurrency: int = 32,
    rounds: int | None = None,
    believed: CostTable | None = None,
    seed: int = 0,
    counterfactual: bool = True,
    ahead: bool = False,
) -> Result:
    """Serve the trace with at most ``concurrency`` requests at a time.

    Args:
        rounds: stop after so many; requests are then repeated for as long as it takes. None: until all are served.
        believed: the cost table the policy starts from; None: the true one. counterfactual: also price the other arms.
        ahead: the engine runs ahead of its device, see :mod:`vllm_dspark.verification.asynchronous`.
    """
    limit, table = concurrency * (trace.width + 1), believed or world.table
    if ahead:
        flying = AsynchronousPolicy(trace.width, BatchCostModel(table, limit, concurrency), options)
        return _Ahead(trace, world, flying, concurrency, rounds, seed, counterfactual).run()
    policy = Policy(trace.width, CostModel(table, limit, concurrency), options)
    return _Run(trace, world, policy, concurrency, rounds, seed, counterfactual).run()


class _Run:
    def __init__(
        self, trace: Trace, world: World, policy: Policy, concurrency: int, rounds: int | None, seed: int, counterfactual: bool
    ) -> None:
        self.trace, self.world, self.policy = trace, world, policy
        self.concurrency, self.rounds, self.counterfactual = concurrency, rounds, counterfactual
        self.truth = CostModel(world.table, concurrency * (trace.width + 1), concurrency)
        self.drafter = Drafter(trace, seed)
        self.rng = np.random.default_rng(seed + 1)
        self.waiting = deque(range(len(trace.requests)))
        self.joined = 0
        self.now = 0.0
        self.drafting = False
        arms = ["off", *(f"fixed {k}" for k in range(1, trace.width + 1)), "oracle"] if counterfactual else []
        self.active = _Active(trace, len(arms))
        self.result = Result(Tally(), {name: Tally() for name in arms}, lengths=[0] * (trace.width + 1))

    def run(self) -> Result:
        result = self.result
        while self.rounds is None or result.rounds < self.rounds:
            self._admit()
            if not self.active.names:
                if not self.waiting:
                    break
                self.now = self.trace.requests[self.waiting[0]].arrival
                continue
            self._round()
        self._settle(np.ones(len(self.active.names), dtype=bool))
        result.probing = self.policy.ledger.probing
        result.reasons = dict(self.policy.counters)
        result.explained = self.policy.explain()
        return result

    def _admit(self) -> None:
        while len(self.active.names) < self.concurrency and (self.waiting or self.rounds is not None):
            if not self.waiting:
                self.waiting.extend(range(len(self.trace.requests)))
            if self.rounds is None and self.trace.requests[self.waiting[0]].arrival > self.now:
                break
            self.active.join(self.waiting.popleft(), f"r{self.joined}", self.now)
            self.joined += 1

    def _round(self) -> None:
        active, result = self.active, self.result
        domains = active.domains(result.rounds, self.drafting)
        decision = self.policy.begin_round(RoundInput(active.names, active.contexts))
        self.drafting = decision.drafting
        acceptance, confidences, would = self.drafter.draft(domains)
        survival: Floats = np.cumprod(acceptance, axis=1, dtype=np.float64)
        lengths = np.zeros(len(active.names), dtype=np.int64)
        if decision.drafting:
            lengths[decision.rows] = self._lengths(confidences[decision.rows])
            for length, count in zip(*np.unique(lengths[decision.rows], return_counts=True), strict=True):
                result.lengths[int(length)] += int(count)
        accepted = np.minimum(would, lengths)
        timing = self._time(lengths, self._forward(decision))
        taken = np.where(np.arange(self.trace.width) < lengths[:, None], survival, 0.0)
        seconds = timing.target_seconds + timing.draft_seconds
        result.policy.add(lengths.size + float(taken.sum()), seconds)
        if self.counterfactual:
            self._price(domains, survival, 1.0 + taken.sum(axis=1), seconds)
        self._learn(decision, confidences, lengths, accepted, timing)
        self.now += seconds
        result.rounds += 1
        result.emitted += int(accepted.sum()) + lengths.size
        result.drafted += decision.rows.size
        result.verified += int(lengths.sum())
        result.accepted += int(accepted.sum())
        self._advance(accepted)

    def _lengths(self, confidences: Floats) -> NDArray[np.int64]:
        """Drafts to verify of the rows that drafted."""
        return self.policy.lengths(confidences)

    def _forward(self, decision: DraftDecision) -> NDArray[np.int64]:
        """Rows in the block forward."""
        return decision.rows

    def _time(self, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> StepTiming:
        """The true times of a round with these rows in the block forward."""
        contexts = self.active.contexts
        shape = StepTiming(
            int(lengths.size + lengths.sum()), lengths.size, float(contexts.sum()), 1.0,
            float((contexts * (1 + lengths)).sum()), int(rows.size), float(contexts[rows].sum()),
        )  # fmt: skip
        target, draft = self.truth.step(shape)
        return StepTiming(
            shape.tokens, shape.requests, shape.context, target, shape.token_context, shape.drafted, shape.draft_context, draft
        )

    def _learn(
        self, decision: DraftDecision, confidences: Floats, lengths: NDArray[np.int64], accepted: NDArray[np.int64],
        timing: StepTiming,
    ) -> None:  # fmt: skip
        rows = decision.rows
        self.policy.observe(Outcomes([self.active.names[row] for row in rows], lengths[rows], accepted[rows]))
        self.policy.observe_step(self._measured(timing))

    def _measured(self, timing: StepTiming) -> StepTiming:
        target, draft = np.exp(self.world.noise * self.rng.standard_normal(2))
        if self.rng.random() < self.world.stalls:
            target *= 20.0
        return StepTiming(
            timing.tokens, timing.requests, timing.context, timing.target_seconds * float(target), timing.token_context,
            timing.drafted, timing.draft_context, timing.draft_seconds * float(draft),
        )  # fmt: skip

    def _price(self, domains: NDArray[np.int64], survival: Floats, made: Floats, spent: float) -> None:
        """Price the same round as every other arm would have run it; the policy's expected to produce ``made``, ``(R,)``."""
        requests, width = survival.shape
        total = float(self.active.contexts.sum())
        k = np.arange(width + 1)
        seconds = self.truth.at(requests * (1.0 + k), requests, total, (1.0 + k) * total)
        draft = float(self.truth.drafting(requests, total))
        seconds = seconds + np.where(k > 0, draft, self.truth.upkeep(requests))
        fixed = 1.0 + np.concatenate([np.zeros((requests, 1)), np.cumsum(survival, axis=1)], axis=1)
        curve = self.truth.curve(requests, requests * width, requests, total) + draft
        budget, _ = scheduler.search(survival.astype(np.float32), curve, requests)
        oracle, best = fixed[:, 0], float(seconds[0])
        if budget.throughput > requests / best:
            lengths = scheduler.asynchronous(survival.astype(np.float32), budget.drafts)
            oracle, best = fixed[np.arange(requests), lengths], float(curve[budget.drafts])
        self.active.price(domains, np.column_stack([fixed, oracle, made]), np.concatenate([seconds, [best, spent]]))

    def _settle(self, done: NDArray[np.bool_]) -> None:
        """Add up what the other arms would have taken for these requests."""
        times = self.active.same_tokens()[done].sum(axis=0)
        tokens = float(self.active.yields[done, :, -1].sum())
        for tally, spent in zip(self.result.arms.values(), times.tolist(), strict=False):
            tally.add(tokens, spent)

    def _advance(self, accepted: NDArray[np.int64]) -> None:
        active = self.active
        active.produced = active.produced + accepted + 1
        active.contexts = active.contexts + accepted + 1
        done = active.produced >= active.wanted
        if done.any():
            spent = self.now - active.started[done]
            self.result.speeds.extend((active.produced[done] / np.maximum(spent, 1e-12)).tolist())
            self._settle(done)
            self.policy.finish(active.leave(done))


class _Ahead(_Run):
    """Confidences are known one round later, verdicts two; the block forward runs for the whole batch.

    The budget is spent on the drafts that the round is surest of, as the device spends it.
    """

    policy: AsynchronousPolicy
    _flight: Flight
    _verdict: tuple[Flight, NDArray[np.int64], NDArray[np.int64]] | None = None

    def _forward(self, decision: DraftDecision) -> NDArray[np.int64]:
        return np.arange(len(self.active.names) if decision.drafting else 0)

    def _lengths(self, confidences: Floats) -> NDArray[np.int64]:
        self._flight = self.policy.depart()
        step = Step(len(self.active.names), len(self.active.names), float(self.active.contexts.sum()))
        limits = np.full(self._flight.slots.size, self.trace.width)
        allotment = self.policy.allot(self._flight, step, limits, ranked_later=True)
        return scheduler.asynchronous(history.survivals(confidences), allotment.budget, allotment.caps)

    def _learn(
        self, decision: DraftDecision, confidences: Floats, lengths: NDArray[np.int64], accepted: NDArray[np.int64],
        timing: StepTiming,
    ) -> None:  # fmt: skip
        if not decision.drafting:
            self._flight = self.policy.depart()
        if self._verdict is not None:
            self.policy.judged(*self._verdict)
        rows = decision.rows
        self.policy.drew(self._flight, confidences[rows])
        self._verdict = self._flight, lengths[rows], accepted[rows]
        self.policy.timed(self._measured(timing))
