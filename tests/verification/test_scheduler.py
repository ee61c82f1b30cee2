"""The scheduler is Algorithm 1 to the letter, and only as clever as losslessness allows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dspark.verification import scheduler


def reference(survival, seconds, tokens, caps=None):
    """Algorithm 1 as the paper has it, in plain Python; returns lengths."""
    requests, width = survival.shape
    caps = [width] * requests if caps is None else list(caps)
    slots = [(-float(survival[r, j]), j, r) for r in range(requests) for j in range(min(width, caps[r]))]
    lengths = [0] * requests
    tau = float(tokens)
    best = tau / seconds[0]
    for taken, (negative, _, r) in enumerate(sorted(slots), start=1):
        tau -= negative
        theta = tau / seconds[taken]
        if theta <= best:
            break
        best = theta
        lengths[r] += 1
    return lengths


def exhaustive(survival, seconds, tokens):
    """Best throughput over all length vectors."""
    requests, width = survival.shape
    total = np.concatenate([np.zeros((requests, 1)), np.cumsum(survival.astype(np.float64), axis=1)], axis=1)
    return max(
        (tokens + sum(total[r, n] for r, n in enumerate(lengths))) / seconds[sum(lengths)]
        for lengths in itertools.product(range(width + 1), repeat=requests)
    )


@st.composite
def batches(draw, most=12, width=7):
    """Survivals with many ties, increasing times with flat parts and jumps, caps."""
    requests = draw(st.integers(1, most))
    width = draw(st.integers(1, width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 4, 1000]))
    confidences = np.rint(rng.random((requests, width)) * levels) / levels
    survival = np.cumprod(confidences, axis=1).astype(np.float32)
    jumps = rng.random(requests * width) * rng.integers(0, 2, requests * width) * draw(st.sampled_from([0.0, 0.2, 1.0]))
    seconds = 1.0 + np.concatenate([[0.0], np.cumsum(jumps)]) / requests
    caps = rng.integers(0, width + 1, requests) if draw(st.booleans()) else None
    return survival, seconds, caps


@settings(max_examples=150, deadline=None)
@given(batches())
def test_synchronous_is_the_reference_with_its_tie_rules(batch):
    survival, seconds, caps = batch
    found = scheduler.synchronous(survival, seconds, len(survival), caps)
    assert found.tolist() == reference(survival, seconds, len(survival), caps)


@settings(max_examples=150, deadline=None)
@given(batches(most=1), st.integers(0, 9), st.sampled_from([0.0, 0.1, 0.5, np.inf]))
def test_a_lone_request_is_walked_like_one_of_many(batch, floor_drafts, floor):
    """Beside one that may not draft it takes the general path."""
    survival, seconds, caps = batch
    caps = np.full(1, survival.shape[1]) if caps is None else caps
    alone = scheduler.synchronous(survival, seconds, 2, caps, floor, floor_drafts)
    twice, beside = np.concatenate([survival, survival]), np.append(caps, 0)
    assert alone.tolist() == scheduler.synchronous(twice, seconds, 2, beside, floor, floor_drafts)[:1].tolist()


@pytest.mark.parametrize("requests", [300, 1024])
@pytest.mark.parametrize("slope", [0.0, 0.3, 0.6, 1.5])
def test_large_batches_take_the_same_decision(requests, slope):
    """These go through the path that sorts the upper half first; survivals rounded so that ties cross every boundary."""
    rng = np.random.default_rng(requests)
    survival = np.cumprod(np.round(rng.beta(5, 1, (requests, 7)), 1), axis=1).astype(np.float32)
    seconds = 1.0 + slope * np.arange(requests * 7 + 1) / requests
    caps = rng.integers(0, 8, requests)
    for limit in (None, caps):
        found = scheduler.synchronous(survival, seconds, requests, limit)
        assert found.tolist() == reference(survival, seconds, requests, limit)


@settings(max_examples=40, deadline=None)
@given(batches(most=3, width=4))
def test_search_finds_the_best_of_all_length_vectors(batch):
    survival, seconds, _ = batch
    budget, _ = scheduler.search(survival, seconds, len(survival))
    assert budget.throughput == pytest.approx(exhaustive(survival, seconds, len(survival)))


@settings(max_examples=80, deadline=None)
@given(batches(), st.integers(0, 90))
def test_asynchronous_spends_the_budget_on_the_best_slots(batch, budget):
    survival, _, caps = batch
    requests, width = survival.shape
    lengths = scheduler.asynchronous(survival, budget, caps)
    limit = np.full(requests, width) if caps is None else caps
    assert (lengths <= limit).all()
    assert lengths.sum() == min(budget, limit.sum())
    slots = sorted((-float(survival[r, j]), j, r) for r in range(requests) for j in range(limit[r]))[:budget]
    assert lengths.tolist() == [sum(slot[2] == r for slot in slots) for r in range(requests)]


def test_early_stop_stays_before_a_cliff_and_a_stale_budget_crosses_it():
    survival = np.full((1, 4), 0.9, dtype=np.float32)
    seconds = np.array([1.0, 2.2, 2.2, 2.2, 2.2])
    assert scheduler.synchronous(survival, seconds, 1).tolist() == [0]
    floor = scheduler.carry(survival, seconds, 1, np.array([4]), exact=True)
    assert scheduler.synchronous(survival, seconds, 1, None, *floor).tolist() == [4]


def test_carry_leaves_convex_costs_to_the_walk():
    survival = np.cumprod(np.full((3, 5), 0.8), axis=1).astype(np.float32)
    seconds = 1.0 + 0.05 * np.arange(16.0)
    assert scheduler.carry(survival, seconds, 3, np.full(3, 5), exact=True) == (np.inf, 0)


def draft_world(rng, trials):
    """One request, γ = 2. x1 ~ q over {0, 1} decides c2, as a drafter's confidence may; target p differs from q.

    Returns x1, survivals (trials, 2) and the acceptance of x1, all as speculative sampling defines them.
    """
    x1 = (rng.random(trials) < 0.5).astype(int)
    second = np.where(x1 == 1, 0.98, 0.05)
    accept = rng.random(trials) < np.minimum(1.0, np.array([0.6, 0.4])[x1] / 0.5)
    survival = np.stack([np.full(trials, 0.9), 0.9 * second], axis=1).astype(np.float32)
    return x1, survival, accept


SECONDS = np.array([1.0, 1.95, 1.95])  # one draft does not pay; two do, but only if the second is good


def first_tokens(decide, trials=20000):
    """The first token each trial emits when ``decide(survival)`` chooses how many drafts are verified; P(1) should be 0.4."""
    rng = np.random.default_rng(11)
    x1, survival, accept = draft_world(rng, trials)
    lengths = np.array([decide(row[None, :]) for row in survival])
    fresh = (rng.random(trials) < 0.4).astype(int)  # not verified: the target samples from p
    residual = np.zeros(trials, dtype=int)  # norm(max(p - q, 0)) puts everything on 0
    return np.where(lengths > 0, np.where(accept, x1, residual), fresh)


def chi_square(tokens):
    ones = int(tokens.sum())
    expected = 0.4 * tokens.size
    return (ones - expected) ** 2 / (expected * 0.6)


def test_walk_keeps_the_distribution_and_searching_past_the_stop_does_not():
    """The paper's appendix A in small: verifying x1 because c2, which x1 decides, is high prefers one x1 over the other."""
    honest = first_tokens(lambda a: int(scheduler.synchronous(a, SECONDS, 1)[0]))
    carried = first_tokens(lambda a: int(scheduler.synchronous(a, SECONDS, 1, None, 0.0, 2)[0]))
    leaking = first_tokens(lambda a: scheduler.search(a, SECONDS, 1)[0].drafts)
    assert chi_square(honest) < 10.8  # 0.1 %, one degree of freedom
    assert chi_square(carried) < 10.8
    assert chi_square(leaking) > 100


@settings(max_examples=150, deadline=None)
@given(batches(), st.data())
def test_a_draft_is_admitted_without_looking_at_what_was_drafted_at_or_after_it(batch, data):
    """Change the survivals that x_{r,j} could have changed (r's after j): whether (r, j) is in must not change."""
    survival, seconds, caps = batch
    requests, width = survival.shape
    r, j = data.draw(st.integers(0, requests - 1)), data.draw(st.integers(0, width - 1))
    other = survival.copy()
    if j + 1 < width:
        shrink = data.draw(st.floats(0, 1))
        other[r, j + 1 :] = survival[r, j] * np.float32(shrink)
    floor = data.draw(st.sampled_from([(np.inf, 0), (0.0, 5), (0.4, 9)]))
    lengths = [scheduler.synchronous(a, seconds, requests, caps, *floor) for a in (survival, other)]
    assert (lengths[0][r] > j) == (lengths[1][r] > j)
    budget = data.draw(st.integers(0, requests * width))
    ranked = [scheduler.asynchronous(a, budget, caps) for a in (survival, other)]
    assert (ranked[0][r] > j) == (ranked[1][r] > j)


def test_the_check_above_catches_a_search_with_this_rounds_survivals():
    first = np.array([[0.9, 0.88]], dtype=np.float32)
    second = np.array([[0.9, 0.01]], dtype=np.float32)
    leaking = [scheduler.search(a, SECONDS, 1)[0].drafts > 0 for a in (first, second)]
    assert leaking == [True, False]


def test_nothing_to_schedule():
    empty = np.zeros((0, 7), dtype=np.float32)
    assert scheduler.synchronous(empty, np.array([1.0]), 0).shape == (0,)
    assert scheduler.asynchronous(np.ones((2, 3), dtype=np.float32), 0).tolist() == [0, 0]
    assert scheduler.synchronous(np.ones((2, 3), dtype=np.float32), np.ones(1), 2, np.zeros(2, dtype=int)).tolist() == [0, 0]
