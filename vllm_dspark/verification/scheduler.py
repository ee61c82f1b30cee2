"""Hardware-aware prefix scheduler: how many drafts of each request to verify (arXiv 2607.05147, section 3.3, Algorithm 1).

A round that verifies K drafts beside ``tokens`` sure tokens is expected to yield τ_K = tokens + (the K largest survivals) and
takes ``seconds[K]``; the throughput maximised is Θ_K = τ_K / seconds[K]. Survivals are float32, never rise along a row, and
are walked in descending order, equal ones by (position, request). Everything before position j in this order is computed
from tokens before j, which is why stopping early is lossless and searching on with this round's survivals is not (appendix A).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification.survival import Floats, Survival

Lengths = NDArray[np.int64]

_WHOLE = 2048  # fewer slots than this are sorted at once
_UPPER = np.float32(0.5)  # beyond that, the slots above this are sorted first: the walk often ends among them


class Budget(NamedTuple):
    """K drafts to verify and the throughput expected of it, in tokens per second."""

    drafts: int
    throughput: float


def eligible(survival: Survival, caps: NDArray[np.integer] | None) -> tuple[Survival, int]:
    """Survivals as ``(γ, R)`` with the slots at or beyond a request's cap set to -1, and how many remain."""
    slots = np.ascontiguousarray(survival.T, dtype=np.float32)
    if caps is None:
        return slots, slots.size
    outside = np.arange(slots.shape[0])[:, None] >= caps[None, :]
    slots[outside] = -1.0
    return slots, int(slots.size - np.count_nonzero(outside))


def descending(slots: Survival, count: int) -> Survival:
    """The ``count`` largest values, largest first."""
    return np.sort(slots, axis=None)[::-1][:count]


def throughputs(ranked: Survival, seconds: Floats, tokens: float) -> Floats:
    """Θ_K for K = 0…len(ranked), tokens per second."""
    tau = np.empty(ranked.size + 1)
    tau[0] = tokens
    tau[1:] = ranked
    np.cumsum(tau, out=tau)
    tau /= seconds[: tau.size]
    return tau


def synchronous(
    survival: Survival,
    seconds: Floats,
    tokens: float,
    caps: NDArray[np.integer] | None = None,
    floor: float = np.inf,
    floor_drafts: int = 0,
) -> Lengths:
    """Algorithm 1: walk in descending survival and stop at the first step that does not raise Θ.

    Args:
        survival: ``(R, γ)`` float32, of this round. seconds: ``(≥ drafts + 1,)``, time of the round by drafts verified.
        tokens: sure tokens of the round (one per request that samples). caps: ``(R,)`` most drafts per request.
        floor, floor_drafts: the first ``floor_drafts`` slots are admitted, as far as they lie above ``floor``, before stopping
            is considered. Must not depend on this round's drafts; it is how a budget found on stale survivals carries the
            walk across a cliff of the cost. Without them this is Algorithm 1 as published.

    Returns:
        Drafts to verify of each request, ``(R,)``.
    """
    if survival.shape[0] == 1:
        return _alone(survival[0], seconds, tokens, survival.shape[1] if caps is None else int(caps[0]), floor, floor_drafts)
    slots, count = eligible(survival, caps)
    if count > _WHOLE:
        top = slots[slots >= _UPPER]
        ranked = descending(top, top.size)
        taken = _stop(ranked, seconds, tokens, floor, floor_drafts)
        if taken < ranked.size:
            return admit(slots, ranked, taken)
        rest = slots[slots < _UPPER]
        ranked = np.concatenate([ranked, descending(rest, count - ranked.size)])
    else:
        ranked = descending(slots, count)
    return admit(slots, ranked, _stop(ranked, seconds, tokens, floor, floor_drafts))


def _alone(survival: Survival, seconds: Floats, tokens: float, cap: int, floor: float, floor_drafts: int) -> Lengths:
    """The same for one request, whose survivals ``(γ,)`` are in order as they are."""
    tau, theta, length = tokens, tokens / float(seconds[0]), 0
    for gained, spent in zip(survival[:cap].tolist(), seconds[1:].tolist(), strict=False):
        tau, before = tau + gained, theta
        theta = tau / spent
        if theta <= before and (length >= floor_drafts or gained <= floor):
            break
        length += 1
    return np.array([length], dtype=np.int64)


def _stop(ranked: Survival, seconds: Floats, tokens: float, floor: float, floor_drafts: int) -> int:
    """How many of the ranked slots the walk admits; all of them if it never stops."""
    theta = throughputs(ranked, seconds, tokens)
    stops = theta[1:] <= theta[:-1]
    start = 0
    if floor_drafts > 0:
        start = min(floor_drafts, int(ranked.size - np.searchsorted(ranked[::-1], floor, side="right")))
    first = int(stops[start:].argmax()) + start if start < ranked.size else ranked.size
    return first if first < ranked.size and stops[first] else int(ranked.size)


def search(
    survival: Survival, seconds: Floats, tokens: float, caps: NDArray[np.integer] | None = None
) -> tuple[Budget, Survival]:
    """The budget with the largest Θ, fewest drafts first, over all budgets, and the ranked survivals.

    Only for survivals that do not depend on this round's drafts (asynchronous form: two rounds old or older).
    """
    slots, count = eligible(survival, caps)
    ranked = descending(slots, count)
    theta = throughputs(ranked, seconds, tokens)
    best = int(theta.argmax())
    return Budget(best, float(theta[best])), ranked


def carry(stale: Survival, seconds: Floats, tokens: float, caps: NDArray[np.integer], exact: bool) -> tuple[float, int]:
    """``floor`` and ``floor_drafts`` that carry :func:`synchronous` across cliffs; (inf, 0) where stopping early costs nothing.

    Args:
        stale: ``(R, γ)``, of earlier rounds. exact: they stand for this round's well enough to spend the budget whole;
            otherwise a draft is carried only if it is worth what one behind the stop costs on average.
    """
    slots, count = eligible(stale, caps)
    ranked = descending(slots, count)
    theta = throughputs(ranked, seconds, tokens)
    best = int(theta.argmax())
    steps = np.diff(seconds[: best + 1])
    cliffs = np.flatnonzero(steps > 2.0 * steps.mean()) if best else steps
    if not cliffs.size:
        return np.inf, 0
    last = int(cliffs[-1])
    price = float(theta[best] * (seconds[best] - seconds[last])) / (best - last)
    return (0.0 if exact else min(price, float(ranked[best - 1]) * 0.999)), best


def asynchronous(survival: Survival, drafts: int, caps: NDArray[np.integer] | None = None) -> Lengths:
    """Spend a budget that was chosen before this round (:func:`search` on stale survivals) on its best slots.

    Args:
        survival: ``(R, γ)`` float32, of this round. drafts: budget K; more than there are slots means all. caps: ``(R,)``.
    """
    slots, count = eligible(survival, caps)
    return admit(slots, descending(slots, count), min(drafts, count))


def admit(slots: Survival, ranked: Survival, count: int) -> Lengths:
    """Lengths that admit the first ``count`` slots of the walk.

    Args:
        slots: ``(γ, R)`` of :func:`eligible`. ranked: their largest values, descending, at least ``count`` of them.
    """
    width, requests = slots.shape
    if count <= 0:
        return np.zeros(requests, dtype=np.int64)
    if count == slots.size:
        return np.full(requests, width, dtype=np.int64)
    bar = ranked[count - 1]
    kind = np.uint8 if width < 256 else np.int64
    within = (slots >= bar).view(np.uint8)
    lengths: Lengths = np.add.reduce(within, axis=0, dtype=kind).astype(np.int64)
    surplus = int(lengths.sum()) - count
    if surplus:  # more slots equal the bar than fit: the last of them by (position, request) stay out
        late = np.flatnonzero(slots == bar)[-surplus:] % requests
        lengths -= np.bincount(late, minlength=requests)
    return lengths
