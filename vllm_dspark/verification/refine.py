"""Online correction of a cost table: a small Kalman filter over log(measured / table) at knots of log2(size)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification.survival import Floats

_COMMON, _LOCAL, _REACH = 0.25, 0.15, 2.0  # prior: shared and local log error of a table, and how many octaves it reaches
_FAR_SHORTER = -0.75  # log error at which a shorter step is a surprise, however little is known
_MAX_STEP, _MAX_DROP = 0.1, 0.7  # largest change of a log correction per update, and after one far too short
_MAX_TOTAL = 3.0  # largest log correction: a table is at most 20x off
_NOISE = (0.01, 0.10, 0.30)  # measurement noise of one step, log units: least, first, most
_STRIKES = 12  # that many steps in a row that are far too long are a new regime, not stalls
_RECENT = 256  # errors kept for the quantile


class Corrector:
    """Log corrections at knots, with their covariance: what is known of the table's error, and how well.

    State ``(m + 1,)``: one value per knot, then one for the context term. Correcting costs O(m²) per measurement, memory is
    bounded, and nothing is random.
    """

    def __init__(self, limit: int, forgetting: float = 1 / 1500) -> None:
        """Args: limit: largest size (tokens or requests). forgetting: share of the prior uncertainty regained per update."""
        self.knots = np.arange(0.0, np.log2(max(limit, 2)) + 1.0, 0.5)
        gaps = np.abs(self.knots[:, None] - self.knots[None, :])
        count = self.knots.size
        self.prior = np.zeros((count + 1, count + 1))
        self.prior[:count, :count] = _COMMON**2 + _LOCAL**2 * np.exp(-gaps / _REACH)
        self.prior[count, count] = _COMMON**2 + _LOCAL**2
        self.prior[:count, count] = self.prior[count, :count] = 0.5 * _COMMON**2
        self.forgetting = forgetting
        self.mean = np.zeros(count + 1)
        self.covariance = self.prior.copy()
        self.noise = _NOISE[1] ** 2
        self.updates = 0
        self.ignored = 0
        self._strikes = 0
        self._errors: list[float] = []

    def weights(self, size: float, context_share: float = 0.0) -> Floats:
        """Row h ``(m + 1,)`` with log correction of a step = h · mean; context_share: its context term / its whole time."""
        place = min(math.log2(max(size, 1.0)) * 2.0, self.knots.size - 1.0)
        low = min(int(place), self.knots.size - 2)
        row: Floats = np.zeros(self.mean.size)
        row[low] = (low + 1 - place) * (1.0 - context_share)
        row[low + 1] = (place - low) * (1.0 - context_share)
        row[-1] = context_share
        return row

    def factors(self, sizes: NDArray[np.integer]) -> Floats:
        """Multipliers of the table at these sizes, without the context term."""
        places = np.log2(np.maximum(sizes, 1))
        return np.asarray(np.exp(np.interp(places, self.knots, self.mean[:-1])))

    @property
    def context_factor(self) -> float:
        """Multiplier of the context term."""
        return math.exp(float(self.mean[-1]))

    def variance(self, row: Floats) -> float:
        """Variance of the log correction h · state, or of a difference of two."""
        return max(float(row @ self.covariance @ row), 0.0)

    def shared(self, row: Floats, other: Floats, log_ratio: float) -> float:
        """Expected log error of a step with row ``other``, given that of one with ``row``."""
        direction = self.covariance @ row
        return float(other @ direction) / (float(row @ direction) + self.noise) * log_ratio

    def update(self, row: Floats, log_ratio: float) -> bool:
        """Learn from log(measured / corrected prediction) of one step; False if it was ignored as an outlier.

        Beyond 4 standard deviations a longer step is taken for a stall or a compilation, unless many follow; a shorter one, or
        one shorter by half in any case, is believed, as nothing shortens a step by accident. Beyond 2 its pull no longer grows
        (Huber).
        """
        if not np.isfinite(log_ratio):
            self.ignored += 1
            return False
        direction = self.covariance @ row
        spread = float(np.sqrt(row @ direction + self.noise))
        most = _MAX_STEP
        if abs(log_ratio) > 4.0 * spread or log_ratio < _FAR_SHORTER:
            self._strikes += 1
            if log_ratio < 0:
                most = _MAX_DROP
                self._doubt((log_ratio**2 / 4.0 - self.noise) / max(float(row @ direction), 1e-12))
            elif self._strikes < _STRIKES:
                self.ignored += 1
                return False
            else:  # what was known no longer holds
                self.covariance = self.prior.copy()
            self.noise = _NOISE[1] ** 2
            direction = self.covariance @ row
            spread = float(np.sqrt(row @ direction + self.noise))
        self._strikes = 0
        pull = float(np.clip(log_ratio, -2.0 * spread, 2.0 * spread))
        gain = direction / spread**2
        step = gain * pull
        largest = float(np.abs(step).max())
        followed = pull / log_ratio if log_ratio else 1.0
        if largest > most:
            step *= most / largest
            followed *= most / largest
        self.mean = np.clip(self.mean + step, -_MAX_TOTAL, _MAX_TOTAL)
        self.covariance -= followed * np.outer(gain, direction)  # what was held back is not known either
        self.covariance += self.forgetting * (self.prior - self.covariance)
        self._learn_noise(log_ratio, spread)
        return True

    def _doubt(self, times: float) -> None:
        """Make all variances so many times as large, the prior's at most: what was known best still changes least."""
        scale = np.sqrt(np.clip(self.prior.diagonal() / self.covariance.diagonal(), 1.0, max(times, 1.0)))
        self.covariance *= np.outer(scale, scale)

    def _learn_noise(self, log_ratio: float, spread: float) -> None:
        self.updates += 1
        rate = max(0.02, 1.0 / (self.updates + 4))
        expected = spread**2 - self.noise
        sample = max(min(log_ratio**2, 4.0 * spread**2) - expected, 0.0)
        self.noise = float(np.clip((1 - rate) * self.noise + rate * sample, _NOISE[0] ** 2, _NOISE[2] ** 2))
        self._errors.append(abs(float(np.expm1(log_ratio))))
        if len(self._errors) > _RECENT:
            del self._errors[: _RECENT // 2]

    def error(self, quantile: float = 0.5) -> float:
        """Quantile of |measured / predicted - 1| over the recent steps; 0 before the first."""
        return float(np.quantile(self._errors, quantile)) if self._errors else 0.0

    def state(self) -> dict[str, Any]:
        """What to save; see :meth:`load_state`."""
        return {
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "noise": self.noise,
            "updates": self.updates,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it is of another size or not finite.
        """
        mean = np.asarray(state["mean"], dtype=np.float64)
        covariance = np.asarray(state["covariance"], dtype=np.float64)
        if mean.shape != self.mean.shape or covariance.shape != self.covariance.shape:
            raise ValueError(f"corrections of {mean.size} values, wanted {self.mean.size}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("corrections that are not finite")
        self.mean, self.covariance = mean, covariance
        self.noise, self.updates = float(state["noise"]), int(state["updates"])
