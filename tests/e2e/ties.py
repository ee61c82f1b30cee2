"""Telling a broken tie from a wrong token."""

import math

from vllm_dspark.engine.session import Run


def bf16_ulp(value: float) -> float:
    """The distance between neighbouring bfloat16 numbers at ``value``."""
    return float(2.0 ** (math.floor(math.log2(abs(value))) - 7)) if value else 2.0**-133


def unexplained(expected: Run, found: list[list[int]], tokens: int) -> tuple[list[str], int]:
    """Where ``found`` leaves ``expected`` without a tie, as sentences, and how many requests left it at one.

    A tie: the token that was taken has a logit at most one bfloat16 ulp below the best. ``expected.top`` has a few of the
    best logits of each token.
    """
    assert expected.top is not None
    problems, ties = [], 0
    for request, (want, got, top) in enumerate(zip(expected.token_ids, found, expected.top, strict=True)):
        want = want[:tokens]
        if got == want:
            continue
        at = next((i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), None)
        if at is None or len(got) != len(want):
            problems.append(f"request {request}: {len(got)} tokens instead of {len(want)}")
            continue
        gap = abs(top[at][want[at]] - top[at].get(got[at], -math.inf))
        if gap <= bf16_ulp(top[at][want[at]]):
            ties += 1
        else:
            problems.append(f"request {request}, token {at}: {got[at]} instead of {want[at]}, logits {gap} apart")
    return problems, ties
