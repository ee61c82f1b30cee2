"""Who drafts: the subset and the depth with the largest expected throughput, draft cost included.

Requests are taken in descending gain, because the fixed part of a draft pass is shared by all that join it. For every number
n of them and every survival threshold v (verify what exceeds v), Θ(n, v) = (tokens + Σ G(v)) / (target(tokens + Σ N(v)) +
draft(n)) is compared with Θ of drafting nothing. Everything here comes from past rounds, loads and contexts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dspark.verification.cost import CostModel, StepTiming
from vllm_dspark.verification.history import THRESHOLDS
from vllm_dspark.verification.plan import Load, Plan
from vllm_dspark.verification.records import Rows
from vllm_dspark.verification.survival import Floats

_UNSURE = 0.03  # deviation of log(best / off)
_COUNTS = 24  # numbers of drafting requests that are compared, besides none


@dataclass(frozen=True)
class Choice:
    """The best subset: the first ``count`` of the order, drafts above ``threshold``, and the numbers compared.

    Attributes:
        off, best: Θ without and with drafting, tokens per second. deviation: standard deviation of log(best / off) that the
            cost model's errors leave. off_seconds, seconds: round without and with drafting. tokens: expected to be verified.
        time_limit: longest round the speed objective allows, seconds.
    """

    count: int
    threshold: float
    off: float
    best: float
    deviation: float
    off_seconds: float
    tokens: float = 0.0
    time_limit: float = float("inf")
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """log(best / off); -inf if nothing can draft."""
        return float(np.log(self.best / self.off)) if self.best > 0 else -np.inf

    @property
    def unsure(self) -> bool:
        """Whether step times are known so badly that they should be learned."""
        return self.deviation > _UNSURE

    @property
    def risk(self) -> float:
        """Seconds that drafting may lose by what is not known of step times; inf if it cannot win by that."""
        could_win = self.best > 0 and self.unsure and self.gain > -self.deviation
        return max(self.deviation - self.gain, 0.0) * self.off_seconds if could_win else float("inf")

    @property
    def saves(self) -> float:
        """Seconds that a round with drafting saves, for the same tokens; negative: loses. -inf if nothing can draft."""
        return self.seconds * math.expm1(self.gain) if self.best > 0 else -math.inf

    @property
    def stake(self) -> float:
        """Seconds that drafting loses if it brings nothing."""
        return max(self.seconds - self.off_seconds, 0.0)

    def margin(self, most: float, doubt: float) -> float:
        """Gain (log) below which a promise is not believed: one standard deviation of its error, at most ``most``.

        Args:
            doubt: standard deviation of log(drafts accepted / drafts expected to be).
        """
        drafts = max(1.0 - self.off / self.best, 0.0) if self.best > 0 else 0.0
        return min(math.hypot(self.deviation, drafts * doubt), most)

    def explain(self) -> dict[str, Any]:
        """The numbers, by name."""
        return {
            "gain": self.gain if self.best > 0 else None,
            "drafting": self.count,
            "threshold": self.threshold if self.count else None,
            "throughput_off": self.off,
            "throughput_best": self.best,
            "deviation": self.deviation,
            "off_seconds": self.off_seconds,
            "expected_tokens": self.tokens,
        }


def load_of(plan: Plan, forced: Rows, lengths: Rows, survival: Floats) -> Load:
    """The load of a round in which these rows draft and verify ``lengths`` of their drafts whatever is decided.

    Args:
        survival: expected of those rows, ``(n, γ)``.
    """
    contexts, count = plan.contexts, plan.contexts.size
    total = float(contexts.sum())
    context = total + plan.other_context
    if forced.size == 0:
        return Load(count, plan.tokens, float(count), context, context)
    gained = float(np.where(np.arange(survival.shape[1]) < lengths[:, None], survival, 0.0).sum())
    return Load(
        count, plan.tokens + int(lengths.sum()), count + gained, context,
        context + float((lengths * contexts[forced]).sum()), int(forced.size), float(contexts[forced].sum()),
    )  # fmt: skip


def order(number: Floats, gain: Floats, contexts: Floats, price: float, context_price: float) -> Rows:
    """Descending net gain at ``price`` tokens per verified token and ``context_price`` tokens per context token, stable."""
    net = (gain - price * number).max(axis=1) - context_price * contexts
    return np.argsort(-net, kind="stable")


def choose(
    cost: CostModel, load: Load, number: Floats, gain: Floats, contexts: Floats, speed: float | None, everybody: bool = False
) -> Choice:
    """The best (n, v) for requests in the given order.

    Args:
        number, gain: N and G, ``(A, thresholds)``. contexts: ``(A,)``. speed: tokens per second every request must keep.
        everybody: n is all of them.
    """
    off_seconds = seconds_off(cost, load)
    off = load.sure_yield / off_seconds
    counts = np.array([number.shape[0]]) if everybody else _counts(number.shape[0])
    if counts.size == 0:
        return Choice(0, np.inf, off, 0.0, 0.0, off_seconds)
    last = counts - 1
    top = int(counts[-1])
    verified = number[:top].cumsum(axis=0)[last]
    yielded = load.sure_yield + gain[:top].cumsum(axis=0)[last]
    token_context = load.token_context + (number[:top] * contexts[:top, None]).cumsum(axis=0)[last]
    draft_context = load.draft_context + contexts[:top].cumsum()[last]
    tokens = load.sure_tokens + verified
    if cost.table.captured:
        more = _room(cost, tokens)
        mean_context = contexts[:top].cumsum()[last] / counts
        yielded = _filled(tokens, yielded, more)
        tokens, token_context = tokens + more, token_context + more * mean_context[:, None]
    cost.reserve(int(np.ceil(tokens.max())) + 1)
    seconds = cost.at(tokens, load.requests, load.context, token_context)
    seconds = seconds + cost.drafting(load.drafted + counts, draft_context)[:, None]
    theta = yielded / seconds
    limit = np.full(theta.shape, np.inf)
    if speed is not None and load.sure_yield / load.requests / off_seconds >= speed:
        slowest = np.where((counts == load.requests)[:, None], 1.0 + gain[last], 1.0)
        limit = slowest / speed
        theta = np.where(seconds <= limit, theta, 0.0)
    place = int(theta.argmax())
    n, v = divmod(place, theta.shape[1])
    if theta[n, v] <= 0:
        return Choice(0, np.inf, off, 0.0, 0.0, off_seconds)
    drafting = StepTiming(
        int(tokens[n, v]), load.requests, load.context, 1.0, float(token_context[n, v]),
        load.drafted + int(counts[n]), float(draft_context[n]),
    )  # fmt: skip
    return Choice(
        int(counts[n]), float(THRESHOLDS[v]), off, float(theta[n, v]), deviation(cost, load, drafting, off_seconds),
        off_seconds, float(tokens[n, v]), float(limit[n, v]), float(seconds[n, v]),
    )  # fmt: skip


def _room(cost: CostModel, tokens: Floats) -> Floats:
    """Tokens that would run for nothing in place of padding, at most as many as there are drafts, ``(counts, thresholds)``."""
    sizes = np.array([size for size in cost.table.sizes if size <= cost.table.captured], dtype=np.float64)
    place = np.searchsorted(sizes, tokens)
    step = np.where(place < sizes.size, sizes[np.minimum(place, sizes.size - 1)], tokens)
    return np.asarray(np.maximum(np.minimum(step, tokens[:, :1]) - tokens, 0.0))


def _filled(tokens: Floats, yielded: Floats, more: Floats) -> Floats:
    """Yield with so many more of each row's drafts, by interpolation between thresholds; the first has them all."""
    rows = zip(tokens + more, np.minimum.accumulate(tokens, axis=1), yielded, strict=True)
    return np.array([np.interp(wanted, have[::-1], gained[::-1]) for wanted, have, gained in rows])


def seconds_off(cost: CostModel, load: Load) -> float:
    """The round if no adaptive request drafts."""
    cost.reserve(load.sure_tokens + 1)
    target = float(cost.at(float(load.sure_tokens), load.requests, load.context, load.token_context))
    upkeep = cost.upkeep(load.sure_tokens) if load.drafted == 0 else 0.0
    return target + upkeep + float(cost.drafting(load.drafted, load.draft_context))


def _counts(most: int) -> Rows:
    if most <= _COUNTS:
        return np.arange(1, most + 1)
    return np.unique(np.rint(np.geomspace(1, most, _COUNTS)).astype(np.int64))


def deviation(cost: CostModel, load: Load, drafting: StepTiming, off_seconds: float) -> float:
    """Standard deviation of log(seconds with / seconds without), from what the cost model knows about its own error."""
    target, draft = cost.step(drafting)
    share = target / (target + draft)
    idle = StepTiming(load.sure_tokens, load.requests, load.context, 1.0, load.token_context)
    with_row = cost.target_row(drafting, target)
    off_row = cost.target_row(idle, off_seconds)
    shared = cost.target.variance(share * with_row - off_row)
    own = cost.draft.variance(cost.draft_row(drafting, draft)) * (1.0 - share) ** 2
    return float(np.sqrt(shared + own))
