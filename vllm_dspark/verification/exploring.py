"""When requests draft for a round though it does not pay: to learn who of them should.

A round in which many draft brings most of its cost back, so that a look at all of them can be cheaper than a probe of one. And
where requests are known to differ, drafting for the better ones can pay though it does not for all: it pays to find them.
"""

from collections.abc import Callable

import numpy as np

from vllm_dspark.verification import choice
from vllm_dspark.verification.choice import Choice
from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.history import History
from vllm_dspark.verification.ledger import Ledger
from vllm_dspark.verification.plan import Plan
from vllm_dspark.verification.probing import TOGETHER, Probing, price
from vllm_dspark.verification.records import NOBODY, Rows
from vllm_dspark.verification.survival import Floats

_MOST, _LEAST = 32, 4  # requests that are looked at together
_ENOUGH = 16  # new ones that say enough of a fleet, if there are not fewer
_USEFUL = 8  # rounds for which it is of use to know who should draft
_RATE = 0.3  # share of the last look in the average of what looks lose beyond what is expected
Yields = tuple[Floats, Floats]
"""N and G, ``(n, thresholds)``."""


class Exploring:
    """Chooses whom to look at, and charges for it like for a trial: beforehand, as a probe."""

    def __init__(self, history: History, probing: Probing, ledger: Ledger, speed: float | None) -> None:
        """Args: speed: tokens per second every request must keep."""
        self._history, self._probing, self._ledger, self._speed = history, probing, ledger, speed
        self._surprise = 0.0  # seconds that looks lose beyond what is expected: begun from a rest, a draft takes longer

    def select(
        self,
        cost: CostModel,
        plan: Plan,
        rows: Rows,
        expected: Callable[[Rows], Yields],
        net_price: float,
        margin: float,
        now: int,
    ) -> Rows:
        """Those of these rows, best first, that are to draft in round ``now`` because it is worth knowing what they yield.

        Args:
            expected: N and G of some of them. net_price: see :func:`choice.order`. margin: gain (log) that drafting must
                promise.
        """
        rows = rows[self._probing.unseen(plan.slots[rows])][:_MOST]
        if rows.size < _LEAST or plan.tokens > plan.slots.size:  # its time would not be learned from
            return NOBODY
        due = plan.load.drafted == 0 and now >= self._probing.fleet_due and rows.size >= min(_ENOUGH, plan.able / 2)
        yields = expected(rows)
        look = self._affordable(cost, plan, rows, yields)
        if look is None:
            return NOBODY
        rows, charge = rows[: look.count], self._charge(look)
        yields = yields[0][: look.count], yields[1][: look.count]
        contexts = plan.contexts[rows]
        probe = price(cost, plan.load, 0, float(contexts.mean()))(min(rows.size, TOGETHER)) if due else 0.0
        if charge - self._surprise >= probe and not self._pays(cost, plan, contexts, yields, net_price, margin, charge):
            return NOBODY
        plan.stake, plan.time_limit = charge, look.time_limit
        self._ledger.probed(charge)
        if due:
            self._probing.explored(now)
        return rows

    def _affordable(self, cost: CostModel, plan: Plan, rows: Rows, yields: Yields) -> Choice | None:
        """A look at these rows, or at the first half of them, and so on."""
        number, gain = yields
        size = int(rows.size)
        while size >= _LEAST:
            contexts = plan.contexts[rows[:size]]
            look = choice.choose(cost, plan.load, number[:size], gain[:size], contexts, self._speed, everybody=True)
            if look.count and self._ledger.may_probe(self._charge(look)):
                return look
            size //= 2
        return None

    def _charge(self, look: Choice) -> float:
        return max(-look.saves, 0.0) + self._surprise

    def _pays(
        self, cost: CostModel, plan: Plan, contexts: Floats, yields: Yields, net_price: float, margin: float, charge: float
    ) -> bool:
        """Whether drafting for the better ones would pay more than the look, if it were known who they are."""
        number, gain = _as_known(*yields, self._history.spread)
        best_first = choice.order(number, gain, contexts, net_price, 0.0)
        known = choice.choose(cost, plan.load, number[best_first], gain[best_first], contexts[best_first], self._speed)
        return known.gain > margin and _USEFUL * known.saves > charge

    def settle(self, plan: Plan, saved: float) -> float:
        """What the ledger is to book of a look that has saved so many seconds (negative: lost); a loss of a round at most."""
        saved = max(saved, -plan.off_seconds)
        if plan.stake is not None:
            more = max(-saved, 0.0) - plan.stake  # than was expected, what others have lost beyond that included
            self._surprise = max(self._surprise + _RATE * more, 0.0)
        return saved


def _as_known(number: Floats, gain: Floats, spread: float) -> Yields:
    """N and G as they may be known after a look: by turns better and worse, by this share."""
    share = 1.0 + spread * np.where(np.arange(number.shape[0]) % 2, -1.0, 1.0)[:, None]
    number = np.minimum(share * number, number[:, :1])
    return number, np.minimum(share * gain, number)
