"""Workloads for the simulator: who arrives when, with how much context, and how predictable its tokens are.

A request goes through segments, each of a domain; a domain gives the conditional acceptance of each draft position and how
much it varies from draft to draft. Confidences see that variation, sharpened by the trace's over-confidence and blurred by its
noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.verification import storage
from vllm_dspark.verification.survival import Floats, logit, sigmoid

KIND = "trace"


@dataclass(frozen=True)
class Domain:
    """Conditional acceptance by position, ``(γ,)`` in (0, 1), and its standard deviation in logits from draft to draft."""

    acceptance: tuple[float, ...]
    spread: float = 1.0


@dataclass(frozen=True)
class TracedRequest:
    """One request: arrival in seconds, context in tokens at the start, tokens to generate, and (first token, domain) pairs."""

    arrival: float
    context: int
    tokens: int
    segments: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Trace:
    """A workload.

    Attributes:
        domains: by name. requests: by arrival.
        overconfidence: temperature that would calibrate the confidences, one number for all positions.
        blur: standard deviation, in logits, of what confidences do not see.
        period: rounds after which every request changes to the next domain, whatever its segments say; 0: never.
        adversary: domain while the policy drafts, and domain while it does not.
    """

    domains: dict[str, Domain]
    requests: tuple[TracedRequest, ...]
    overconfidence: float = 1.5
    blur: float = 0.3
    period: int = 0
    adversary: tuple[str, str] | None = None

    @property
    def width(self) -> int:
        """γ."""
        return len(next(iter(self.domains.values())).acceptance)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        content = {
            "domains": {name: {"acceptance": d.acceptance, "spread": d.spread} for name, d in self.domains.items()},
            "requests": [[r.arrival, r.context, r.tokens, r.segments] for r in self.requests],
            "overconfidence": self.overconfidence, "blur": self.blur, "period": self.period, "adversary": self.adversary,
        }  # fmt: skip
        storage.save(path, KIND, content)

    @classmethod
    def load(cls, path: str | Path) -> "Trace | None":
        """Read a trace; None, with one warning unless it is absent, if it cannot be used."""
        content = storage.load(path, KIND)
        if content is None:
            return None
        try:
            return cls._from(content)
        except (KeyError, TypeError, ValueError) as error:
            storage.logger.warning("ignoring %s: %s", path, error)
            return None

    @classmethod
    def _from(cls, content: dict[str, Any]) -> "Trace":
        domains = {
            name: Domain(tuple(map(float, d["acceptance"])), float(d["spread"])) for name, d in content["domains"].items()
        }
        requests = tuple(
            TracedRequest(float(at), int(context), int(tokens), tuple((int(first), str(name)) for first, name in segments))
            for at, context, tokens, segments in content["requests"]
        )
        unknown = sorted({name for r in requests for _, name in r.segments} - domains.keys())
        if unknown or len({len(d.acceptance) for d in domains.values()}) != 1:
            raise ValueError(f"unknown domains {unknown}" if unknown else "domains of different γ")
        adversary = content.get("adversary")
        return cls(
            domains, requests, float(content["overconfidence"]), float(content["blur"]), int(content.get("period", 0)),
            (str(adversary[0]), str(adversary[1])) if adversary else None,
        )  # fmt: skip


def domain(first: float, last: float | None = None, width: int = 7, spread: float = 1.0) -> Domain:
    """Acceptance that goes evenly from ``first`` to ``last`` (default: the same) over the positions."""
    return Domain(tuple(np.linspace(first, first if last is None else last, width).tolist()), spread)


# Conditional acceptances that give about 6.2, 4.5, 2.8 and 1.6 tokens per round (bonus included) at γ = 7.
DOMAINS = {
    "records": domain(0.96, 0.93),
    "arithmetic": domain(0.88, 0.80),
    "code": domain(0.70, 0.55),
    "prose": domain(0.40, 0.25),
}


def synthetic(
    requests: int,
    names: Sequence[str] = ("records", "arithmetic", "code", "prose"),
    tokens: int = 256,
    context: tuple[int, int] = (128, 2048),
    rate: float | None = None,
    switch_every: int = 0,
    seed: int = 0,
    **options: Any,
) -> Trace:
    """Requests of mixed domains.

    Args:
        tokens: generated per request, on average. context: least and most, spread evenly in logarithm. rate: arrivals per
            second (Poisson); None: all at once. switch_every: tokens after which a request goes on to the next domain;
            0: never.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.zeros(requests) if rate is None else np.cumsum(rng.exponential(1.0 / rate, requests))
    contexts = np.exp(rng.uniform(np.log(context[0]), np.log(max(context)), requests)).astype(int)
    lengths = np.maximum(rng.poisson(tokens, requests), 1)
    made = []
    for index in range(requests):
        first = int(rng.integers(len(names)))
        starts = range(0, int(lengths[index]), switch_every) if switch_every else (0,)
        segments = tuple((start, names[(first + step) % len(names)]) for step, start in enumerate(starts))
        made.append(TracedRequest(float(arrivals[index]), int(contexts[index]), int(lengths[index]), segments))
    domains = {name: DOMAINS[name] for name in names} | options.pop("domains", {})
    return Trace(domains, tuple(made), **options)


class Drafter:
    """Draws what a drafter would: true acceptance, confidences and outcomes, deterministic in its seed."""

    def __init__(self, trace: Trace, seed: int) -> None:
        self.trace = trace
        self.names = list(trace.domains)
        self._logits = np.array([logit(d.acceptance) for d in trace.domains.values()])
        self._spread = np.array([d.spread for d in trace.domains.values()])
        self._rng = np.random.default_rng(seed)

    def draft(self, domains: NDArray[np.int64]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """For requests in these domains ``(R,)``: true conditional acceptance and confidences ``(R, γ)``, drafts that the
        target would accept in a row ``(R,)``."""
        shape = (domains.size, self._logits.shape[1])
        seen = self._logits[domains] + self._spread[domains, None] * self._rng.standard_normal(shape)
        hidden = self.trace.blur * self._rng.standard_normal(shape)
        acceptance = sigmoid(seen + hidden)
        confidences = sigmoid(self.trace.overconfidence * seen)
        accepted = np.cumprod(self._rng.random(shape) < acceptance, axis=1).sum(axis=1)
        return acceptance, confidences, accepted
