"""Calibration of confidences: sequential temperature scaling (STS) and its figures (arXiv 2607.05147, section 3.2).

Raw confidences are over-confident. Left to right one temperature per position is chosen that makes the survival
a_k = Π_{i≤k} σ(logit(c_i)/t_i) match how often the first k drafts are all accepted. A draft that was cut was never judged: it
is censored, not rejected, and neither counts for nor against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import storage
from vllm_dspark.verification.survival import Floats, logit, sigmoid, survival

KIND = "temperatures"
BINS = 20
GRID: Floats = np.geomspace(0.2, 8.0, 75)


@dataclass(frozen=True)
class Rounds:
    """Verified rounds.

    Attributes:
        confidences: raw, ``(n, γ)`` in [0, 1]. verified: drafts that were judged, ``(n,)``. accepted: how many of them the
            target accepted, ``(n,)``, at most ``verified``.
    """

    confidences: NDArray[np.floating]
    verified: NDArray[np.integer]
    accepted: NDArray[np.integer]

    def judged(self, position: int) -> NDArray[np.bool_]:
        """Rounds in which draft ``position`` (from 0) was verified; the others are censored there."""
        return np.asarray(self.verified > position)

    def survived(self, position: int) -> NDArray[np.bool_]:
        """Rounds in which the drafts up to and including ``position`` were all accepted."""
        return np.asarray(self.accepted > position)


def ece(predicted: Floats, happened: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error: |mean prediction - frequency| over equal-width bins, weighted by count; NaN if empty."""
    if predicted.size == 0:
        return float("nan")
    return float(_eces(predicted[None, :], happened, bins)[0])


def _eces(predicted: Floats, happened: NDArray[np.bool_], bins: int = BINS) -> Floats:
    """:func:`ece` of each row of ``(m, n)`` predictions."""
    rows = predicted.shape[0]
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1) + bins * np.arange(rows)[:, None]
    gaps = np.bincount(index.ravel(), (predicted - happened).ravel(), minlength=rows * bins)
    return np.asarray(np.abs(gaps).reshape(rows, bins).sum(axis=1) / happened.size)


def auroc(predicted: Floats, happened: NDArray[np.bool_]) -> float:
    """Probability that a survivor was given more than a non-survivor, ties half; NaN without both kinds."""
    positives = int(np.count_nonzero(happened))
    negatives = happened.size - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - 0.5 * (counts - 1)
    return float((ranks[inverse][happened].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def brier(predicted: Floats, happened: NDArray[np.bool_]) -> float:
    """Mean squared difference of prediction and outcome; NaN if empty."""
    return float(np.mean((predicted - happened) ** 2)) if predicted.size else float("nan")


@dataclass(frozen=True)
class Quality:
    """Figures of the survival at one position: rounds that judged it, ECE, AUROC, Brier score."""

    rounds: int
    ece: float
    auroc: float
    brier: float


def quality(rounds: Rounds, temperatures: Sequence[float] | Floats) -> list[Quality]:
    """Figures per position of confidences under these temperatures, censored rounds left out."""
    return figures(survival(rounds.confidences, np.asarray(temperatures)), rounds)


def figures(predicted: Floats, rounds: Rounds) -> list[Quality]:
    """Figures per position of predicted survivals ``(n, γ)``, censored rounds left out."""
    found = []
    for k in range(predicted.shape[1]):
        judged = rounds.judged(k)
        p, y = predicted[judged, k], rounds.survived(k)[judged]
        found.append(Quality(int(p.size), ece(p, y), auroc(p, y), brier(p, y)))
    return found


def fit(rounds: Rounds, grid: Floats = GRID, least: int = 50) -> Floats:
    """Offline STS: temperatures ``(γ,)``, by grid search per position, left to right, minimising the ECE of the survival.

    Positions judged in fewer than ``least`` rounds get the temperature of the position before them (the first: 1).
    """
    logits = logit(rounds.confidences)
    ahead = np.ones(logits.shape[0])
    temperatures = np.ones(logits.shape[1])
    for k in range(temperatures.size):
        judged = rounds.judged(k)
        if np.count_nonzero(judged) < least:
            temperatures[k:] = temperatures[k - 1] if k else 1.0
            break
        happened = rounds.survived(k)[judged]
        candidates = sigmoid(logits[judged, k][None, :] / grid[:, None]) * ahead[judged]
        temperatures[k] = best_temperature(candidates, happened, grid)
        ahead = ahead * sigmoid(logits[:, k] / temperatures[k])
    return temperatures


def best_temperature(candidates: Floats, happened: NDArray[np.bool_], grid: Floats) -> float:
    """The grid value with the least ECE.

    With few rounds the ECE jumps from one value to the next by more than it means; values within half a standard error of
    the least are told apart by their Brier score.

    Args:
        candidates: survival under each grid value, ``(grid, n)``. happened: ``(n,)``.
    """
    errors = _eces(candidates, happened)
    near = np.flatnonzero(errors <= errors.min() + 0.5 / np.sqrt(happened.size))
    scores = ((candidates[near] - happened) ** 2).mean(axis=1)
    return float(grid[near[int(np.argmin(scores))]])


def from_config(config: Mapping[str, Any], width: int) -> Floats | None:
    """Temperatures a checkpoint's config declares (``confidence_temperatures``: a number or γ of them), None if it has none.

    Raises:
        ValueError: they are not positive numbers, or not γ of them.
    """
    declared = config.get("confidence_temperatures")
    return None if declared is None else _checked(declared, width)


def save(path: str | Path, temperatures: Floats, key: Mapping[str, Any]) -> None:
    """Write temperatures with what they belong to (target, drafter, …) as ``key``."""
    storage.save(path, KIND, {"temperatures": temperatures.tolist()}, key)


def load(path: str | Path, width: int, key: Mapping[str, Any] | None = None) -> Floats | None:
    """Temperatures ``(γ,)`` of a file; None, with one warning unless it is absent, if it cannot be used."""
    content = storage.load(path, KIND, key)
    if content is None:
        return None
    try:
        return _checked(content.get("temperatures"), width)
    except ValueError as error:
        storage.logger.warning("ignoring %s: %s", path, error)
        return None


def _checked(values: Any, width: int) -> Floats:
    try:
        found = np.asarray(values, dtype=np.float64)
        found = np.broadcast_to(found, (width,)).copy()
    except (TypeError, ValueError):
        raise ValueError(f"wanted one or {width} temperatures, found {values!r}") from None
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise ValueError(f"temperatures must be positive and finite, found {values!r}")
    return found
