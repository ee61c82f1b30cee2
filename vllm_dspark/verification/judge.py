"""Whether the best choice is taken: what it promises against what may be lost, and what a round would teach."""

from vllm_dspark.verification.checks import Checks, Trials
from vllm_dspark.verification.choice import Choice
from vllm_dspark.verification.ledger import Ledger
from vllm_dspark.verification.plan import Plan
from vllm_dspark.verification.standing import MEASURING, TRIAL, TRYING

_AGAIN, _AGAIN_ALONE = 1.25, 1.12  # margins to begin again, of several requests and of one: what chance promised is not kept
_SPARE = 5.0  # rounds that could be lost yet, with which a lone request goes on in doubt: only dear probes would bring it back
_TRY = 4  # rounds between two that draft though it may not pay (trying, on trial)


class Judge:
    """Gives a round's reason, and books what it may cost.

    Attributes:
        margin: gain (log) that drafting had to promise last.
    """

    def __init__(self, most: float, ledger: Ledger) -> None:
        """Args: most: largest error of a promise that is allowed for, see :meth:`Choice.margin`."""
        self.checks, self.margin = Checks(), 0.0
        self._most, self._ledger, self._trials = most, ledger, Trials()
        self._paid = True  # whether drafting promised to pay when it was asked last
        self._tried = 0  # round of the last trial

    def reason(self, found: Choice, plan: Plan, doubt: float, now: int) -> str:
        """Why the choice is taken in round ``now`` ("pays", or to learn), or why not.

        Args:
            doubt: standard deviation of log(drafts accepted / drafts expected to be).
        """
        reason = self._reason(found, plan, doubt, now)
        if reason == TRYING:
            self._tried = now
            self._trials.tried(plan.tokens, found.deviation, now)
            self._ledger.probed(found.risk)
        elif reason == TRIAL:
            self._tried, plan.stake = now, found.stake
            self._ledger.probed(found.stake)
        return reason

    def _reason(self, found: Choice, plan: Plan, doubt: float, now: int) -> str:
        due = now >= self._tried + _TRY
        only_decodes = plan.tokens == plan.slots.size  # else its time would not be learned from
        self.margin = found.margin(self._most, doubt) * self._margins(plan)
        self._paid = found.count > 0 and found.gain > self.margin
        if not self._paid:
            due = due and only_decodes and self._trials.due(plan.tokens, found.deviation, now)
            return TRYING if due and self._ledger.may_probe(found.risk) else "does not pay"
        if not self._ledger.may_speculate():
            return TRIAL if due and self._ledger.may_try(found.stake) else "guarded"
        doubtful = found.unsure and found.gain < 2.0 * found.deviation
        if only_decodes and self.checks.due(None if plan.load.drafted else plan.tokens, doubtful, now):
            return MEASURING
        return "pays"

    def _margins(self, plan: Plan) -> float:
        """Margins that drafting must promise: to go on, fewer than to begin."""
        if not self._paid:
            return _AGAIN if plan.able > 1 else _AGAIN_ALONE
        return -1.0 if plan.able == 1 and self._ledger.balance > _SPARE * self._ledger.typical_round else 1.0
