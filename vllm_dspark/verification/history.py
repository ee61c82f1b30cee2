"""What is known of each request, and of the fleet, from past rounds: acceptance and what drafting would yield.

Acceptance: a draft's calibrated logit gets two additive corrections, one per position shared by the fleet and one per request,
each a logistic filter on judged drafts (a censored draft is no evidence) that starts at 0 with a prior. A new request therefore
starts as the fleet. A factor learned in the same way makes up for over-confidence long before temperatures can be fitted.
Yield: for thresholds v the number of drafts N(v) whose survival exceeds v and their summed survival G(v), averaged over a
request's recent draft rounds and shrunk to the fleet's. N and G describe the whole trade-off: verifying what exceeds v costs
N(v) tokens and brings G(v). What the fleet's requests have in common as they go on (a hard beginning, say) is learned apart,
by tokens generated and in shares of what they yield, and everything else is learned without it, so that a few bad first rounds
say little of what follows; where few have come yet they are taken to go on as they came. How far to shrink is learned
(empirical Bayes): where requests differ by more than their rounds do, a request's own rounds soon count. Averages that a round
contradicts are given up at once.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification.survival import Floats, Survival, logit, sigmoid

Slots = NDArray[np.int64]

THRESHOLDS: Floats = np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
PRIOR_ACCEPTANCE = 0.75  # of a draft of an unknown fleet: hopeful, so that drafting is tried
_MEMORY = 16.0  # draft rounds a request's averages reach back
_HOPE = 2.0  # requests that the prior counts in what is expected of a request nobody has looked at
_FLEET_PRIOR = 4.0  # draft rounds that the prior counts in the fleet's average
_FLEET_MEMORY = 192.0  # draft rounds that the fleet's reach back, unless more come at once
_STALE, _FLEET_STALE = 32.0, 128.0  # rounds without drafting after which old averages count half against a new draft round
_KEPT = 24.0  # and after which a request's count half while there is none: what it says next may be of another kind
_SHRINK = (0.5, 8.0)  # draft rounds that the fleet's average counts in a request's: least, most
_WITHIN, _FIRST = 1.0, 1.5  # prior variances of Σ survival: of a request's rounds, and of a first round around the fleet
_WITHIN_MEMORY, _FIRST_MEMORY = 64.0, (4.0, 24.0)  # draft rounds and requests that they reach back
_PHASES = 6  # of a request: from 0, 4, 12, 28, 60 and 124 tokens on
_PHASE_PRIOR, _PHASE_MEMORY = 16.0, 64.0  # requests that "all phases are alike" counts, and that a phase's average reaches back
_YOUNG, _FAR = (4, 12), 1024  # tokens at which the first phases end; and for what never comes
_RISE = 0.15  # of a phase over an earlier one, in shares of the level, that is worth waiting for
_HOLDS = 0.1  # evidence (squared shares) that what was learned of phases holds for whoever comes
_HOLDS_MEMORY = 8.0  # changes of phase after which what they said of that counts half
_ALIKE = 4  # most draft rounds of different requests in one round that count as so many: they may all be in the same phase
_LEAST_LEVEL = 0.25  # to compare a share with
_JUMP = 9.0  # squared deviation, in variances, at which an average is given up
_REQUEST_PRECISION = (4.0, 8.0)  # of a request's correction: prior, most
_POSITION_PRECISION = (8.0, 80.0)  # of a position's correction: prior, most
_FACTOR_PRECISION = (8.0, 80.0)  # of the factor's logarithm: prior, most
_FACTOR, _FACTOR_STEP = (0.2, 3.0), 0.3  # least and most, and largest change of the logarithm at once
_BOUND = 4.0  # largest correction, logits
_FIELDS = ("number", "gain", "weight", "shift", "precision", "recent", "mean", "last", "born", "phase")


def yields(survival: Floats) -> tuple[Floats, Floats]:
    """N(v) and G(v) of survivals ``(n, γ)`` for every threshold, each ``(n, thresholds)``."""
    above = (survival[:, :, None] > THRESHOLDS).astype(np.float64)
    return above.sum(axis=1), np.asarray((survival[:, None, :] @ above)[:, 0])


class History:
    """Per-request statistics in slots that are reused, and the fleet's."""

    def __init__(self, width: int, capacity: int = 64) -> None:
        """Args: width: γ. capacity: requests there is room for at first."""
        self.width = width
        self.number = np.zeros((capacity, THRESHOLDS.size))
        self.gain = np.zeros((capacity, THRESHOLDS.size))
        self.weight = np.zeros(capacity)
        self.shift = np.zeros(capacity)
        self.precision = np.full(capacity, _REQUEST_PRECISION[0])
        self.recent = np.zeros((capacity, width))
        self.mean = np.zeros((capacity, width))
        self.last = np.zeros(capacity, dtype=np.int64)
        self.born = np.full(capacity, -1.0)  # context when first seen
        self.phase = np.full(capacity, -1)  # of its last draft round
        self.positions = np.zeros(width)
        self.position_precision = np.full(width, _POSITION_PRECISION[0])
        self.factor = np.ones(width)
        self.factor_precision = _FACTOR_PRECISION[0]
        prior: Floats = np.asarray(PRIOR_ACCEPTANCE ** np.arange(1.0, width + 1.0), dtype=np.float64)
        number, gain = yields(prior[None, :])
        self.fleet_number, self.fleet_gain, self.fleet_mean = number[0], gain[0], prior
        self._prior_number, self._prior_gain = number[0], gain[0]
        self.phase_number, self.phase_gain = np.zeros((2, _PHASES, THRESHOLDS.size))
        self.phase_weight = np.zeros(_PHASES)
        self.fleet_weight = _FLEET_PRIOR
        self.fleet_last = 0
        self.drafted = self.looked = 0  # draft rounds, and requests that had at least one
        self.within, self.first = _WITHIN, _FIRST
        self._firsts = _FIRST_MEMORY[0]
        self._came = self._told = 0.0  # of recent changes of phase: Σ told · came and Σ told², see _compare_change
        self._more = self._effects()

    def reset(self, slot: int, now: int) -> None:
        """Give a slot to a new request: nothing known but the fleet; grows when the slot is beyond the end."""
        while slot >= self.weight.size:
            for name in _FIELDS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self.weight[slot] = self.shift[slot] = 0.0
        self.precision[slot] = _REQUEST_PRECISION[0]
        self.last[slot], self.born[slot], self.phase[slot] = now, -1.0, -1
        self.recent[slot] = self.mean[slot] = self.fleet_mean

    def conditional(self, slots: Slots, logits: Floats) -> Floats:
        """Corrected acceptance probabilities ``(n, γ)`` from calibrated logits ``(n, γ)``."""
        factor, shift = self.corrections(slots)
        return sigmoid(factor * logits + shift)

    def corrections(self, slots: Slots) -> tuple[Floats, Floats]:
        """What calibrated logits are multiplied with, ``(γ,)``, and what is added then, ``(n, γ)``."""
        return self.factor, self.positions + self.shift[slots, None]

    def phases(self, slots: Slots, contexts: Floats) -> Slots:
        """Which phase each request is in, ``(n,)``, by its tokens of context ``(n,)`` since it was first asked about."""
        born = self.born[slots]
        new = born < 0.0
        if new.any():
            self.born[slots[new]] = contexts[new]
            born = self.born[slots]
        phase = np.log2(np.maximum(contexts - born, 0.0) / 4.0 + 1.0)
        return np.asarray(np.minimum(phase, _PHASES - 1), dtype=np.int64)

    def young(self, slots: Slots, contexts: Floats) -> int:
        """Tokens until half of these requests are past the first or second phase, if later ones yield more; else 1024.

        Those that were never asked about do not count.
        """
        age = (contexts - self.born[slots])[self.born[slots] >= 0.0]
        middle = float(np.median(age)) if age.size else math.inf
        phase = next((phase for phase, end in enumerate(_YOUNG) if middle < end), None)
        if phase is None:
            return _FAR
        more = self._more[1][:, 0]
        return math.ceil(_YOUNG[phase] - middle) if more[phase + 1 :].max() - more[phase] > _RISE else _FAR

    def expected(self, slots: Slots, now: int, caps: Slots, contexts: Floats) -> tuple[Floats, Floats]:
        """N and G of a draft round of each request, ``(n, thresholds)``, shrunk to the fleet.

        Args:
            now: number of the round. caps: most drafts of each request, ``(n,)``, at least 1. contexts: tokens, ``(n,)``.
        """
        number, gain = self._shrunk(slots, now)
        new = self.weight[slots] == 0.0
        if new.any():  # a fleet of few requests may be an odd one
            hope = _HOPE / (_HOPE + self.looked)
            number[new] += hope * (self._prior_number - number[new])
            gain[new] += hope * (self._prior_gain - gain[new])
        phase = self.phases(slots, contexts)
        level = self._level(gain)
        more_number, more_gain = self._more
        number = np.minimum(np.maximum(number + level * more_number[phase], 0.0), float(self.width))
        gain = np.minimum(np.maximum(gain + level * more_gain[phase], 0.0), number)
        if caps.size and caps.min() < self.width:  # the yields were measured without the cap
            survival = np.cumsum(self.mean[slots], axis=1)
            part = survival[np.arange(slots.size), caps - 1] / np.maximum(survival[:, -1], 1e-9)
            number = np.minimum(number, caps[:, None])
            gain = np.minimum(gain * part[:, None], number)
        return number, gain

    def _shrunk(self, slots: Slots, now: int) -> tuple[Floats, Floats]:
        """N and G of each request, ``(n, thresholds)``, whatever the phase."""
        weight = self.weight[slots] * np.exp2((self.last[slots] - now) / _KEPT)
        shrink = min(max(self.within / max(self.first - self.within, 1e-9), _SHRINK[0]), _SHRINK[1])
        share = (shrink / (shrink + weight))[:, None]
        number = self.number[slots] + share * (self.fleet_number - self.number[slots])
        return number, self.gain[slots] + share * (self.fleet_gain - self.gain[slots])

    @property
    def spread(self) -> float:
        """By what share of the fleet's Σ survival, at most 1, new requests turn out to differ after one look at them."""
        told = max(self.first - self.within, 0.0) / math.sqrt(max(self.first, 1e-9))
        return min(told / max(float(self.fleet_gain[0]), _LEAST_LEVEL), 1.0)

    def _level(self, gain: Floats) -> Floats:
        """What the effects of phases are shares of, ``(n, 1)``: Σ survival, a third the request's, the rest the fleet's."""
        return (gain[:, :1] + 2.0 * self.fleet_gain[0]) / 3.0

    def drew(self, slots: Slots, survival: Floats, now: int, contexts: Floats, settled: bool = False) -> None:
        """Learn the yields of draft rounds of these requests, verified or not.

        Args:
            survival: ``(m, n, γ)`` of m rounds in a row, the last of them ``now``. contexts: tokens, ``(n,)``.
            settled: they come from :meth:`guess`, which is an average already; the last replaces what was known.
        """
        if settled:
            survival = survival[-1:]
        rounds, requests, _ = survival.shape
        if requests == 0:
            return
        numbers, gains = yields(survival.reshape(-1, self.width))
        phase = self.phases(slots, contexts)
        usual = self._shrunk(slots, now)
        level = self._level(usual[1])
        number, gain = numbers.reshape(rounds, requests, -1).mean(axis=0), gains.reshape(rounds, requests, -1).mean(axis=0)
        more_number, more_gain = self._more
        if not settled:
            self._learn_phases(slots, phase, level, number - usual[0], gain - usual[1])
        number, gain = number - level * more_number[phase], gain - level * more_gain[phase]
        last = gains[-requests:, 0] - (level * more_gain[phase])[:, 0]
        mean = survival.mean(axis=0)
        weight = self.weight[slots]
        gap = self.last[slots] + rounds - now
        if gap.min() < 0:
            kept = np.exp2(np.minimum(gap, 0) / _STALE)
            weight = weight * kept
            self.precision[slots] = np.maximum(self.precision[slots] * kept, _REQUEST_PRECISION[0])
        old = self.gain[slots]
        new = self.weight[slots] == 0.0
        self._learn_spread(last, old[:, 0], weight, new)
        self.looked += int(np.count_nonzero(new))
        off = (gain[:, 0] - old[:, 0]) ** 2 * weight
        weight = np.where(off > _JUMP * self.within * (weight / rounds + 1.0), np.minimum(weight, 0.5), weight) + rounds
        rate = 1.0 if settled else (rounds / np.minimum(weight, max(_MEMORY, rounds)))[:, None]
        self.gain[slots] = old + rate * (gain - old)
        self.number[slots] += rate * (number - self.number[slots])
        self.mean[slots] += rate * (mean - self.mean[slots])
        self.weight[slots] = np.minimum(weight, _MEMORY)
        self.recent[slots] = survival[-1]
        self.last[slots] = now
        self._learn_fleet(number.mean(axis=0), gain.mean(axis=0), mean.mean(axis=0), requests * rounds, now, settled)
        self._more = self._effects()

    def _effects(self) -> tuple[Floats, Floats]:
        """What phases have beyond what is usual, ``(phases, thresholds)``, in shares of the level.

        As long as few requests have been in a phase it is taken to be like the one before. All of it counts less when requests
        have come whom it does not fit.
        """
        holds = min(max((self._came + _HOLDS) / (self._told + _HOLDS), 0.0), 1.0)
        number, gain = self._learned()
        return holds * number, holds * gain

    def _learned(self) -> tuple[Floats, Floats]:
        """The same, whomever it fits."""
        shares, each = np.zeros(_PHASES), np.zeros((_PHASES, _PHASES))
        known = self.phase_weight / (self.phase_weight + _PHASE_PRIOR * self._usual())
        for phase, share in enumerate(known.tolist()):
            shares *= 1.0 - share
            shares[phase] = share
            each[phase] = shares
        return each @ self.phase_number, each @ self.phase_gain

    def _usual(self) -> float:
        """What a request counts in the weight of a phase."""
        return max(float(self.fleet_gain[0]), 0.1) ** 2

    def _learn_phases(self, slots: Slots, phase: Slots, level: Floats, number: Floats, gain: Floats) -> None:
        """What the first round of a phase has beyond what is usual of a request already known, ``(n, thresholds)``.

        In shares of the ``level`` expected, ``(n, 1)``, so that it holds for requests of another kind as well. Requests are
        compared with themselves: those of a phase may be others than those of all rounds.
        """
        before = self.phase[slots]
        entered = (before != phase) & (self.weight[slots] >= 1.0)
        self.phase[slots] = phase
        if not entered.any():
            return
        self._compare_change(before[entered], phase[entered], gain[entered, 0] / np.maximum(level[entered, 0], _LEAST_LEVEL))
        for each in np.unique(phase[entered]):
            here = entered & (phase == each)
            came = float((level[here] ** 2).sum())
            self.phase_weight[each] = weight = min(self.phase_weight[each] + came, max(_PHASE_MEMORY * self._usual(), came))
            weight = max(weight, 1e-9)
            self.phase_number[each] += (level * (number - level * self.phase_number[each]))[here].sum(axis=0) / weight
            self.phase_gain[each] += (level * (gain - level * self.phase_gain[each]))[here].sum(axis=0) / weight

    def _compare_change(self, before: Slots, phase: Slots, gain: Floats) -> None:
        """What was learned of the change between these phases with what came, all ``(n,)``; ``gain`` in shares of the level."""
        learned = self._learned()[1][:, 0]
        told = learned[phase] - learned[before]
        kept = 0.5 ** (told.size / _HOLDS_MEMORY)
        self._told = kept * self._told + float(told @ told)
        self._came = kept * self._came + float(told @ (gain - self._more[1][before, 0]))

    def _learn_spread(self, level: Floats, own: Floats, weight: Floats, new: NDArray[np.bool_]) -> None:
        """How much Σ survival varies between the rounds of a request, and between a new request and the fleet; all ``(n,)``."""
        seen = weight >= 1.0
        count = int(np.count_nonzero(seen))
        if count:
            off = ((level - own) ** 2 * weight / (weight + 1.0))[seen]
            variance = float(np.minimum(off, _JUMP * self.within).sum()) / count
            self.within += count / (count + _WITHIN_MEMORY) * (variance - self.within)
        if count < level.size and self.drafted and new.any():
            off = (level[new] - self.fleet_gain[0]) ** 2
            self._firsts = min(self._firsts + off.size, max(_FIRST_MEMORY[1], off.size))
            self.first += off.size / self._firsts * (float(off.mean()) - self.first)

    def _learn_fleet(self, number: Floats, gain: Floats, survival: Floats, drawn: int, now: int, settled: bool) -> None:
        self.drafted += drawn
        kept = self.fleet_weight * 2.0 ** (min(self.fleet_last + 1 - now, 0) / _FLEET_STALE)
        off = min(drawn, _ALIKE) * (float(gain[0]) - float(self.fleet_gain[0])) ** 2
        if settled or off > _JUMP * max(self.first, self.within):
            kept = min(kept, drawn)
        self.fleet_weight = min(kept + drawn, max(_FLEET_MEMORY, 2.0 * drawn))
        self.fleet_last = now
        rate = drawn / self.fleet_weight
        self.fleet_number = self.fleet_number + rate * (number - self.fleet_number)
        self.fleet_gain = self.fleet_gain + rate * (gain - self.fleet_gain)
        self.fleet_mean = self.fleet_mean + rate * (survival - self.fleet_mean)

    def judged(self, slots: Slots, conditional: Floats, verified: Slots, accepted: Slots) -> None:
        """Correct acceptance from verified drafts.

        Args:
            conditional: ``(n, γ)`` as used in the round. verified, accepted: drafts per request, ``(n,)``. A draft behind the
                first rejection was not judged on its own and does not count.
        """
        places = np.arange(self.width)
        reached = places < np.minimum(verified, accepted + 1)[:, None]
        surprise = ((places < accepted[:, None]) - conditional) * reached
        information = conditional * (1.0 - conditional) * reached
        self._learn_factor(logit(conditional) - self.corrections(slots)[1], surprise, information)
        per_request = information.sum(axis=1)
        precision = np.minimum(self.precision[slots] + per_request, _REQUEST_PRECISION[1])
        self.precision[slots] = precision
        pull = _REQUEST_PRECISION[0] / precision * np.minimum(per_request / _REQUEST_PRECISION[1], 1.0)
        shift = self.shift[slots] * (1.0 - pull) + surprise.sum(axis=1) / precision
        self.shift[slots] = np.minimum(np.maximum(shift, -_BOUND), _BOUND)
        per_position = information.sum(axis=0)
        ceiling = _POSITION_PRECISION[1] + 2.0 * per_position
        self.position_precision = np.minimum(self.position_precision + per_position, ceiling)
        step = np.minimum(np.maximum(surprise.sum(axis=0) / self.position_precision, -1.0), 1.0)
        self.positions = np.minimum(np.maximum(self.positions + step, -_BOUND), _BOUND)

    def _learn_factor(self, scaled: Floats, surprise: Floats, information: Floats) -> None:
        """How much confidences deserve to be believed; ``scaled``: factor x logits, ``(n, γ)``."""
        gained = float((scaled * scaled * information).sum())
        self.factor_precision = min(self.factor_precision + gained, _FACTOR_PRECISION[1] + 2.0 * gained)
        step = float((scaled * surprise).sum()) / self.factor_precision
        factor = self.factor * math.exp(min(max(step, -_FACTOR_STEP), _FACTOR_STEP))
        self.factor = np.minimum(np.maximum(factor, _FACTOR[0]), _FACTOR[1])

    def fitted(self, positions: NDArray[np.bool_]) -> None:
        """New temperatures of these positions have been found: the factor has done its work there."""
        self.factor[positions] = 1.0

    def guess(self, rows: int) -> Floats:
        """Logits ``(rows, γ)`` for drafters without a confidence head; the corrections do the rest."""
        return np.full((rows, self.width), float(logit(PRIOR_ACCEPTANCE)))

    def state(self) -> dict[str, Any]:
        """The fleet's part, JSON-ready."""
        return {
            "positions": self.positions.tolist(), "number": self.fleet_number.tolist(), "gain": self.fleet_gain.tolist(),
            "mean": self.fleet_mean.tolist(), "weight": self.fleet_weight, "precision": self.position_precision.tolist(),
            "factor": self.factor.tolist(), "factor_precision": self.factor_precision,
            "within": self.within, "first": self.first, "looked": self.looked,
            "phases": [self.phase_number.tolist(), self.phase_gain.tolist()], "phase_weight": self.phase_weight.tolist(),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start from a saved fleet.

        Raises:
            ValueError: it is of another γ or not finite.
        """
        names = ("positions", "number", "gain", "mean", "precision", "factor")
        arrays = {name: np.asarray(state[name], dtype=np.float64) for name in names}
        wanted = {"number": THRESHOLDS.size, "gain": THRESHOLDS.size}
        for name, array in arrays.items():
            if array.shape != (wanted.get(name, self.width),) or not np.isfinite(array).all():
                raise ValueError(f"history: {name} has {array.size} values, wanted {wanted.get(name, self.width)} finite ones")
        phases, weights = np.asarray(state["phases"], dtype=np.float64), np.asarray(state["phase_weight"], dtype=np.float64)
        if phases.shape != (2, _PHASES, THRESHOLDS.size) or weights.shape != (_PHASES,) or not np.isfinite(phases).all():
            raise ValueError(f"history: phases have shape {phases.shape}, wanted {(2, _PHASES, THRESHOLDS.size)}, finite")
        (self.phase_number, self.phase_gain), self.phase_weight = phases, weights
        self.positions, self.fleet_mean = arrays["positions"], arrays["mean"]
        self.fleet_number, self.fleet_gain = arrays["number"], arrays["gain"]
        self.position_precision, self.fleet_weight = arrays["precision"], float(state["weight"])
        self.factor, self.factor_precision = arrays["factor"], float(state["factor_precision"])
        self.drafted, self.looked = int(self.fleet_weight), int(state["looked"])
        self.within, self.first = float(state["within"]), float(state["first"])
        self._came = self._told = 0.0
        self._more = self._effects()


def survivals(conditional: Floats) -> Survival:
    """Running products as float32 ``(n, γ)``; what the scheduler ranks."""
    product: Survival = np.cumprod(conditional, axis=1).astype(np.float32)
    return product
