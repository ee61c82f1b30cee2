"""Decisions that stand: while the same one keeps coming out, most rounds need no new one and cost next to nothing."""

from collections.abc import Sequence

import numpy as np

from vllm_dspark.verification.records import DraftDecision, RoundInput, Rows

_IDLE, _DRAFTING = 32, 6  # rounds for which a decision not to draft, and one to draft, stands at most
_CROWD = 0.5  # share of the requests that may be others, where a decision not to draft stands
_LEAVING = 0.25  # share of the requests by which there may be fewer: drafting pays sooner then
SILENT = "nobody can draft"
TRIAL = "on trial"
TRYING = "trying"
_CROWDED = ("does not pay", "guarded", SILENT)  # reasons that hold whoever exactly is there
ONCE = ("measuring no drafting", "probing", TRYING, TRIAL)


class Standing:
    """Counts how often the same decision was made; the more often, the longer it stands. Counts rounds, never time."""

    def __init__(self) -> None:
        self._requests: Sequence[str] = ()
        self._limits: Rows | None = None
        self._other_tokens = 0
        self._rows: Rows = np.zeros(0, dtype=np.int64)
        self._agreed = self._until = 0
        self._everybody = False
        self._known: frozenset[str] | None = None
        self.silent = False  # whether nobody could draft

    def drop(self) -> None:
        """Decide anew in the next round."""
        self._until = 0

    def decided(self, inputs: RoundInput, decision: DraftDecision, now: int, wake: int, able: int) -> None:
        """A decision was made in round ``now``.

        Args:
            wake: round in which something is due whatever happens. able: requests that could draft.
        """
        self._until, self.silent = now, decision.reason == SILENT
        if decision.reason in ONCE or decision.probes.any():
            return
        before, self._everybody = self._everybody, 0 < decision.rows.size == able
        same = (before and self._everybody) or np.array_equal(self._rows, decision.rows)
        self._agreed = self._agreed + 1 if same else 0
        self._rows = decision.rows
        span = min(self._agreed, _DRAFTING) if decision.drafting else min(2 * self._agreed, _IDLE)
        self._until = min(now + span, wake - 1)
        if span:
            self._requests = inputs.requests[:]  # the caller may go on with the same list
            self._limits = None if inputs.limits is None else np.array(inputs.limits)
            self._other_tokens = inputs.other_tokens
            self._known = frozenset(self._requests) if decision.reason in _CROWDED and not decision.drafting else None

    def rests(self, requests: Sequence[str], now: int) -> bool:
        """Whether the last decision, if it was not to draft, answers round ``now`` of these requests as well.

        Nothing else is looked at: while requests go on decoding, the drafts they have room for only become fewer.
        """
        if now > self._until or self._rows.size:
            return False
        return self._same_crowd(requests) if self._known is not None else requests == self._requests

    def stands(self, inputs: RoundInput, now: int) -> bool:
        """Whether the last decision answers this round as well."""
        if now > self._until:
            return False
        if self._known is not None:
            return self._same_crowd(inputs.requests)
        if inputs.other_tokens != self._other_tokens or inputs.requests != self._requests:
            return False
        if inputs.limits is None or self._limits is None:
            return inputs.limits is self._limits
        return bool((inputs.limits == self._limits).all())

    def _same_crowd(self, requests: Sequence[str]) -> bool:
        """Whether at least half of these requests were there when it was decided, and about as many."""
        assert self._known is not None
        if requests == self._requests:
            return True
        before, staying = len(self._known), len(self._known.intersection(requests))
        most = max(before, len(requests))
        if most - staying > _CROWD * before or before - len(requests) > _LEAVING * before:
            return False
        self._requests = requests[:]
        return True
