"""What a round costs: a table profiled once, and its online correction.

Target step: t = staircase(tokens) + per_request·R + per_context·Σ ctx + per_token_context·Σ (tokens·ctx).
As soon as a step verifies drafts, however few, ``verifying`` and ``verifying_per_request`` come on top (rejection sampling).
Up to the largest captured size a step is padded to the next size in the table; above it the curve is interpolated. Drafting:
d(requests, context), the same shape over drafting requests. ``context_only`` is what keeps the drafter's K/V current in rounds
without drafts, ``overhead`` the rest of every step. All times in seconds, contexts in tokens.
(arXiv 2607.05147, section 3.3, profiles only SPS(tokens); the context terms are this package's.)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import storage
from vllm_dspark.verification.refine import Corrector
from vllm_dspark.verification.survival import Floats

KIND = "cost table"
_EVERY = 4  # of so many steps alike, one is learned from once enough have been


@dataclass(frozen=True)
class CostTable:
    """A profile. Curves are pairs of equally long tuples, sizes ascending and positive, seconds positive.

    Attributes:
        sizes, seconds: target step by tokens, without the context terms. captured: largest size that is padded to; 0: none is.
        per_request: seconds per request of a target step. per_context: seconds per context token of a target step.
        per_token_context: seconds per (token x context token of its request).
        verifying, verifying_per_request: seconds that verifying any drafts adds to a target step, and per request that drafted.
        draft_sizes, draft_seconds, draft_captured: drafting by requests. draft_per_context: seconds per context token.
        context_only: seconds per step without drafts. context_per_token: seconds per token whose context K/V is written.
        overhead: seconds of every step. label: where the numbers come from.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    draft_sizes: tuple[int, ...]
    draft_seconds: tuple[float, ...]
    captured: int = 0
    per_request: float = 0.0
    per_context: float = 0.0
    per_token_context: float = 0.0
    verifying: float = 0.0
    verifying_per_request: float = 0.0
    draft_captured: int = 0
    draft_per_context: float = 0.0
    context_only: float = 0.0
    context_per_token: float = 0.0
    overhead: float = 0.0
    label: str = ""

    def __post_init__(self) -> None:
        _check_curve("target", self.sizes, self.seconds)
        _check_curve("draft", self.draft_sizes, self.draft_seconds)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"cost table: {field.name} is {value!r}; wanted a finite number ≥ 0")

    def target_curve(self, limit: int) -> Floats:
        """Staircase for 0…limit tokens, ``(limit + 1,)`` seconds."""
        return _staircase(self.sizes, self.seconds, self.captured, limit)

    def draft_curve(self, limit: int) -> Floats:
        """Seconds of drafting for 0…limit requests, ``(limit + 1,)``; 0 for none."""
        curve = _staircase(self.draft_sizes, self.draft_seconds, self.draft_captured, limit)
        curve[0] = 0.0
        return curve

    def save(self, path: str | Path, key: Mapping[str, Any]) -> None:
        """Write atomically, with everything the numbers depend on as ``key``."""
        storage.save(path, KIND, asdict(self), key)

    @classmethod
    def load(cls, path: str | Path, key: Mapping[str, Any] | None = None) -> "CostTable | None":
        """Read a table made for this key (any, if None); None if there is none, with one warning if it is unusable."""
        content = storage.load(path, KIND, key)
        if content is None:
            return None
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content.items()}
            return cls(**values)
        except (TypeError, ValueError) as error:
            storage.logger.warning("ignoring %s: %s", path, error)
            return None


def _check_curve(name: str, sizes: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    xs, ys = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if xs.ndim != 1 or xs.size == 0 or xs.shape != ys.shape:
        raise ValueError(f"cost table: {name} has {xs.size} sizes and {ys.size} times; wanted as many, at least one")
    if not (xs[0] >= 1 and (np.diff(xs) > 0).all()):
        raise ValueError(f"cost table: {name} sizes must ascend from 1 or more, found {list(sizes)}")
    if not (np.isfinite(ys).all() and (ys > 0).all()):
        raise ValueError(f"cost table: {name} times must be positive and finite, found {list(seconds)}")


def _staircase(sizes: tuple[int, ...], seconds: tuple[float, ...], captured: int, limit: int) -> Floats:
    """Padded to the next size up to ``captured``, interpolated above it, last slope beyond the last size."""
    xs, ys = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    values = np.arange(limit + 1)
    curve = ys[np.minimum(np.searchsorted(xs, values), xs.size - 1)]
    smooth = values > captured
    above = xs > captured
    if above.any():  # never blended with a size below: leaving the captured graphs is a jump
        curve[smooth] = np.interp(values[smooth], xs[above], ys[above])
    beyond = values > xs[-1]
    if xs.size > 1 and beyond.any():
        slope = max((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]), 0.0)
        curve[beyond] = ys[-1] + slope * (values[beyond] - xs[-1])
    return curve


@dataclass(frozen=True)
class StepTiming:
    """One measured step.

    Attributes:
        tokens: tokens the target ran on. requests: requests in the step. context: Σ context tokens of them.
        target_seconds: everything of the step but drafting. token_context: Σ tokens·context; None: evenly spread.
        drafted: requests in the block forward; 0: none ran. draft_context: Σ context tokens of those.
        draft_seconds: block forward and sequential stage together. late_seconds: and before them, context of earlier steps that
            was written only because somebody drafts.
    """

    tokens: int
    requests: int
    context: float
    target_seconds: float
    token_context: float | None = None
    drafted: int = 0
    draft_context: float = 0.0
    draft_seconds: float = 0.0
    late_seconds: float = 0.0


def next_size(tokens: NDArray[np.int64] | np.int64) -> NDArray[np.int64] | np.int64:
    """The next size, of eight to each power of two.

    CPU libraries prepare every new size of a matrix product, which can take as long as the product, and keep a bounded number.
    """
    steps = 1 << np.maximum(np.log2(np.maximum(tokens - 1, 1)).astype(np.int64) - 3, 0)
    return -(-tokens // steps) * steps


class CostModel:
    """A table with its online correction; every time it returns is in seconds and corrected."""

    def __init__(self, table: CostTable, max_tokens: int, max_requests: int, refresh: int = 8, few_sizes: bool = False) -> None:
        """Begin with the table as it is.

        Args:
            max_tokens, max_requests: largest step. refresh: measured steps between rebuilds of the corrected curves.
            few_sizes: steps that verify drafts had better come in few sizes, see :func:`next_size`.
        """
        self.table, self.few_sizes = table, few_sizes
        self.max_tokens, self.max_requests, self.refresh = max_tokens, max_requests, refresh
        self.target = Corrector(max_tokens)
        self.draft = Corrector(max_requests)
        self._base = table.target_curve(max_tokens)
        self._draft_base = table.draft_curve(max_requests)
        self._age = self._idle = 0
        self._drafted = False
        self._rebuild()

    def _rebuild(self) -> None:
        self._age = 0
        self._built = self.target.mean, self.draft.mean
        self._target = self._base * self.target.factors(np.arange(self._base.size))
        self._draft = self._draft_base * self.draft.factors(np.arange(self._draft_base.size))
        self._context = self.target.context_factor
        self._draft_context = self.draft.context_factor

    def curve(self, tokens: int, drafts: int, requests: int, context: float, mean_context: float | None = None) -> Floats:
        """Target step by drafts verified: ``(drafts + 1,)`` seconds for tokens, tokens + 1, …

        Args:
            tokens: tokens without drafts. context: Σ context of the requests. mean_context: of the drafting requests.
        """
        stop = tokens + drafts
        self.reserve(stop)
        return np.asarray(self._target[tokens : stop + 1] + self._flat(tokens, drafts, requests, context, mean_context))

    def at(self, tokens: Floats | float, requests: int, context: float, token_context: Floats | float) -> Floats:
        """Target step for fractional token counts, any shape; between whole counts it is interpolated."""
        most = self._target.size - 2
        low = min(int(tokens), most) if isinstance(tokens, float) else np.minimum(tokens.astype(np.int64), most)
        stairs = self._target[low] + (tokens - low) * (self._target[low + 1] - self._target[low])
        t = self.table
        extra = t.per_request * requests + self._context * t.per_context * context + t.overhead
        seconds: Floats = stairs + (extra + self._context * t.per_token_context * token_context)
        return seconds

    def _flat(self, tokens: int, drafts: int, requests: int, context: float, mean: float | None) -> Floats | float:
        t = self.table
        mean = context / max(requests, 1) if mean is None else mean
        fixed = t.per_request * requests + t.overhead
        fixed += self._context * (t.per_context * context + t.per_token_context * tokens * context / max(requests, 1))
        if t.per_token_context == 0.0:
            return fixed
        return np.asarray(fixed + self._context * t.per_token_context * mean * np.arange(drafts + 1))

    def reserve(self, tokens: int) -> None:
        """Make room for steps of this many tokens."""
        if tokens >= self._target.size:
            self._base = self.table.target_curve(2 * tokens)
            self._rebuild()

    def drafting(self, requests: NDArray[np.integer] | int, context: NDArray[np.floating] | float) -> Floats:
        """What it adds to a round that this many requests draft, with this much context in total; 0 for none.

        The draft pass, and what verifying takes however few drafts there are.
        """
        most = self._draft.size - 1
        counts = min(requests, most) if isinstance(requests, int) else np.minimum(requests, most)
        extra: Any = self._draft_context * self.table.draft_per_context * context
        seconds: Floats = self._draft[counts] + extra + self._verifying(requests)
        return seconds

    def _verifying(self, requests: NDArray[np.integer] | int) -> Any:
        return self.table.verifying * (requests > 0) + self.table.verifying_per_request * requests

    def upkeep(self, tokens: float) -> float:
        """Keeping the drafter's context K/V current for one step without drafts."""
        return self.table.context_only + self.table.context_per_token * tokens

    def step(self, timing: StepTiming) -> tuple[float, float]:
        """Predicted (target, draft) seconds of a step, corrected."""
        spread = timing.context / max(timing.requests, 1) * timing.tokens
        token_context = spread if timing.token_context is None else timing.token_context
        target = float(self.at(float(timing.tokens), timing.requests, timing.context, token_context))
        verifying = float(self._verifying(timing.drafted))
        if not timing.drafted:
            return target + self.upkeep(timing.tokens), 0.0
        return target + verifying, float(self.drafting(timing.drafted, timing.draft_context)) - verifying

    def wants(self, timing: StepTiming) -> bool:
        """Whether this step is worth learning from: every one at first, of many alike only some later."""
        side = self.draft if timing.drafted else self.target
        self._idle += 1
        return side.updates < 2 * self.refresh or self._idle >= _EVERY or bool(timing.drafted) != self._drafted

    def observe(self, timing: StepTiming) -> bool:
        """Refine from a measured step; False if it was ignored (impossible, a stall or a compilation)."""
        if timing.tokens < 1 or not timing.target_seconds > 0 or timing.tokens >= self._target.size:
            return False
        target, draft = self.step(timing)
        self._idle, self._drafted = 0, bool(timing.drafted)
        row = self.target_row(timing, target)
        ahead = float(row @ (self.target.mean - self._built[0]))  # learned since the curves were built
        used = self.target.update(row, math.log(timing.target_seconds / target) - ahead)
        if timing.drafted and timing.draft_seconds > 0 and draft > 0:
            row = self.draft_row(timing, draft)
            ahead = float(row @ (self.draft.mean - self._built[1]))
            used &= self.draft.update(row, math.log(timing.draft_seconds / draft) - ahead)
        self._age += 1
        if not used:
            self._idle = _EVERY  # a stall, or a new regime that the next step confirms
        young = min(self.target.updates, self.draft.updates if timing.drafted else self.refresh) < self.refresh
        if young or self._age >= self.refresh:
            self._rebuild()
        return used

    def shared_error(self, timing: StepTiming, tokens: int) -> float:
        """What a measured step says about one of ``tokens`` without drafts: the expected error (log) of its prediction.

        While little is known, most of an error is the machine's, whatever the step; later every size stands for itself.
        """
        target, draft = self.step(timing)
        row = self.target_row(timing, target)
        return self.target.shared(
            row, self.target.weights(tokens), math.log((timing.target_seconds + timing.draft_seconds) / (target + draft))
        )

    def target_row(self, timing: StepTiming, seconds: float) -> Floats:
        """Row of the target's correction for a step that takes ``seconds`` (see :meth:`Corrector.weights`)."""
        t = self.table
        spread = timing.context / max(timing.requests, 1) * timing.tokens
        token_context = spread if timing.token_context is None else timing.token_context
        share = self._context * (t.per_context * timing.context + t.per_token_context * token_context) / seconds
        return self.target.weights(timing.tokens, min(share, 1.0))

    def draft_row(self, timing: StepTiming, seconds: float) -> Floats:
        """Row of the draft's correction."""
        share = self._draft_context * self.table.draft_per_context * timing.draft_context / seconds if seconds > 0 else 0.0
        return self.draft.weights(timing.drafted, min(share, 1.0))

    def state(self) -> dict[str, Any]:
        """The corrections, for :meth:`load_state`."""
        return {"target": self.target.state(), "draft": self.draft.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from saved corrections.

        Raises:
            KeyError, ValueError: they do not belong to a model of these sizes.
        """
        self.target.load_state(state["target"])
        self.draft.load_state(state["draft"])
        self._rebuild()
