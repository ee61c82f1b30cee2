"""Survival: the probability that the first j drafts of a request are all accepted (arXiv 2607.05147, section 3.2)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Survival = NDArray[np.float32]

LOGIT_LIMIT = 30.0  # float64 still tells σ(±30) from 0 and 1; beyond it nothing measurable changes


def logit(confidences: ArrayLike) -> Floats:
    """log(c / (1 - c)), any shape, clipped to ±30; 0 and 1 are finite, NaN stays NaN."""
    values = np.asarray(confidences, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.minimum(np.maximum(np.log(values) - np.log1p(-values), -LOGIT_LIMIT), LOGIT_LIMIT))


def sigmoid(logits: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)), any shape, without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64))))


def calibrated(confidences: ArrayLike, temperatures: ArrayLike) -> Floats:
    """Conditional acceptance probabilities σ(logit(c) / t).

    Args:
        confidences: ``(n, γ)`` in [0, 1], c_j estimates P(draft j accepted | drafts before it accepted).
        temperatures: ``(γ,)`` or a scalar, all > 0; 1 leaves the confidences as they are.

    Raises:
        ValueError: a temperature is not a positive finite number.
    """
    scale = np.asarray(temperatures, dtype=np.float64)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"temperatures must be positive and finite, found {scale.tolist()}")
    if (scale == 1.0).all():
        return np.clip(np.asarray(confidences, dtype=np.float64), 0.0, 1.0)
    return sigmoid(logit(confidences) / scale)


def survival(confidences: ArrayLike, temperatures: ArrayLike = 1.0) -> Floats:
    """a_j = Π_{i≤j} σ(logit(c_i) / t_i), ``(n, γ)``; never rises along a row."""
    return np.asarray(np.cumprod(calibrated(confidences, temperatures), axis=-1), dtype=np.float64)


def usable(confidences: ArrayLike) -> NDArray[np.bool_]:
    """Rows of ``(n, γ)`` confidences that are all within [0, 1], as ``(n,)``; NaN is not."""
    values = np.asarray(confidences)
    return np.asarray(((values >= 0.0) & (values <= 1.0)).all(axis=-1))


def leading(confidences: ArrayLike) -> NDArray[np.int64]:
    """How many confidences of each row ``(n, γ)`` come before the first outside [0, 1], as ``(n,)``.

    Cutting there, and not dropping the row, keeps a decision about draft j free of what was drafted at or after j.
    """
    values = np.asarray(confidences)
    inside = (values >= 0.0) & (values <= 1.0)
    return np.asarray(np.logical_and.accumulate(inside, axis=-1).sum(axis=-1, dtype=np.int64))
