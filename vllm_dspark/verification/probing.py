"""When requests that do not draft are probed: new ones first, ever more rarely, together, and only for a share of all time."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.ledger import Ledger
from vllm_dspark.verification.plan import Load
from vllm_dspark.verification.records import Rows

PROBE_DRAFTS = 3  # drafts of a probe that are verified at least, where that costs no more than drafting them
_FIRST, _LONGEST = 2, 128  # rounds between probes of one request
_FLEET_LONGEST = 128  # rounds between probes while nobody drafts and no request is new
_LOOKS_LONGEST = 64  # rounds between looks at everybody, all of whom are new, while nobody drafts
_RETRY, _LONGEST_RETRY = 8, 64  # rounds until a probe that could not be paid is tried again, for what it costs then
TOGETHER = 16  # most requests in a probe; what they show counts for the fleet
_NEVER = -1


def price(cost: CostModel, load: Load, already: int, context: float) -> Callable[[int], float]:
    """Seconds that a number of probes adds to the round.

    Args:
        already: requests that draft anyway. context: mean context of those that could be probed.
    """
    room = TOGETHER * PROBE_DRAFTS
    target = cost.curve(load.sure_tokens, room, load.requests, load.context, context)
    upkeep = 0.0 if already else cost.upkeep(load.sure_tokens)

    def seconds(count: int) -> float:
        drafts = cost.drafting(already + count, count * context) - cost.drafting(already, 0.0)
        drafting = max(float(drafts) - upkeep, 0.0)
        judging = max(float(target[min(count * PROBE_DRAFTS, room)] - target[0]), 0.0)
        return drafting + (judging if judging <= drafting else 0.0)

    return seconds


class Probing:
    """Back-off per request, in the slots of the history, and for the fleet while nobody drafts."""

    def __init__(self, capacity: int = 64) -> None:
        """Args: capacity: slots there is room for at first."""
        self.on = np.zeros(capacity, dtype=bool)
        self.interval = np.full(capacity, _FIRST)
        self.due = np.zeros(capacity, dtype=np.int64)
        self.last = np.zeros(capacity, dtype=np.int64)
        self.fleet_interval = 1
        self.fleet_due = 0
        self.least = 0.0  # seconds that the smallest probe took last

    def reset(self, slot: int, now: int) -> None:
        """A new request: due at once, before all that were looked at already."""
        while slot >= self.on.size:
            for name in ("on", "interval", "due", "last"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self.on[slot] = False
        self.interval[slot], self.due[slot], self.last[slot] = _FIRST, now, _NEVER

    def decided(self, slots: Rows, on: Rows, now: int, pays: bool = True) -> None:
        """Slots of this round, and those of them that draft: because it pays, or only to learn whether it does."""
        before = self.on[slots]
        self.on[slots] = False
        self.on[on] = pays
        left = slots[before & ~self.on[slots]]
        self.interval[left] = _FIRST
        self.due[left] = now + _FIRST
        if on.size and pays:
            self.last[on] = now
            self.fleet_interval, self.fleet_due = _FIRST, now + _FIRST
        elif on.size:
            self._put_off(on, now)

    def unseen(self, slots: Rows) -> NDArray[np.bool_]:
        """Which of these slots' requests never were to draft."""
        return np.asarray(self.last[slots] == _NEVER)

    def explored(self, now: int) -> None:
        """Everybody is looked at in this round, which is as good as a probe of the fleet."""
        self.fleet_interval = min(self.fleet_interval * 2, _LOOKS_LONGEST)
        self.fleet_due = now + self.fleet_interval

    def wait(self, now: int, rounds: int) -> None:
        """What was due cannot be paid for so many rounds."""
        self.fleet_due = now + min(max(rounds, _RETRY), _LONGEST_RETRY)

    def _put_off(self, slots: Rows, now: int) -> None:
        """These have been looked at: next time later."""
        self.interval[slots] = np.minimum(self.interval[slots] * 2, _LONGEST)
        self.due[slots] = now + self.interval[slots]
        self.last[slots] = now

    def due_now(self, slots: Rows, now: int, alone: bool) -> NDArray[np.bool_]:
        """Which of these slots are to be probed in this round; alone: nobody else drafts."""
        due = self.due[slots] <= now
        return due & (self.last[slots] == _NEVER) if alone and now < self.fleet_due else due

    def wake(self, slots: Rows, now: int, alone: bool) -> int:
        """The next round in which one of these slots is due."""
        due = self.due[slots][~self.on[slots]]
        later = due[due > now]
        soon = int(later.min()) if later.size else now + _LONGEST
        return max(soon, self.fleet_due) if alone else soon

    def select(
        self, rows: Rows, slots: Rows, now: int, seconds: Callable[[int], float], ledger: Ledger, alone: bool
    ) -> tuple[Rows, float]:
        """Rows to probe now and what that will take; the next time comes later, unless they turn out to pay.

        Args:
            rows, slots: of the requests that do not draft, ``(n,)`` each. seconds: time that a number of probes adds.
            alone: nobody else drafts, so the probes carry the whole pass.
        """
        latest_first = self.due_now(slots, now, alone).nonzero()[0][::-1]
        last = self.last[slots[latest_first]]
        waiting = latest_first[np.argsort(last, kind="stable")][:TOGETHER]
        reserve = 1.0 if (last == _NEVER).any() else 3.0  # a second look must leave enough for the next first ones
        self.least = seconds(1)
        count = int(waiting.size)
        while count and not ledger.may_probe(seconds(count), reserve):
            count //= 2
        if alone:
            self.fleet_interval = min(self.fleet_interval * 2, _FLEET_LONGEST) if count else self.fleet_interval
            if count:
                self.fleet_due = now + self.fleet_interval
            else:
                self.wait(now, ledger.rounds_until(reserve * self.least))
        if not count:
            return rows[:0], 0.0
        chosen = slots[waiting[:count]]
        self._put_off(chosen, now)
        return rows[waiting[:count]], seconds(count)
