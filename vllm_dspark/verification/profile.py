"""A cost table from measured steps: lower quartiles per size, context terms by least squares, sizes made monotone."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vllm_dspark.verification.cost import CostTable, StepTiming
from vllm_dspark.verification.survival import Floats

_DISTURBED = 1.3  # median step of a shape over its fastest


def fit(
    samples: Iterable[StepTiming], captured: int = 0, draft_captured: int = 0, label: str = "", **fixed: float
) -> CostTable:
    """Fit a table to profile samples.

    Several samples of one shape count by their lower quartile: what disturbs a step makes it longer. The context terms need
    at least two contexts at some size; without them they are 0. Samples that drafted give the draft curve; target seconds of
    samples without drafts should not contain the upkeep of context K/V, which goes in as ``context_only=…``.

    Args:
        captured, draft_captured: largest padded sizes, in tokens and in requests. fixed: further fields of :class:`CostTable`.

    Raises:
        ValueError: no usable sample of the target, or of drafting.
    """
    good = [s for s in samples if s.tokens > 0 and np.isfinite(s.target_seconds) and s.target_seconds > 0]
    drafted = [s for s in good if s.drafted > 0 and np.isfinite(s.draft_seconds) and s.draft_seconds > 0]
    if not good or not drafted:
        raise ValueError(f"found {len(good)} target and {len(drafted)} draft samples; wanted at least one of each")
    mixed = len({round(s.context / max(s.requests, 1)) for s in good}) > 1  # else contexts are requests in other units
    rows = [
        (
            s.tokens, s.requests, float(s.drafted > 0), s.drafted,
            s.context if mixed else 0.0, _token_context(s) if mixed else 0.0, s.target_seconds,
        )
        for s in good
    ]  # fmt: skip
    sizes, seconds, slopes = _fit_curve(rows)
    names = ("per_request", "verifying", "verifying_per_request", "per_context", "per_token_context")
    draft_rows = [(s.drafted, s.draft_context if mixed else 0.0, s.draft_seconds) for s in drafted]
    draft_sizes, draft_seconds, (draft_per_context,) = _fit_curve(draft_rows)
    values: dict[str, Any] = {
        **dict(zip(names, slopes, strict=True)), "draft_per_context": draft_per_context, "label": label, **fixed,
    }  # fmt: skip
    return CostTable(
        sizes, seconds, draft_sizes, draft_seconds, captured=captured, draft_captured=draft_captured, **values
    )  # fmt: skip


def disturbed(samples: Iterable[StepTiming]) -> bool:
    """Whether most shapes took much longer than their fastest step half of the time: the machine was busy with other things."""
    shapes: defaultdict[tuple[float, ...], list[float]] = defaultdict(list)
    for s in samples:
        shapes[s.tokens, s.requests, s.drafted, s.context].append(s.target_seconds + s.draft_seconds)
    return bool(shapes) and float(np.median([np.median(times) / min(times) for times in shapes.values()])) > _DISTURBED


def _token_context(sample: StepTiming) -> float:
    if sample.token_context is not None:
        return sample.token_context
    return sample.tokens * sample.context / max(sample.requests, 1)


def _fit_curve(rows: Sequence[tuple[float, ...]]) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Curve over the first column and non-negative slopes of the ones between; the last column is the time."""
    terms = len(rows[0]) - 2
    shapes: defaultdict[tuple[float, ...], list[float]] = defaultdict(list)
    for row in rows:
        shapes[row[:-1]].append(row[-1])
    points = np.array([(*shape, float(np.quantile(times, 0.25))) for shape, times in sorted(shapes.items())])
    slopes = _slopes(points, terms)
    rest = points[:, -1] - points[:, 1 : 1 + terms] @ slopes
    sizes = np.unique(points[:, 0])
    weights = np.array([np.count_nonzero(points[:, 0] == size) for size in sizes], dtype=np.float64)
    medians = np.array([np.median(rest[points[:, 0] == size]) for size in sizes])
    curve = np.maximum(isotonic(medians, weights), 0.01 * points[:, -1].min())
    return tuple(int(size) for size in sizes), tuple(curve.tolist()), tuple(slopes.tolist())


def _slopes(points: Floats, terms: int) -> Floats:
    """Least squares within each size, so that the curve itself drops out; terms that come out negative are left out."""
    features, times = points[:, 1 : 1 + terms].copy(), points[:, -1].copy()
    for size in np.unique(points[:, 0]):
        group = points[:, 0] == size
        features[group] -= features[group].mean(axis=0)
        times[group] -= times[group].mean()
    keep = np.ptp(features, axis=0) > 0
    slopes = np.zeros(terms)
    while keep.any():
        scale = np.abs(features[:, keep]).max(axis=0)
        found, *_ = np.linalg.lstsq(features[:, keep] / scale, times, rcond=1e-9)
        slopes[:] = 0.0
        slopes[keep] = found / scale
        if (slopes >= 0).all():
            return slopes
        keep &= slopes > 0
    return np.zeros(terms)


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The nearest sequence that never falls (pool adjacent violators), weighted least squares."""
    means: list[float] = []
    mass: list[float] = []
    counts: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        means.append(value)
        mass.append(weight)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            total = mass[-2] + mass[-1]
            means[-2] = (means[-2] * mass[-2] + means[-1] * mass[-1]) / total
            mass[-2] = total
            counts[-2] += counts[-1]
            del means[-1], mass[-1], counts[-1]
    return np.repeat(means, counts)
