"""Online STS: temperatures learned from the rounds that are served (arXiv 2607.05147, section 3.2, made streaming).

The offline search minimises an ECE, which a few thousand rounds do not know well enough: it would follow their noise. Online
the likelihood of the outcomes decides. It is proper, and since P(first k accepted) is the product of the conditional
probabilities, it falls apart by position: all that counts of position k is, for every logit, how many drafts that came so far
were judged there and how many were accepted. So no round is kept, only these counts, which halve with age. Logs of the
temperatures have a random walk over the positions as their prior, beginning at the initial temperatures: a position follows
its own evidence as far as there is some, and otherwise its neighbours.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_dspark.verification.survival import Floats, logit, sigmoid

SCHEMA = 2
_PAUSE = 32  # updates that are remembered together, and then a refit
_SPREAD = 0.1  # standard deviation of the walk's steps, log
_ITERATIONS, _STEP = 4, 0.7  # Newton steps of a refit, and the longest of them, log
_CLOSE = 0.003  # step, log, that ends a refit
_BOUNDS = (0.05, 20.0)  # temperatures, times the initial ones
_LEVELS: Floats = np.linspace(-12.0, 12.0, 97)  # logits; half a step changes a probability by at most 0.03, and evens out
_GAP = float(_LEVELS[1] - _LEVELS[0])


class OnlineSTS:
    """Streaming temperatures ``(γ,)``; deterministic, serialisable, of fixed size."""

    def __init__(
        self, width: int, initial: ArrayLike = 1.0, half_life: float = 4096.0, least: float = 200.0, per_update: int = 32
    ) -> None:
        """Begin with temperatures that hold until there is evidence.

        Args:
            width: γ. initial: temperatures from a file or config. half_life: rounds after which a round counts half.
            least: judged drafts (weighted) below which a position has no say. per_update: most rounds taken from one update,
                which bounds the time of the largest.
        """
        self.initial: Floats = np.broadcast_to(np.asarray(initial, dtype=np.float64), (width,)).copy()
        self.temperatures = self.initial.copy()
        self.half_life, self.least, self.per_update = half_life, least, per_update
        self._judged = np.zeros((width, _LEVELS.size))
        self._accepted = np.zeros((width, _LEVELS.size))
        self._waiting: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._updates = self._offset = 0
        walk = np.eye(width) - np.eye(width, k=-1)
        self._precision: Floats = walk.T @ walk / _SPREAD**2

    @property
    def width(self) -> int:
        """γ."""
        return int(self.temperatures.size)

    def observe(self, confidences: NDArray[np.floating], verified: ArrayLike, accepted: ArrayLike) -> None:
        """Learn from verified rounds, shaped as in :class:`calibration.Rounds`. Rounds that judged nothing are dropped."""
        self._waiting.append((np.asarray(confidences), np.asarray(verified), np.asarray(accepted)))
        self._updates += 1
        if len(self._waiting) >= _PAUSE:
            self._take()

    def tick(self) -> bool:
        """Once per update; refits if it is time to. True if a temperature changed."""
        if self._updates == 0 or self._updates % _PAUSE:
            return False
        before = self.temperatures
        return bool((self.refit() != before).any())

    def refit(self) -> Floats:
        """Refit every position now; returns the temperatures. A few Newton steps from those there are."""
        self._take()
        said = self._judged.sum(axis=1) >= self.least
        if not said.any():
            return self.temperatures
        judged, accepted = self._judged * said[:, None], self._accepted * said[:, None]
        u = np.log(self.temperatures / self.initial)
        for _ in range(_ITERATIONS):
            logits = _LEVELS / (self.initial * np.exp(u))[:, None]
            p = sigmoid(logits)
            slope = ((judged * p - accepted) * logits).sum(axis=1) - self._precision @ u
            curvature = self._precision + np.diag((judged * p * (1.0 - p) * logits**2).sum(axis=1))
            step = np.clip(np.linalg.solve(curvature, slope), -_STEP, _STEP)
            u = np.clip(u + step, *np.log(_BOUNDS))
            if np.abs(step).max() < _CLOSE:
                break
        self.temperatures = self.initial * np.exp(u)
        return self.temperatures

    def evidence(self) -> Floats:
        """Drafts judged at each position after all before them were accepted, older ones counting less, ``(γ,)``."""
        self._take()
        return np.asarray(self._judged.sum(axis=1))

    def _take(self) -> None:
        """Count the updates that wait."""
        if not self._waiting:
            return
        parts = [self._slice(*update) for update in self._waiting]
        self._waiting.clear()
        confidences, verified, accepted = (np.concatenate(column) for column in zip(*parts, strict=True))
        rows = np.flatnonzero((verified > 0) & np.isfinite(confidences).all(axis=1))
        positions = np.arange(self.width)
        verified, accepted = verified[rows, None], accepted[rows, None]
        counts = (positions < verified) & (positions <= accepted)
        levels = np.rint((np.clip(logit(confidences[rows]), _LEVELS[0], _LEVELS[-1]) - _LEVELS[0]) / _GAP).astype(np.int64)
        cells = levels + positions * _LEVELS.size
        kept = 2.0 ** (-rows.size / self.half_life)
        for table, which in ((self._judged, counts), (self._accepted, counts & (positions < accepted))):
            table *= kept
            table += np.bincount(cells[which], minlength=table.size).reshape(table.shape)

    def _slice(self, *update: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """At most ``per_update`` rounds of an update, others of the batch each time."""
        rows = update[1].size
        if rows <= self.per_update:
            return update
        self._offset = (self._offset + self.per_update) % rows
        chosen = (self._offset + np.arange(self.per_update)) % rows
        return tuple(part[chosen] for part in update)

    def state(self) -> dict[str, Any]:
        """JSON-ready state for :meth:`from_state`."""
        self._take()
        tables = {"judged": self._judged, "accepted": self._accepted}
        return {
            "schema": SCHEMA, "width": self.width, "temperatures": self.temperatures.tolist(), "initial": self.initial.tolist(),
            "half_life": self.half_life, "least": self.least,
            **{name: base64.b64encode(table.astype("<f4").tobytes()).decode() for name, table in tables.items()},
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
        made = cls(width, state["initial"], float(state["half_life"]), float(state["least"]))
        made.temperatures = np.asarray(state["temperatures"], dtype=np.float64)
        judged, accepted = (np.frombuffer(base64.b64decode(state[name]), dtype="<f4") for name in ("judged", "accepted"))
        scales = np.concatenate([made.initial, made.temperatures])
        fits = judged.size == accepted.size == made._judged.size and made.temperatures.shape == (width,)
        if not (fits and np.isfinite(judged).all() and (accepted >= 0).all() and (accepted <= judged).all()):
            raise ValueError("online calibration: the remembered counts do not fit together")
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise ValueError("online calibration: temperatures must be positive and finite")
        made._judged[:], made._accepted[:] = judged.reshape(width, -1), accepted.reshape(width, -1)
        return made
