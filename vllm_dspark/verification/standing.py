"""Decisions that stand: while the same one keeps coming out, most rounds need no new one and cost next to nothing."""

from collections.abc import Sequence

import numpy as np

from vllm_dspark.verification.plan import Plan
from vllm_dspark.verification.records import DraftDecision, RoundInput, Rows

_IDLE, _DRAFTING = 32, 6  # rounds for which a decision not to draft, and one to draft, stands at most
_SURE, _PATIENT = 16, 64  # and one not to draft that nothing known could change: at least, and until a probe can be paid
_LEAST = 4  # and one that several do not draft at least: deciding takes time as well
_CROWD, _IDLE_CROWD = 0.5, 0.75  # share of the requests that may be others, where a decision that all draft, or none, stands
_LEAVING = 0.25  # share of the requests by which there may be fewer: drafting pays sooner then
_ROOM = 0.25  # share of the room for drafts by which it may have changed, where a decision that everybody drafts stands
SILENT = "nobody can draft"
TRIAL = "on trial"
TRYING = "trying"
EXPLORING = "exploring"
MEASURING = "measuring no drafting"
_CROWDED = ("does not pay", "guarded", SILENT)  # reasons that hold whoever exactly is there
ONCE = (MEASURING, "probing", TRYING, TRIAL, EXPLORING)


class Standing:
    """Counts how often the same decision was made; the more often, the longer it stands. Counts rounds, never time."""

    def __init__(self) -> None:
        self._requests: Sequence[str] = ()
        self._limits: Rows | None = None
        self._other_tokens = 0
        self._rows: Rows = np.zeros(0, dtype=np.int64)
        self._agreed = self._until = self._room = 0
        self._everybody = False
        self._known: frozenset[str] = frozenset()
        self._crowded = False
        self.silent = False  # whether nobody could draft

    def drop(self) -> None:
        """Decide anew in the next round."""
        self._until = 0

    def decided(
        self, inputs: RoundInput, decision: DraftDecision, now: int, wake: int, able: int, patience: int | None = None
    ) -> None:
        """A decision was made in round ``now``.

        Args:
            wake: round in which something is due whatever happens. able: requests that could draft. patience: rounds until a
                probe can be paid, where not even what is unknown of step times could make drafting pay; else None.
        """
        self._until, self.silent = now, decision.reason == SILENT
        if decision.reason in ONCE or decision.probes.any():
            return
        before, self._everybody = self._everybody, 0 < decision.rows.size == able
        same = (before and self._everybody) or np.array_equal(self._rows, decision.rows)
        self._agreed = self._agreed + 1 if same else 0
        self._rows = decision.rows
        span = self._span(decision.drafting, able > 1, patience)
        self._until = min(now + span, wake - 1)
        if span:
            self.made_for(inputs)
            self._other_tokens, self._room = inputs.other_tokens, _room(inputs)
            self._known = frozenset(self._requests)
            self._crowded = decision.reason in _CROWDED and not decision.drafting

    def _span(self, drafting: bool, several: bool, patience: int | None) -> int:
        """Rounds for which a decision stands after so many that agreed; one request may change at any moment."""
        if drafting:
            return min(self._agreed, _DRAFTING)
        if not several:
            return min(2 * self._agreed, _IDLE)
        if patience is None:
            return min(max(2 * self._agreed, _LEAST), _IDLE)
        return min(_SURE * 2 ** min(self._agreed, 8), max(_IDLE, min(patience, _PATIENT)))

    def rests(self, requests: Sequence[str], now: int) -> bool:
        """Whether the last decision, if it was not to draft, answers round ``now`` of these requests as well.

        Nothing else is looked at: while requests go on decoding, the drafts they have room for only become fewer.
        """
        if now > self._until or self._rows.size:
            return False
        return self._same_crowd(requests) if self._crowded else requests == self._requests

    def left(self, now: int) -> int:
        """Rounds after round ``now`` that the last decision answers, if it was not to draft and as many requests stay."""
        return 0 if self._rows.size else max(self._until - now, 0)

    def stands(self, inputs: RoundInput, now: int, alike: bool = True) -> bool:
        """Whether the last decision answers this round as well; ``alike``: requests have no options of their own."""
        if now > self._until:
            return False
        if self._crowded:
            return self._same_crowd(inputs.requests)
        if inputs.other_tokens != self._other_tokens:
            return False
        if self._everybody and alike:
            return self._mostly(inputs.requests, _CROWD) and abs(_room(inputs) - self._room) <= _ROOM * self._room
        return self.unchanged(inputs)

    def unchanged(self, inputs: RoundInput) -> bool:
        """Whether these are the requests that it was made for, with as much room for drafts."""
        if inputs.requests != self._requests:
            return False
        if inputs.limits is None or self._limits is None:
            return inputs.limits is self._limits
        return bool((inputs.limits == self._limits).all())

    def lowered(self, inputs: RoundInput, plan: Plan) -> bool:
        """Whether these are the requests that the plan was made for, and it now holds for the room that is left for drafts."""
        before, limits = self._limits, None if inputs.limits is None else np.array(inputs.limits)
        if before is None or limits is None or inputs.requests != self._requests:
            return False
        if (limits > before).any() or not plan.lower(limits):
            return False
        self._limits = limits
        return True

    def made_for(self, inputs: RoundInput) -> None:
        """These are the requests that it answers for."""
        self._requests = inputs.requests[:]  # the caller may go on with the same list
        self._limits = None if inputs.limits is None else np.array(inputs.limits)

    def _same_crowd(self, requests: Sequence[str]) -> bool:
        """Whether enough of these requests were there when it was decided, and about as many."""
        if requests == self._requests:
            return True
        before = len(self._known)
        if before - len(requests) > _LEAVING * before or not self._mostly(requests, _IDLE_CROWD):
            return False
        self._requests = requests[:]
        return True

    def _mostly(self, requests: Sequence[str], others: float) -> bool:
        """Whether the share of requests that came or went since it was decided is at most ``others``."""
        before, staying = len(self._known), len(self._known.intersection(requests))
        return max(before, len(requests)) - staying <= others * before


def _room(inputs: RoundInput) -> int:
    """For how many drafts there is room; where nothing limits them, in multiples of γ."""
    return len(inputs.requests) if inputs.limits is None else int(np.sum(inputs.limits))
