"""What goes into the policy and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Kind = Literal["adaptive", "fixed", "off"]
NOBODY: Rows = np.zeros(0, dtype=np.int64)
KINDS: tuple[Kind, ...] = ("adaptive", "fixed", "off")


@dataclass(frozen=True)
class PolicyOptions:
    """How the policy decides.

    Attributes:
        policy: adaptive = whatever promises most accepted tokens per second; fixed = ``fixed_drafts`` of every request;
            off = nothing is drafted.
        fixed_drafts: drafts verified per request under fixed; None: all γ.
        max_draft_tokens: most drafts per request under any policy; None: γ; 0: off.
        min_tokens_per_second_per_request: expected speed of every request that a decision must keep, where no speculation
            would keep it too; None: throughput alone counts.
        probe_share: most time spent on probing, as a share of all time. loss_share: most time lost against not speculating.
        margin: largest promised gain that is still distrusted while drafting pays, as a share; the guard asks for less when its
            error is less, for more where drafting begins again, and for none of a lone request with losses to spare.
        fallback: what an adaptive policy becomes when its numbers turn absurd.
    """

    policy: Kind = "adaptive"
    fixed_drafts: int | None = None
    max_draft_tokens: int | None = None
    min_tokens_per_second_per_request: float | None = None
    probe_share: float = 0.01
    loss_share: float = 0.01
    margin: float = 0.04
    fallback: Literal["off", "fixed"] = "off"

    def __post_init__(self) -> None:
        if self.policy not in KINDS:
            raise ValueError(f"policy must be one of {', '.join(KINDS)}, found {self.policy!r}")
        for name in ("fixed_drafts", "max_draft_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, found {value!r}")
        speed = self.min_tokens_per_second_per_request
        if speed is not None and not speed > 0:
            raise ValueError(f"min_tokens_per_second_per_request must be positive, found {speed!r}")


@dataclass(frozen=True)
class RoundInput:
    """The requests that sampled a token and will be in the next target step, before anything is drafted.

    Attributes:
        requests: ids, R of them. contexts: tokens of context of each, ``(R,)``.
        limits: most drafts each can take this round (0: cannot draft), ``(R,)``; None: γ.
        other_tokens: further tokens known to be in the next step (prefill chunks). other_context: Σ context of their requests.
    """

    requests: Sequence[str]
    contexts: NDArray[np.integer]
    limits: NDArray[np.integer] | None = None
    other_tokens: int = 0
    other_context: float = 0.0


@dataclass(frozen=True)
class DraftDecision:
    """Which rows of the round go through the block forward, ascending ``(n,)``; none: the block forward is skipped.

    ``probes`` says which of them draft only to be measured, beside others or by themselves, ``(n,)``; where all of them do
    (``reason`` "exploring") it says none.
    """

    rows: Rows
    probes: NDArray[np.bool_]
    reason: str

    @property
    def drafting(self) -> bool:
        """Whether the block forward runs."""
        return bool(self.rows.size)


@dataclass(frozen=True)
class Outcomes:
    """Judged drafts of the last round: requests, drafts verified and accepted of each, ``(n,)``; order does not matter."""

    requests: Sequence[str]
    verified: NDArray[np.integer]
    accepted: NDArray[np.integer]
