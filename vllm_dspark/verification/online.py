"""Online STS: temperatures learned from the rounds that are served (arXiv 2607.05147, section 3.2, made streaming).

The last rounds are kept in a ring, confidences as one byte of logit each, and one position is refitted at a time with weights
that halve with age: the offline search, but only near the temperature there is once one was found. A refit costs about half a
millisecond, comes at most once in 64 updates, and memory is bounded.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_dspark.verification.calibration import GRID, best_temperature
from vllm_dspark.verification.survival import Floats, logit, sigmoid

SCHEMA = 1
_PAUSE = 64  # updates between two refits
_GROWTH, _GROWTH_PAUSE = 1.5, 16  # and while the evidence for some position has grown by this factor since its last
_BATCH = 16  # updates that are remembered together
_NEAR = 4  # neighbours in the grid that are tried on each side
_LEVELS: Floats = np.linspace(-12.0, 12.0, 255)  # steps of 0.094 in logit: at most 0.012 in probability
_STEP = float(_LEVELS[1] - _LEVELS[0])


class OnlineSTS:
    """Streaming temperatures ``(γ,)``; deterministic, serialisable, (γ + 2) bytes per remembered round."""

    def __init__(
        self,
        width: int,
        initial: ArrayLike = 1.0,
        capacity: int = 2048,
        half_life: float = 2048.0,
        least: float = 200.0,
        per_update: int = 64,
    ) -> None:
        """Begin with temperatures that hold until there is evidence.

        Args:
            width: γ. initial: temperatures from a file or config. capacity: rounds remembered. half_life: rounds after which
                a round counts half. least: judged rounds (weighted) below which a position keeps its temperature.
            per_update: most rounds taken from one update, so that one large batch does not fill the memory.
        """
        self.temperatures: Floats = np.broadcast_to(np.asarray(initial, dtype=np.float64), (width,)).copy()
        self.capacity, self.half_life, self.least = capacity, half_life, least
        self.per_update = per_update
        self._bytes = np.zeros((capacity, width), dtype=np.uint8)
        self._verified = np.zeros(capacity, dtype=np.uint8)
        self._accepted = np.zeros(capacity, dtype=np.uint8)
        self.count = 0  # rounds in the ring, those it has forgotten included
        self._waiting: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._fitted = np.zeros(width)  # evidence at the last refit
        self._ticks = self._position = self._offset = 0

    @property
    def width(self) -> int:
        """γ."""
        return int(self.temperatures.size)

    def observe(self, confidences: NDArray[np.floating], verified: ArrayLike, accepted: ArrayLike) -> None:
        """Remember verified rounds; see :class:`calibration.Rounds` for the shapes. Rounds that judged nothing are dropped."""
        self._waiting.append((np.asarray(confidences), np.asarray(verified), np.asarray(accepted)))
        if len(self._waiting) >= _BATCH:
            self._take()

    def _take(self) -> None:
        """Write the updates that wait into the ring."""
        if not self._waiting:
            return
        parts = [self._slice(*update) for update in self._waiting]
        self._waiting.clear()
        confidences, judged, passed = (np.concatenate(column) for column in zip(*parts, strict=True))
        rows = np.flatnonzero((judged > 0) & np.isfinite(confidences).all(axis=1))[-self.capacity :]
        places = (self.count + np.arange(rows.size)) % self.capacity
        levels = np.rint((logit(confidences[rows]) - _LEVELS[0]) / _STEP)
        self._bytes[places] = np.clip(levels, 0, _LEVELS.size - 1).astype(np.uint8)
        self._verified[places] = judged[rows]
        self._accepted[places] = np.minimum(passed[rows], judged[rows])
        self.count += rows.size

    def _slice(self, *update: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """At most ``per_update`` rounds of an update, others of the batch each time."""
        rows = update[1].size
        if rows <= self.per_update:
            return update
        self._offset = (self._offset + self.per_update) % rows
        chosen = (self._offset + np.arange(self.per_update)) % rows
        return tuple(part[chosen] for part in update)

    def tick(self) -> bool:
        """Once per update; refits one position if it is time to. True if a temperature changed."""
        self._ticks += 1
        if self._ticks % _GROWTH_PAUSE:
            return False
        grown = self.evidence() / np.maximum(self._fitted, self.least / _GROWTH)
        position = int(grown.argmax())
        if grown[position] < _GROWTH:
            if self._ticks % _PAUSE:
                return False
            position = self._position = (self._position + 1) % self.width
        return self._refit(position)

    def refit(self) -> Floats:
        """Refit every position, left to right, now; returns the temperatures."""
        self._take()
        for position in range(self.width):
            self._refit(position)
        return self.temperatures

    def _refit(self, k: int) -> bool:
        filled = min(self.count, self.capacity)
        rows = np.flatnonzero(self._verified[:filled] > k)
        age = (self.count - 1 - rows) % self.capacity if filled == self.capacity else self.count - 1 - rows
        weights = np.exp2(-age / self.half_life)
        if weights.sum() < self.least:
            return False
        happened = self._accepted[rows] > k
        ahead = np.ones(rows.size)
        for i in range(k):
            ahead *= sigmoid(_LEVELS / self.temperatures[i])[self._bytes[rows, i]]
        grid = self._grid(k)
        candidates = sigmoid(_LEVELS[None, :] / grid[:, None])[:, self._bytes[rows, k]] * ahead
        best = best_temperature(candidates, happened, grid, weights)
        changed = best != self.temperatures[k]
        self.temperatures[k], self._fitted[k] = best, rows.size
        return bool(changed)

    def _grid(self, k: int) -> Floats:
        """Temperatures to try: all at first, then those around the one there is and a few everywhere."""
        if not self._fitted[k]:
            return GRID
        near = int(np.abs(GRID - self.temperatures[k]).argmin())
        index = np.arange(GRID.size)
        return GRID[(np.abs(index - near) <= _NEAR) | (index % (4 * _NEAR) == 0)]

    def evidence(self) -> NDArray[np.int64]:
        """Remembered rounds that judged each position, ``(γ,)``."""
        self._take()
        counts = np.bincount(self._verified[: min(self.count, self.capacity)], minlength=self.width + 1)
        return np.asarray(counts[::-1].cumsum()[::-1][1 : self.width + 1])

    def state(self) -> dict[str, Any]:
        """JSON-ready state for :meth:`from_state`."""
        self._take()
        filled = min(self.count, self.capacity)
        order = (self.count - filled + np.arange(filled)) % self.capacity
        parts = {"levels": self._bytes, "verified": self._verified, "accepted": self._accepted}
        packed = {name: base64.b64encode(part[order].tobytes()).decode() for name, part in parts.items()}
        return {
            "schema": SCHEMA, "width": self.width, "temperatures": self.temperatures.tolist(),
            "capacity": self.capacity, "half_life": self.half_life, "least": self.least, **packed,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "OnlineSTS":
        """Continue from :meth:`state`.

        Raises:
            ValueError: another schema, or parts that do not fit together.
        """
        if state.get("schema") != SCHEMA:
            raise ValueError(f"online calibration: found schema {state.get('schema')!r}, wanted {SCHEMA}")
        width = int(state["width"])
        made = cls(width, state["temperatures"], int(state["capacity"]), float(state["half_life"]), float(state["least"]))
        levels, verified, accepted = (
            np.frombuffer(base64.b64decode(state[name]), dtype=np.uint8) for name in ("levels", "verified", "accepted")
        )
        filled = verified.size
        if levels.size != filled * width or accepted.size != filled or filled > made.capacity:
            raise ValueError("online calibration: the remembered rounds do not fit together")
        made._bytes[:filled] = levels.reshape(filled, width)
        made._verified[:filled], made._accepted[:filled] = verified, accepted
        made.count = filled
        evidence = made.evidence()
        made._fitted = np.where(evidence >= made.least, evidence, 0)
        return made
