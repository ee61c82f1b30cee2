"""A round in which many draft though it does not pay, to learn who should: when, at what price, and what comes of it."""

import numpy as np
import pytest

from vllm_dspark.verification import traces
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming
from vllm_dspark.verification.history import yields
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import Outcomes, PolicyOptions, RoundInput
from vllm_dspark.verification.simulate import World, simulate

COSTS = CostTable((1, 4096), (0.010, 2.467), (1, 512), (0.004, 0.208))  # a draft is dear, a token costs 0.6 ms
NAMES = tuple("abcdefgh")
GOOD, BAD = 0.9, 0.3  # acceptance of their drafts: each half of the requests, and drafting for all just does not pay
WIDTH = 4


def make(differ=3.0, **options):
    """A policy that knows its fleet, by many rounds of requests that differ by this variance, but none of these requests."""
    policy = Policy(WIDTH, CostModel(COSTS, 4096, 512), PolicyOptions(**options))
    history = policy.history
    survival = np.mean([level ** np.arange(1.0, WIDTH + 1.0) for level in (GOOD, BAD)], axis=0)
    number, gain = yields(survival[None, :])
    history.fleet_number, history.fleet_gain, history.fleet_mean = number[0], gain[0], survival
    history.within, history.first, history.looked, history.drafted, history.fleet_weight = 0.3, differ, 50, 200, 192.0
    policy.probing.fleet_due = 1000
    policy.cost.target.covariance *= 1e-4  # step times are known
    policy.cost.draft.covariance *= 1e-4
    return policy


def forget(policy):
    """The same policy, that knows its requests as little as at first."""
    policy.finish(NAMES)
    fresh = make()
    policy.history.__dict__.update(fresh.history.__dict__)
    policy.probing.fleet_due = fresh.probing.fleet_due
    return policy


def begin(policy, names=NAMES):
    return policy.begin_round(RoundInput(names, np.full(len(names), 100)))


def draft(policy, late=0.0):
    """The first half of the requests are good ones."""
    rows = policy._plan.decision.rows
    acceptance = np.where(rows < 4, GOOD, BAD)[:, None] * np.ones(WIDTH)
    lengths = policy.lengths(acceptance)
    accepted = np.where(rows < 4, lengths, 0)
    policy.observe(Outcomes([NAMES[row] for row in rows], lengths, accepted))
    shape = StepTiming(8 + int(lengths.sum()), 8, 800.0, 1.0, None, rows.size, 100.0 * rows.size)
    target, drafting = CostModel(COSTS, 4096, 512).step(shape)
    policy.observe_step(
        StepTiming(shape.tokens, 8, 800.0, target, None, rows.size, 100.0 * rows.size, drafting, late_seconds=late)
    )


def test_new_requests_are_looked_at_where_they_differ_and_the_good_ones_go_on_drafting():
    policy = make()
    assert begin(policy).reason == "exploring"
    assert policy._plan.decision.rows.tolist() == list(range(8))
    draft(policy)
    decision = begin(policy)
    assert decision.reason == "pays"
    assert decision.rows.tolist() == [0, 1, 2, 3]


def test_nobody_is_looked_at_where_requests_are_alike():
    policy = make(differ=0.3)
    assert policy.history.spread == 0.0
    assert begin(policy).reason == "does not pay"
    assert policy.ledger.probing == 0.0


def test_who_was_looked_at_is_not_looked_at_again():
    policy = make()
    for name in NAMES:
        policy.add(name)
    history = policy.history
    history.weight[:8], history.number[:8], history.gain[:8] = 1.0, history.fleet_number, history.fleet_gain
    policy.probing.last[:8] = 0
    assert begin(policy).reason != "exploring"
    policy.probing.reset(0, 1)
    policy.probing.reset(1, 1)
    policy._standing.drop()
    assert policy.begin_round(RoundInput(NAMES, np.full(8, 100))).rows.tolist() == [0, 1]


def test_a_fleet_is_looked_at_whole_where_that_is_cheaper_than_a_probe_and_ever_more_rarely():
    policy = make(differ=0.3)
    policy.probing.fleet_due = 0
    looks = []
    for now in range(300):
        names = tuple(f"{now} {name}" for name in NAMES)  # others every time
        if begin(policy, names).reason == "exploring":
            assert policy._plan.stake < 0.004, "a probe of one would take more"
            looks.append(now)
        policy.finish(names)
        policy._standing.drop()
    assert np.diff(looks).tolist() == [2, 4, 8, 16, 32, 64, 64, 64]


@pytest.mark.parametrize("why", ["one request", "no credit", "losses", "surprises", "speed"])
def test_it_is_not_done_where_it_cannot_be_afforded(why):
    speed = 1.0 / 0.018 if why == "speed" else None  # a round without drafts takes 15 ms
    policy = make(min_tokens_per_second_per_request=speed)
    policy.ledger.begin(0.015)
    if why == "no credit":
        policy.ledger.credit = 0.0
    elif why == "losses":
        policy.ledger.balance = policy.ledger.limit
    elif why == "surprises":
        policy._exploring._surprise = policy.ledger.credit
    assert begin(policy, NAMES[:1] if why == "one request" else NAMES).reason != "exploring"


def test_a_look_is_charged_for_what_it_took_a_round_at_most_and_the_next_one_costs_as_much():
    policy = make()
    begin(policy)
    expected, round_off = policy._plan.stake, policy._plan.off_seconds
    assert policy.ledger.probing == pytest.approx(expected)
    assert expected > 0.0
    policy._feedback.judged = lambda *_: None  # what comes of it is as expected
    policy._yield.gained = lambda expected, accepted: expected
    draft(policy, late=0.008)
    assert expected < policy.ledger.probing <= round_off
    surprise = policy._exploring._surprise
    assert surprise == pytest.approx(0.3 * (policy.ledger.probing - expected))
    policy = forget(policy)
    before = policy.ledger.probing
    assert begin(policy).reason == "exploring"
    assert policy.ledger.probing - before == pytest.approx(policy._plan.stake)
    assert policy._plan.stake == pytest.approx(expected + surprise)
    draft(policy, late=1.0)
    assert policy.ledger.probing - before == pytest.approx(policy._plan.off_seconds)


def test_a_load_of_all_kinds_after_a_hopeless_one_is_found_out(monkeypatch):
    """Without looks it takes hundreds of rounds more."""
    kinds = ["prose"] * 96 + ["arithmetic", "prose"] * 200
    trace = traces.Trace(
        {"arithmetic": traces.domain(0.94, 0.90, spread=1.5), "prose": traces.domain(0.5, 0.4, spread=1.5)},
        tuple(traces.TracedRequest(0.0, 70, 40 + 5 * (index % 8), ((0, kind),)) for index, kind in enumerate(kinds)),
        overconfidence=1.3,
    )  # fmt: skip
    seconds = (0.0026, 0.0032, 0.0039, 0.0053, 0.0078, 0.0133, 0.0238)
    world = World(
        CostTable(
            (1, 16, 32, 64, 128, 256, 512),
            seconds,
            (1, 8, 16, 32),
            (0.0009, 0.0014, 0.0020, 0.0034),
            per_request=3e-5,
            per_context=3e-7,
            per_token_context=9e-8,
            verifying=4e-4,
            draft_per_context=2e-7,
        )
    )

    def gains():
        results = [simulate(trace, world, concurrency=32, rounds=600, seed=seed) for seed in range(3)]
        return [-result.regret("off") for result in results], [result.reasons.get("exploring", 0) for result in results]

    found, looks = gains()
    assert sum(looks) > 0
    monkeypatch.setattr("vllm_dspark.verification.exploring.Exploring.select", lambda *_: np.zeros(0, dtype=np.int64))
    without, looks = gains()
    assert max(looks) == 0
    assert np.mean(found) > np.mean(without) + 0.005, (found, without)
