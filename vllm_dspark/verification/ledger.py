"""The never-lose account: what speculating has brought against not speculating, and what probing has cost.

Every round that speculates is compared with what the same round would have taken without: saved = tokens / R x t_off - t. The
balance may fall below zero only by a few rounds; below that, drafting stops until time, a small share of which counts as saved,
has made up for it, or rounds on trial have: what those lose is paid like probing. Whatever the estimates get wrong about the
future, past losses stay bounded.
"""

import math
from dataclasses import dataclass

_LUCK = 30.0  # expected drafts of a round at which its outcome counts as much as what was expected
_RECENT_DRAFTS = 80.0  # expected drafts that the comparison of expectation and outcome reaches back
_LARGEST = 7.5  # largest balance, in rounds: with the allowance, 2 % of 500 rounds can be lost again whatever was gained
_AHEAD = 500.0  # rounds; half of what they may spend on probing can be spent at the beginning
_SAVED = 4.0  # largest probing credit, in rounds


@dataclass
class Ledger:
    """All in seconds.

    Attributes:
        loss_share: tolerated loss as a share of time. allowance_rounds: and in rounds without speculation, once.
        probe_share: probing as a share of time. balance: what speculating has brought, and the losses that time allows; kept
            within bounds. probing: what probing took.
        credit: what probing may still take. typical_round: recent rounds without speculation.
    """

    loss_share: float = 0.008
    allowance_rounds: float = 2.5
    probe_share: float = 0.008
    elapsed: float = 0.0
    balance: float = 0.0
    probing: float = 0.0
    credit: float = 0.0
    typical_round: float = 0.0

    def begin(self, off_seconds: float) -> None:
        """The first round that could speculate; without, it takes so long."""
        if not self.typical_round:
            self.typical_round = off_seconds
            self.credit = 0.5 * _AHEAD * self.probe_share * off_seconds

    def spent(self, seconds: float, off_seconds: float) -> None:
        """A round took ``seconds``; without speculation it would have taken ``off_seconds``."""
        self.elapsed += seconds
        self.typical_round += 0.1 * (off_seconds - self.typical_round)
        self.credit = min(self.credit + self._earned(seconds), _SAVED * self.typical_round)
        self.saved(self.loss_share * seconds)

    def saved(self, seconds: float, stake: float | None = None) -> None:
        """A speculating round saved this much (negative: lost).

        Args:
            stake: what it was charged for beforehand, like a probe, if it was on trial. If it won it gets that back, if it
                lost it pays no less than that.
        """
        if stake is not None:
            self.probed(-stake if seconds >= 0 else max(-seconds - stake, 0.0))
            seconds = max(seconds, 0.0)
        self.balance = min(self.balance + seconds, _LARGEST * self.typical_round)

    def probed(self, seconds: float, times: float = 1.0) -> None:
        """A probe takes this much longer than no probe, and is charged for as often."""
        self.probing += seconds
        self.credit -= times * seconds

    def explain(self) -> dict[str, float]:
        """The numbers, by name."""
        share = self.probing / self.elapsed if self.elapsed else 0.0
        return {"balance_seconds": self.balance, "balance_limit_seconds": self.limit, "probing_share": share}

    @property
    def limit(self) -> float:
        """The balance below which nothing is drafted."""
        return -self.allowance_rounds * self.typical_round

    def may_speculate(self, expected_loss: float = 0.0) -> bool:
        """Whether a round that may lose ``expected_loss`` still leaves the balance above the limit."""
        return self.balance - expected_loss >= self.limit

    def may_try(self, seconds: float) -> bool:
        """Whether a round that may lose this much can be paid like a probe, though the balance allows none."""
        return seconds <= self.credit

    def rounds_until(self, seconds: float) -> int:
        """Rounds until probing has earned this much, at most as many as are looked ahead."""
        missing = max(seconds - self.credit, 0.0)
        return math.ceil(min(missing / max(self._earned(self.typical_round), 1e-12), _AHEAD))

    def _earned(self, seconds: float) -> float:
        """What probing may take of this long; of the first rounds half has been spent beforehand."""
        return self.probe_share * seconds * (0.5 if self.elapsed < _AHEAD * self.typical_round else 1.0)

    def may_probe(self, seconds: float, reserve: float = 1.0) -> bool:
        """Whether probing for this long stays within its share of time, which must hold ``reserve`` times as much."""
        return reserve * seconds <= self.credit and self.may_speculate(seconds)


class Yield:
    """How many drafts were accepted against how many were expected to be, over recent rounds."""

    def __init__(self) -> None:
        self.accepted = self.expected = 20.0

    @property
    def doubt(self) -> float:
        """Standard deviation of log(accepted / expected)."""
        return 1.0 / math.sqrt(self.expected)

    def learn(self, expected: float, accepted: float) -> None:
        """Drafts that were expected to be accepted, and that were, of requests whose outcomes are known."""
        keep = 1.0 - expected / (expected + _RECENT_DRAFTS)
        self.accepted = keep * self.accepted + accepted
        self.expected = keep * self.expected + expected

    def gained(self, expected: float, accepted: float | None) -> float:
        """Drafts a round counts as accepted: many outcomes speak for themselves, few are mostly luck."""
        likely = expected * min(max(self.accepted / max(self.expected, 1e-9), 0.5), 1.2)
        return likely if accepted is None else likely + (accepted - likely) * expected / (expected + _LUCK)
