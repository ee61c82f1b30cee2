"""The round being built: what is fixed before anything is drafted, and what is kept to learn from its outcomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification.cost import CostModel, next_size
from vllm_dspark.verification.records import DraftDecision, Rows
from vllm_dspark.verification.survival import Floats, Survival

NO_FLOOR = (float("inf"), 0)


@dataclass(frozen=True)
class Load:
    """What the next step contains whether or not the adaptive requests draft.

    Attributes:
        requests: R. sure_tokens: tokens the target runs on. sure_yield: tokens expected of them.
        context: Σ context. token_context: Σ tokens·context. drafted, draft_context: requests that draft in any case.
    """

    requests: int
    sure_tokens: int
    sure_yield: float
    context: float
    token_context: float
    drafted: int = 0
    draft_context: float = 0.0


@dataclass
class Plan:
    """Kept until the outcomes and the timing of the round are known; a decision that stands reuses it (:meth:`again`).

    Attributes:
        requests: ids. slots, kinds, caps, contexts: per request, ``(R,)``. tokens: sure tokens of the target step.
        decision, load: see there. able: requests that could draft. off_seconds: the round if no adaptive request drafts.
            draft_seconds: predicted for the decision's rows. probe_seconds: what its probes add, for which they are charged
            ``probe_times``. stake: what it was charged for beforehand, if it is on trial or explores. time_limit: longest round
            the speed objective allows.
        adaptive: which rows of the decision are, ``(n,)``. floor: see :func:`scheduler.synchronous`.
        lengths, conditional, raw, good: per row of the decision, once drafted. expected: drafts of it expected to be
            accepted, ``(n,)``. accepted: drafts of adaptive requests that were. seconds: predicted of the round as drafted.
        survivals: of the rounds of this decision that the history has not learned from yet, the last of them ``drawn``.
    """

    requests: Sequence[str]
    slots: Rows
    kinds: Rows
    caps: Rows
    contexts: Floats
    tokens: int
    other_context: float
    decision: DraftDecision
    load: Load
    able: int = 0
    off_seconds: float = 0.0
    draft_seconds: float = 0.0
    probe_seconds: float = 0.0
    probe_times: float = 1.0
    stake: float | None = None
    time_limit: float = float("inf")
    adaptive: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    floor: tuple[float, int] = NO_FLOOR
    lengths: Rows | None = None
    conditional: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    raw: Floats | None = None
    good: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    expected: Floats = field(default_factory=lambda: np.zeros(0))
    accepted: float | None = None
    seconds: float = 0.0
    survivals: list[Survival] = field(default_factory=list)
    drawn: int = 0
    _places: dict[str, int] | None = None
    _curve: Floats | None = None

    def again(self) -> None:
        """The same decision for the next round."""
        self.lengths = self.accepted = None

    def lower(self, limits: Rows) -> bool:
        """Take over limits ``(R,)``, none of them higher; False, and nothing is changed, if a row that drafts no longer can."""
        caps: Rows = np.minimum(self.caps, limits)
        if not (caps[self.decision.rows] > 0).all():
            return False
        self.caps, self._curve = caps, None
        return True

    def curve(self, cost: CostModel) -> Floats:
        """Time of the round by drafts verified of the adaptive rows, ``(Σ caps + 1,)``; infinite beyond the speed objective.

        Where steps had better come in few sizes, that of the next such size: then the drafts up to it come for nothing.
        """
        if self._curve is None:
            rows, load = self.decision.rows[self.adaptive], self.load
            mean = float(self.contexts[rows].sum()) / max(rows.size, 1)
            drafts = int(self.caps[rows].sum())
            self._curve = cost.curve(load.sure_tokens, drafts, load.requests, load.context, mean) + self.draft_seconds
            if cost.few_sizes:
                sizes = next_size(load.sure_tokens + np.arange(1, drafts + 1)) - load.sure_tokens
                self._curve[1:] = self._curve[np.minimum(sizes, drafts)]
            if self.time_limit < np.inf:
                self._curve[1:][self._curve[1:] > self.time_limit] = np.inf
        return self._curve

    def places(self, requests: Sequence[str]) -> Rows:
        """Places of these requests among the decision's rows, ``(n,)``; -1: not among them."""
        if self._places is None:
            self._places = {self.requests[row]: place for place, row in enumerate(self.decision.rows.tolist())}
        known = self._places
        return np.array([known.get(name, -1) for name in requests], dtype=np.int64)
