"""The policy decides from the past alone, keeps to its limits, explains itself and never crashes."""

import dataclasses
import json

import numpy as np
import pytest

from vllm_dspark.verification.choice import Choice, choose
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming, next_size
from vllm_dspark.verification.history import THRESHOLDS, History
from vllm_dspark.verification.plan import Load
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import DraftDecision, Outcomes, PolicyOptions, RoundInput
from vllm_dspark.verification.standing import Standing
from vllm_dspark.verification.survival import logit

FLAT = CostTable((1, 4096), (0.010, 0.0101), (1, 512), (0.002, 0.0021))
STEEP = CostTable((1, 4096), (0.001, 4.0), (1, 512), (0.002, 0.01))


def make(table=FLAT, width=4, **options):
    return Policy(width, CostModel(table, 4096, 512), PolicyOptions(**options))


def play(policy, rounds, confidence, names=("a", "b"), context=100, limits=None):
    """Rounds in which every draft is accepted with the probability its confidence states; returns the lengths of each."""
    rng = np.random.default_rng(5)
    table = policy.cost.table if policy.cost else FLAT
    truth = CostModel(table, 4096, 512)
    history = []
    for _ in range(rounds):
        decision = policy.begin_round(RoundInput(names, np.full(len(names), context), limits))
        lengths = np.zeros(len(names), dtype=int)
        if decision.drafting:
            confidences = np.full((decision.rows.size, policy.width), confidence)
            lengths[decision.rows] = policy.lengths(confidences)
        hits = np.cumprod(rng.random((len(names), policy.width)) < confidence, axis=1).sum(axis=1)
        accepted = np.minimum(hits, lengths)
        rows = decision.rows
        policy.observe(Outcomes([names[row] for row in rows], lengths[rows], accepted[rows]))
        shape = StepTiming(
            int(len(names) + lengths.sum()), len(names), len(names) * context, 1.0, None, rows.size, rows.size * context
        )
        target, draft = truth.step(shape)
        policy.observe_step(dataclasses.replace(shape, target_seconds=target, draft_seconds=draft))
        history.append(lengths)
    return np.array(history)


def test_drafts_everything_where_verifying_is_free_and_good():
    lengths = play(make(), 60, 0.9)
    assert (lengths[20:] == 4).mean() > 0.9


def test_drafts_nothing_where_verifying_costs_more_than_it_brings():
    policy = make(STEEP)
    lengths = play(policy, 500, 0.5, names=tuple("abcdefgh"))
    assert lengths[20:].mean() < 0.05
    assert policy.explain()["probing_share"] <= 0.01


def test_rests_where_it_would_decide_the_same_again():
    """Resting rounds are counted like all others, end by themselves, and are not for other requests or while drafting."""
    policy, names = make(STEEP), tuple("abcdefgh")
    play(policy, 300, 0.5, names=names)
    rested, before, elapsed = 0, policy.round, policy.ledger.elapsed
    for _ in range(200):
        if policy.rest(names):
            assert not policy.rest(tuple("xyz"))
            rested += 1
        else:
            play(policy, 1, 0.5, names=names)
    assert policy.round == before + 200
    assert 100 < rested < 195
    assert policy.ledger.elapsed - elapsed == pytest.approx(200 * policy.ledger.typical_round, rel=0.1)
    policy.add("a", policy="fixed")
    assert not policy.rest(names)
    drafting = make()
    play(drafting, 60, 0.9)
    assert not drafting.rest(("a", "b"))


def test_turns_off_when_acceptance_falls_and_on_when_it_returns():
    policy = make(CostTable((1, 4096), (0.010, 0.5), (1, 512), (0.004, 0.0041)))
    on = play(policy, 60, 0.9)
    off = play(policy, 200, 0.02)
    again = play(policy, 300, 0.9)
    assert on[20:].mean() > 2
    assert off[60:].mean() < 0.2
    assert again[-100:].mean() > 2


@pytest.mark.parametrize("users", [1, 8, 32])
def test_new_requests_are_looked_at_soon_however_long_nothing_was_drafted(users):
    """Twenty generations of hopeless requests, then good ones; a draft pass costs 0.4 of a step, a request lasts 90 rounds."""
    policy = make(CostTable((1, 8, 32, 256), (0.010, 0.0145, 0.020, 0.054), (1, 8, 32), (0.004, 0.007, 0.014)), width=7)
    for generation in range(20):
        play(policy, 90, 0.05, names=tuple(f"{generation}-{user}" for user in range(users)))
    assert policy.explain()["probing_share"] <= 0.01
    again = play(policy, 100, 0.9, names=tuple(f"new-{user}" for user in range(users)))
    assert (again[50:].sum(axis=1) > 2 * users).mean() > 0.9


def test_long_context_turns_drafting_off_and_short_context_on():
    table = dataclasses.replace(FLAT, per_token_context=1e-7)
    policy = make(table)
    short = play(policy, 40, 0.8, names=("s", "t"), context=100)
    long = play(policy, 80, 0.8, names=("u", "v"), context=128_000)
    back = play(policy, 40, 0.8, names=("w", "x"), context=100)
    assert short[20:].mean() > 2
    assert long[20:].mean() < 0.3
    assert back[20:].mean() > 2


def test_only_requests_that_pay_draft():
    """Half the requests are hopeless and drafting them costs; the good ones go on."""
    table = CostTable((1, 64), (0.010, 0.05), (1, 64), (0.001, 0.02))
    policy = make(table)
    truth = CostModel(table, 4096, 512)
    names = tuple(f"{kind}{i}" for i in range(8) for kind in "gb")
    good = np.array([name[0] == "g" for name in names])
    rng = np.random.default_rng(0)
    share = np.zeros(2)
    for step in range(120):
        decision = policy.begin_round(RoundInput(names, np.full(16, 10)))
        rows, lengths = decision.rows, np.zeros(16, dtype=int)
        chance = np.where(good, 0.92, 0.05)
        if decision.drafting:
            lengths[rows] = policy.lengths(np.repeat(chance[rows, None], 4, axis=1))
        accepted = np.minimum(np.cumprod(rng.random((16, 4)) < chance[:, None], axis=1).sum(axis=1), lengths)
        policy.observe(Outcomes([names[row] for row in rows], lengths[rows], accepted[rows]))
        shape = StepTiming(int(16 + lengths.sum()), 16, 160.0, 1.0, None, rows.size, rows.size * 10.0)
        target, draft = truth.step(shape)
        policy.observe_step(dataclasses.replace(shape, target_seconds=target, draft_seconds=draft))
        if step >= 40:
            share += [np.isin(rows, np.flatnonzero(good)).sum(), np.isin(rows, np.flatnonzero(~good)).sum()]
    assert share[0] > 0.9 * 80 * 8
    assert share[1] < 0.1 * 80 * 8


def test_fixed_and_off():
    assert (play(make(policy="fixed", fixed_drafts=3), 5, 0.1) == 3).all()
    assert (play(make(STEEP, policy="fixed"), 5, 0.1) == 4).all()
    assert (play(make(policy="off"), 5, 0.9) == 0).all()


def test_per_request_limits_and_policies_side_by_side():
    policy = make()
    policy.add("off", policy="off")
    policy.add("zero", max_draft_tokens=0)
    policy.add("fixed", policy="fixed")
    policy.add("two", max_draft_tokens=2)
    lengths = play(policy, 60, 0.95, names=("off", "zero", "fixed", "two", "free"))[20:]
    assert (lengths[:, :2] == 0).all()
    assert (lengths[:, 2] == 4).all()
    assert lengths[:, 3].max() == 2
    assert lengths[:, 4].mean() > 3.5


def test_limits_of_the_round_are_kept():
    lengths = play(make(), 30, 0.95, limits=np.array([0, 1]))
    assert (lengths[:, 0] == 0).all()
    assert lengths[:, 1].max() == 1


@pytest.mark.parametrize(
    ("arguments", "says"), [({"max_draft_tokens": -1}, "0 or more, found -1"), ({"policy": "most"}, "found 'most'")]
)
def test_bad_request_values_are_refused_and_change_nothing(arguments, says):
    policy = make()
    with pytest.raises(ValueError, match=says):
        policy.add("x", **arguments)
    assert len(policy.requests) == 0


def test_speed_objective_bounds_the_step():
    """Verifying for half of the requests pays in throughput but slows the other half, which do not draft."""
    table = CostTable((64, 320), (0.014, 0.035), (1, 64), (0.001, 0.001))
    names = tuple(f"r{i}" for i in range(64))
    sums = []
    for speed in (None, 60.0, 50.0, 1000.0):
        policy = make(table, min_tokens_per_second_per_request=speed)
        for name in names[:32]:
            policy.add(name, policy="off")
        sums.append(play(policy, 60, 0.9, names=names)[40:].sum(axis=1))
    free, tight, loose, hopeless = sums
    seconds = CostModel(table, 4096, 512).curve(64, 256, 64, 6400.0) + 0.001
    assert seconds[int(free.min())] > 1 / 50.0
    assert seconds[int(tight.max())] <= 1 / 60.0 * 1.02  # the policy's own estimate of the time is what it keeps to
    assert seconds[int(loose.max())] <= 1 / 50.0 * 1.02
    assert tight.max() < loose.max()
    assert hopeless.min() == free.min()  # a speed that not drafting misses as well cannot be kept


def test_nan_confidences_are_no_drafts_from_there_on():
    policy = make(policy="fixed")
    decision = policy.begin_round(RoundInput(("a", "b", "c"), np.full(3, 10)))
    assert decision.rows.tolist() == [0, 1, 2]
    confidences = np.full((3, 4), 0.9)
    confidences[0, 2] = np.nan
    confidences[1, 0] = np.inf
    assert policy.lengths(confidences).tolist() == [2, 0, 4]
    assert policy.counters["rows with unusable confidences"] == 2
    policy.observe(Outcomes(("a", "b", "c"), np.array([2, 0, 4]), np.array([1, 0, 4])))
    assert np.isfinite(policy.history.positions).all()


def test_without_a_confidence_head_acceptance_is_learned_from_outcomes():
    policy = make(CostTable((1, 4096), (0.010, 0.5), (1, 512), (0.004, 0.0041)))
    truth = CostModel(policy.cost.table, 4096, 512)
    rng = np.random.default_rng(0)

    def run(rounds, chance):
        drafted = 0
        for _ in range(rounds):
            rows = policy.begin_round(RoundInput(("a", "b"), np.full(2, 10))).rows
            lengths = policy.lengths(None) if rows.size else np.zeros(0, dtype=int)
            accepted = np.minimum(np.cumprod(rng.random((rows.size, 4)) < chance, axis=1).sum(axis=1), lengths)
            policy.observe(Outcomes([("a", "b")[row] for row in rows], lengths, accepted))
            shape = StepTiming(int(2 + lengths.sum()), 2, 20.0, 1.0, None, rows.size, rows.size * 10.0)
            target, draft = truth.step(shape)
            policy.observe_step(dataclasses.replace(shape, target_seconds=target, draft_seconds=draft))
            drafted += rows.size
        return drafted / (2 * rounds)

    assert run(60, 0.9) > 0.8
    run(60, 0.02)
    assert run(60, 0.02) < 0.1


@pytest.mark.parametrize("fallback", ["off", "fixed"])
def test_absurd_costs_fall_back_with_one_warning(caplog, fallback):
    policy = make(fallback=fallback)
    policy.cost.at = lambda *_: np.float64(np.nan)
    lengths = play(policy, 3, 0.9)
    assert policy.failure
    assert (lengths == (4 if fallback == "fixed" else 0)).all()
    assert len(caplog.records) == 1
    assert policy.explain()["failure"]


def test_without_costs_an_adaptive_policy_is_the_fallback(caplog):
    policy = Policy(4, None, PolicyOptions(fallback="fixed", fixed_drafts=2))
    assert (play(policy, 3, 0.9) == 2).all()
    assert len(caplog.records) == 1


def test_same_calls_give_the_same_answers():
    first, second = make(), make()
    assert (play(first, 50, 0.6) == play(second, 50, 0.6)).all()
    assert first.explain() == second.explain()


def test_explain_is_json_and_names_what_was_compared():
    policy = make()
    play(policy, 5, 0.9)
    told = json.loads(json.dumps(policy.explain()))
    assert told["throughput_best"] > told["throughput_off"] > 0
    assert {"reason", "gain", "margin", "deviation", "balance_seconds", "probing_share", "temperatures"} <= told.keys()


def test_a_new_request_starts_from_the_fleet():
    policy = make(CostTable((1, 4096), (0.010, 0.5), (1, 512), (0.004, 0.0041)))
    play(policy, 120, 0.02, names=tuple(f"r{user}" for user in range(24)))
    decision = policy.begin_round(RoundInput(("new",), np.array([10])))
    assert decision.probes.all()  # at most looked at, on the probing account
    assert policy.explain()["gain"] < 0


def test_state_carries_over_a_restart(caplog):
    policy = make(CostTable((1, 4096), (0.010, 0.5), (1, 512), (0.004, 0.0041)))
    play(policy, 120, 0.02, names=tuple(f"r{user}" for user in range(24)))
    fresh = make(policy.cost.table)
    assert fresh.load_state(json.loads(json.dumps(policy.state())))
    assert fresh.begin_round(RoundInput(("new",), np.array([10]))).probes.all()
    assert fresh.explain()["gain"] < 0
    other = make(width=7)
    assert not other.load_state(policy.state())
    assert len(caplog.records) == 1
    assert (play(other, 3, 0.9).shape) == (3, 2)


def test_requests_that_are_never_finished_make_room():
    policy = make(policy="off")
    for step in range(1100):
        policy.begin_round(RoundInput((f"r{step}",), np.array([10])))
    assert len(policy.requests) < 600
    policy.finish(["r1099", "unknown"])


def test_who_drafts_is_settled_before_anything_is_drafted():
    """Whatever the confidences of earlier rounds were worth, this round's cannot change who drafts or what verifying costs."""
    policies = [make(STEEP), make(STEEP)]
    for policy in policies:
        play(policy, 30, 0.9)
    first, second = (p.begin_round(RoundInput(("a", "b"), np.full(2, 100))) for p in policies)
    plans = [p._plan for p in policies]
    assert first.rows.tolist() == second.rows.tolist()
    before = [(plan.floor, plan.time_limit, plan.draft_seconds) for plan in plans]
    if first.drafting:
        policies[0].lengths(np.full((first.rows.size, 4), 0.99))
        policies[1].lengths(np.full((first.rows.size, 4), 0.01))
    assert before == [(plan.floor, plan.time_limit, plan.draft_seconds) for plan in plans]
    assert before[0] == before[1]


def admitted_despite_changes(decide, width=4, requests=3):
    """Cases in which changing confidences behind (r, j) changed whether (r, j) is verified."""
    rng = np.random.default_rng(1)
    changed = 0
    for _ in range(200):
        confidences = rng.random((requests, width)) ** 0.3
        r, j = int(rng.integers(requests)), int(rng.integers(width - 1))
        other = confidences.copy()
        other[r, j + 1 :] = rng.random(width - j - 1)
        changed += (decide(confidences)[r] > j) != (decide(other)[r] > j)
    return changed


def test_lengths_do_not_look_ahead_and_a_mutation_that_does_is_caught():
    names = ("a", "b", "c")
    table = CostTable((3, 6, 15), (0.010, 0.016, 0.030), (1, 8), (0.002, 0.002))

    def decide(confidences, leak=False):
        policy = make(table)
        play(policy, 12, 0.9, names=names)
        decision = policy.begin_round(RoundInput(names, np.full(3, 100)))
        assert decision.rows.tolist() == [0, 1, 2]
        lengths = np.zeros(3, dtype=int)
        if leak and confidences.prod(axis=1).max() < 0.3:  # decides with this round's tokens
            return lengths
        lengths[decision.rows] = policy.lengths(confidences[decision.rows])
        return lengths

    assert admitted_despite_changes(decide) == 0
    assert admitted_despite_changes(lambda c: decide(c, leak=True)) > 0


def test_a_decision_that_stands_gives_way_to_new_requests_limits_and_policies():
    policy, names = make(), ["a", "b"]
    play(policy, 60, 0.9, names=names)
    assert policy.begin_round(RoundInput(names, np.full(2, 100))).rows.tolist() == [0, 1]
    assert policy.begin_round(RoundInput(names, np.full(2, 100), np.array([4, 0]))).rows.tolist() == [0]
    play(policy, 60, 0.9, names=names)
    names.append("c")  # the caller's own list, changed in place
    assert policy.begin_round(RoundInput(names, np.full(3, 100))).rows.tolist() == [0, 1, 2]
    play(policy, 60, 0.9, names=names)
    policy.add("b", policy="off")
    assert policy.begin_round(RoundInput(names, np.full(3, 100))).rows.tolist() == [0, 2]


def test_a_request_that_finished_leaves_nothing_to_the_next_in_its_place():
    policy = make()
    play(policy, 40, 0.9)
    policy.begin_round(RoundInput(("a", "b"), np.full(2, 100)))
    policy.lengths(np.full((2, 4), 0.9))
    policy.finish(["a", "b"])
    policy.add("c")
    policy.begin_round(RoundInput(("c",), np.array([100])))
    slots, *_ = policy.requests.rows(["c"], policy.round, 4)
    assert policy.history.weight[slots] == 0


def test_most_rounds_without_drafts_need_no_decision(monkeypatch):
    policy = make(STEEP)
    play(policy, 300, 0.3)
    decided = []
    monkeypatch.setattr(policy, "_decide", lambda *plan, decide=policy._decide: decided.append(1) or decide(*plan))
    play(policy, 200, 0.3)
    assert len(decided) < 50


def test_overconfidence_is_made_up_for_within_a_few_rounds():
    """Confidences twice as sure as outcomes: long before temperatures can be fitted, survivals come out right."""
    history, rng = History(4), np.random.default_rng(3)
    slots, truth = np.arange(2), np.array([[0.9, 0.6, 0.8, 0.7], [0.5, 0.7, 0.4, 0.6]])
    logits = 2.0 * logit(truth)
    before = np.abs(history.conditional(slots, logits) - truth).mean()
    for _ in range(60):
        accepted = np.cumprod(rng.random((2, 4)) < truth, axis=1).sum(axis=1)
        history.judged(slots, history.conditional(slots, logits), np.full(2, 4), accepted)
    assert np.abs(history.conditional(slots, logits) - truth).mean() < 0.4 * before
    assert history.factor.max() < 0.75
    history.fitted(np.array([True, False, False, False]))
    assert history.factor[0] == 1.0 > history.factor[1:].max()


def live(history, requests, first, later, begin=0):
    """So many requests one after the other, from round ``begin`` on: one round at first, three from their 12th token on."""
    for request in range(requests):
        now = begin + 10 * request
        history.reset(0, now)
        for number, (tokens, level) in enumerate([(0, first), (12, later), (30, later), (40, later)]):
            slots, contexts = np.array([0]), np.array([100.0 + tokens])
            history.expected(slots, now + number, np.array([4]), contexts)
            history.drew(slots, np.full((1, 1, 4), level), now + number, contexts)
    return begin + 10 * requests


def expect_after(history, first, now):
    """What is expected of a new request when it comes and, after such a first round, at its 30th token."""
    slots, caps, came = np.array([0]), np.array([4]), np.array([100.0])
    history.reset(0, now)
    new = history.expected(slots, now, caps, came)[1][0, 0]
    history.drew(slots, np.full((1, 1, 4), first), now, came)
    return new, history.expected(slots, now + 1, caps, np.array([130.0]))[1][0, 0]


def test_young_requests_are_asked_about_again_when_half_of_them_are_past_a_hard_beginning():
    history, slots = History(4), np.arange(4)
    history.phases(slots[:3], np.full(3, 100.0))  # the last is not asked about
    cases = (((0, 0, 0, 0), 4), ((3, 3, 90, 0), 1), ((4, 5, 90, 0), 7), ((2, 12, 90, 0), 1024))
    for ages, _ in cases:
        assert history.young(slots, 100.0 + np.array(ages)) == 1024, "all phases are alike"
    history._more[1][2:, 0] = 0.3
    for ages, left in cases:
        assert history.young(slots, 100.0 + np.array(ages)) == left
    history._more[1][:, 0] = [0.3, 0.3, 0.0, 0.0, 0.0, 0.0]
    assert history.young(slots, np.full(4, 100.0)) == 1024, "a good beginning"


def test_requests_differ_by_what_one_look_would_show():
    history = History(4)
    history.fleet_gain[0], history.within = 2.0, 1.0
    for first, spread in ((0.5, 0.0), (1.0, 0.0), (4.0, 1.5 / 2.0), (100.0, 1.0)):
        history.first = first
        assert history.spread == pytest.approx(spread)


def after_a_hard_beginning(first, later, requests=40):
    """What is expected of a request after its hard first round, at its 30th token, by a history of such requests."""
    history = History(4)
    return expect_after(history, first, live(history, requests, first, later))[1]


def test_a_beginning_that_is_always_hard_says_little_of_what_follows():
    assert after_a_hard_beginning(0.1, 0.9) > 2.0
    assert after_a_hard_beginning(0.1, 0.1) < 0.6


def test_a_beginning_that_is_hard_no_more_is_soon_forgotten_and_soon_known_again():
    """What was learned of hard beginnings would confirm itself: too little is expected at first, too much from then on."""
    history = History(4)
    now = live(history, 40, 0.1, 0.9)
    now = live(history, 12, 0.3, 0.3, now)
    new, later = expect_after(history, 0.3, now)
    assert 0.9 < new < 1.5
    assert 0.9 < later < 1.5
    now = live(history, 8, 0.1, 0.9, now + 10)
    assert expect_after(history, 0.1, now)[1] > 2.0


def test_what_requests_have_in_common_is_scaled_for_those_of_another_kind():
    """A lull between the 12th and the 28th token of good requests is not the end of drafting for poor ones."""
    history = History(4)
    for request in range(60):
        kind = 0.9 if request < 40 else 0.3
        history.reset(0, 10 * request)
        for number, tokens in enumerate((0, 6, 12, 30, 60)):
            slots, contexts = np.array([0]), np.array([100.0 + tokens])
            level = kind * (0.8 if tokens == 12 else 1.0)
            history.expected(slots, 10 * request + number, np.array([4]), contexts)
            history.drew(slots, np.full((1, 1, 4), level), 10 * request + number, contexts)
    slots, now = np.array([0]), 600
    history.reset(0, now)
    expected = []
    for number, tokens in enumerate((0, 6, 12)):
        contexts = np.array([100.0 + tokens])
        expected.append(history.expected(slots, now + number, np.array([4]), contexts)[1][0, 0])
        history.drew(slots, np.full((1, 1, 4), 0.3), now + number, contexts)
    assert 0.65 < expected[2] / expected[1] < 0.97


def test_a_phase_nobody_has_come_to_yet_is_expected_to_be_like_the_one_before():
    """Requests that began at the same time all had a hard beginning, and a good round since."""
    history, slots, caps = History(4), np.arange(16), np.full(16, 4)
    for slot in slots:
        history.reset(slot, 0)
    for now, (tokens, level) in enumerate(((0, 0.1), (1, 0.1), (6, 0.9), (7, 0.9))):
        history.expected(slots, now, caps, np.full(16, 100.0 + tokens))
        history.drew(slots, np.full((1, 16, 4), level), now, np.full(16, 100.0 + tokens))
    here, later = (history.expected(slots, 4, caps, np.full(16, 100.0 + tokens))[1][0, 0] for tokens in (8, 200))
    assert later > 0.9 * here


def test_requests_that_differ_are_not_taken_for_phases():
    """Half of the requests are good from beginning to end, the others bad: nothing is learned about beginnings."""
    history = History(4)
    for request in range(60):
        history.reset(0, 10 * request)
        for number, tokens in enumerate((0, 6, 12, 30, 60)):
            slots, contexts = np.array([0]), np.array([100.0 + tokens])
            history.drew(slots, np.full((1, 1, 4), 0.9 if request % 2 else 0.1), 10 * request + number, contexts)
    assert np.abs(history.phase_gain).max() < 0.5


@pytest.mark.parametrize("requests", [3, 9, 20])
def test_steps_come_in_few_sizes_where_that_is_better(requests):
    names, table = (
        tuple("abcdefghijklmnopqrstuvwxyz"[:requests]),
        CostTable((1, 4096), (0.010, 0.110), (1, 512), (0.002, 0.0021)),
    )
    sizes = {}
    for few in (False, True):
        policy = Policy(7, CostModel(table, 4096, 512, few_sizes=few), PolicyOptions())
        rng, sizes[few] = np.random.default_rng(0), []
        for _ in range(60):
            rows = policy.begin_round(RoundInput(names, np.full(requests, 100))).rows
            if rows.size == 0:
                continue
            lengths = policy.lengths(rng.uniform(0.5, 0.99, (rows.size, 7)))
            sizes[few].append(requests + int(lengths.sum()))
            policy.observe(Outcomes([names[row] for row in rows], lengths, np.minimum(lengths, 4)))
    assert len(sizes[True]) > 40
    grained = np.array(sizes[True])
    assert (next_size(grained) == grained).mean() > 0.9
    assert len(set(sizes[True])) <= len(set(sizes[False]))


def test_a_decision_not_to_draft_stands_for_a_crowd_that_changes_slowly():
    names = [f"r{index}" for index in range(8)]
    policy = make(STEEP)
    play(policy, 60, 0.1, names=names)
    while policy._standing._until < policy.round + 3:
        play(policy, 1, 0.1, names=names)
    policy.finish(names[:1])
    policy.add("new")
    plan = policy._plan
    assert policy.rest([*names[1:], "new"])
    policy.begin_round(RoundInput([*names[1:], "new"], np.full(8, 100)))
    assert policy._plan is plan
    others = [f"other{index}" for index in range(8)]
    assert not policy.rest(others)
    policy.begin_round(RoundInput(others, np.full(8, 100)))
    assert policy._plan is not plan


def test_only_a_request_that_could_draft_ends_the_rest_of_those_that_cannot():
    names = [f"r{index}" for index in range(8)]
    policy = make(CostTable((1, 4096), (0.010, 0.0101), (1, 512), (0.0001, 0.0002)))
    for name in names:
        policy.add(name, policy="off")
    play(policy, 60, 0.9, names=names)
    policy.begin_round(RoundInput(names, np.full(8, 100)))
    policy.finish(names[:1])
    policy.add("mute", max_draft_tokens=0)
    assert policy.rest([*names[1:], "mute"])
    policy.finish(names[1:2])
    policy.add("usual")
    now = [*names[2:], "mute", "usual"]
    assert not policy.rest(now)
    assert policy.begin_round(RoundInput(now, np.full(8, 100))).rows.tolist() == [7]


def test_nothing_is_decided_while_nobody_may_ever_draft():
    names = [f"r{index}" for index in range(8)]
    policy = make(CostTable((1, 4096), (0.010, 0.0101), (1, 512), (0.0001, 0.0002)))
    for name in names:
        policy.add(name, policy="off")
    policy.begin_round(RoundInput(names, np.full(8, 100)))
    before = policy.round
    for new in range(500):
        assert policy.rest(names)
        policy.finish(names[:1])
        names = [*names[1:], f"new{new}"]
        policy.add(names[-1], max_draft_tokens=0) if new % 2 else policy.add(names[-1], policy="off")
    assert policy.round == before
    policy.add(names[3], policy="adaptive")  # it has changed its mind
    assert not policy.rest(names)
    assert policy.begin_round(RoundInput(names, np.full(8, 100))).rows.tolist() == [3]


def test_an_engine_that_is_off_rests_until_a_request_wants_drafts():
    policy = make(policy="off")
    policy.begin_round(RoundInput(["a"], np.array([100])))
    assert policy.rest(["a"])
    policy.add("b", policy="fixed")
    assert not policy.rest(["a", "b"])
    assert policy.begin_round(RoundInput(["a", "b"], np.array([100, 100]))).rows.tolist() == [1]
    policy.finish(["b"])
    policy.begin_round(RoundInput(["a"], np.array([100])))
    assert policy.rest(["a"])


def test_drafts_in_place_of_padding_cost_nothing():
    """What counts is the yield at a graph's size, not at what a threshold happens to verify."""
    sizes, seconds = (1, 2, 4, 8, 16), (0.010, 0.011, 0.012, 0.016, 0.030)
    cost = CostModel(CostTable(sizes, seconds, (1, 8), (0.001, 0.0015), captured=16), 16, 8)
    number = np.linspace(5.0, 0.5, THRESHOLDS.size) * np.ones((2, 1))
    gain = 1.5 * np.sqrt(number / 5.0)
    found = choose(cost, Load(2, 2, 2.0, 200.0, 200.0), number, gain, np.full(2, 100.0), None)
    best = max(
        (2 + np.interp(min(size - 2, 5.0 * count), count * number[0, ::-1], count * gain[0, ::-1]))
        / (time + float(cost.drafting(count, 100.0 * count)))
        for size, time in zip(sizes, seconds, strict=True)
        for count in (1, 2)
        if size - 2 >= count * number[0, -1]
    )
    assert found.best == pytest.approx(best)
    assert found.tokens in sizes


@pytest.mark.parametrize(
    ("best", "deviation", "risk"),
    [(102.0, 0.10, 0.802), (95.0, 0.10, 1.513), (85.0, 0.10, np.inf), (102.0, 0.02, np.inf), (0.0, 0.10, np.inf)],
    ids=["within the margin", "a little worse", "hopeless", "well known", "nobody"],
)
def test_what_trying_may_lose(best, deviation, risk):
    found = Choice(3, 0.2, off=100.0, best=best, deviation=deviation, off_seconds=10.0)
    assert found.risk == pytest.approx(risk, abs=1e-3)


@pytest.mark.parametrize(
    ("leave", "come", "stands"), [(6, 6, True), (7, 7, False), (2, 0, True), (3, 0, False), (0, 6, True), (0, 7, False)]
)
def test_how_much_of_a_crowd_may_change(leave, come, stands):
    names = [f"r{index}" for index in range(8)]
    policy = make(STEEP)
    play(policy, 60, 0.1, names=names)
    while policy._standing._until < policy.round + 3:
        play(policy, 1, 0.1, names=names)
    now = [*names[leave:], *(f"new{index}" for index in range(come))]
    for name in now[8 - leave :]:
        policy.add(name)
    assert policy.rest(now) is stands


@pytest.mark.parametrize(
    ("users", "patience", "spans", "longest"),
    [
        (1, 100, [2, 4, 6, 8, 10], 32),
        (8, None, [4, 4, 6, 8, 10], 32),
        (8, 0, [32, 32], 32),
        (8, 50, [32, 50], 50),
        (8, 100, [32, 64], 64),
    ],
)
def test_how_long_a_decision_not_to_draft_stands(users, patience, spans, longest):
    names = [f"r{index}" for index in range(users)]
    nobody = np.zeros(0, dtype=np.int64)
    standing, decision = Standing(), DraftDecision(nobody, nobody > 0, "does not pay")
    found = []
    for _ in range(40):
        standing.decided(RoundInput(names, np.full(users, 100)), decision, 0, 1000, users, patience)
        found.append(standing._until)
    assert found[: len(spans)] == spans
    assert found[-1] == longest


@pytest.mark.parametrize(
    ("names", "spare", "decided"),
    [
        (("a", "b"), 0.1, ["pays", "does not pay", "does not pay", "pays", "pays", "does not pay"]),
        (("a",), 0.1, ["pays", "pays", "pays", "pays", "pays", "does not pay"]),
        (("a",), 0.0, ["pays", "does not pay", "does not pay", "pays", "pays", "does not pay"]),
    ],
)
def test_drafting_must_promise_more_to_begin_again_than_to_go_on(monkeypatch, names, spare, decided):
    """With a margin of 4 %, 4.3 % is too little to begin. A lone request that may lose much yet goes on at -3 %."""
    promise = [0.0]

    def choose(*_, **__):
        return Choice(
            len(names), 0.0, off=100.0, best=100.0 * np.exp(promise[0]), deviation=0.1, off_seconds=0.010, seconds=0.015
        )

    monkeypatch.setattr("vllm_dspark.verification.choice.choose", choose)
    policy, reasons = make(), []
    policy.ledger.probe_share, policy.ledger.balance = 0.0, spare  # nothing is tried
    policy._exploring._surprise = 10.0  # nor explored
    for promise[0] in (0.043, -0.03, 0.043, 0.055, 0.043, -0.05):
        policy._standing.drop()
        reasons.append(policy.begin_round(RoundInput(names, np.full(len(names), 100), other_tokens=5)).reason)
    assert reasons == decided


def test_a_decision_that_everybody_drafts_stands_again_after_one_left():
    """Else requests that come and go would keep it from ever standing for long."""
    policy = make()
    play(policy, 60, 0.95, names=("a", "b", "c"))
    play(policy, 1, 0.95, names=("a", "b"))
    decided = policy._plan
    play(policy, 5, 0.95, names=("a", "b"))
    assert policy._plan is decided
    assert policy.explain()["rows"] == 2


def standing_for(names, monkeypatch, limits=4, **options):
    """A policy whose decision that all of these draft stands for two rounds yet, and the comparisons it makes from now on."""
    policy = make(**options)
    given = np.broadcast_to(limits, len(names)).copy()
    play(policy, 60, 0.95, names=names, limits=given)
    while policy._standing._until < policy.round + 2:
        play(policy, 1, 0.95, names=names, limits=given)
    compared = []
    monkeypatch.setattr(policy, "_compare", lambda *given, compare=policy._compare: compared.append(1) or compare(*given))
    return policy, compared


@pytest.mark.parametrize(
    ("leave", "come", "limits", "stands"),
    [
        (0, 0, [4] * 8, True), (0, 0, [3] * 8, True), (0, 0, [2] * 8, False), (0, 0, [4] * 7 + [1], True),
        (0, 0, [4] * 7 + [0], True), (1, 1, [4] * 8, True), (4, 4, [4] * 8, True), (5, 5, [4] * 8, False),
        (2, 0, [4] * 6, True), (3, 0, [4] * 5, False), (0, 2, [4] * 10, True), (0, 3, [4] * 11, False),
        (1, 1, [4, 3, 2, 4, 4, 4, 0, 4], True),
    ],
)  # fmt: skip
def test_how_much_may_change_where_everybody_drafts(monkeypatch, leave, come, limits, stands):
    """The requests and the room for drafts; whoever then has room drafts, and no more than there is room for."""
    names = [f"r{index}" for index in range(8)]
    policy, compared = standing_for(names, monkeypatch)
    now = [*names[leave:], *(f"new{index}" for index in range(come))]
    decision = policy.begin_round(RoundInput(now, np.full(len(now), 100), np.array(limits)))
    assert not compared if stands else compared
    assert decision.reason == "pays"
    assert decision.rows.tolist() == np.flatnonzero(limits).tolist()
    lengths = policy.lengths(np.full((decision.rows.size, policy.width), 0.95))
    assert lengths.tolist() == [limit for limit in limits if limit]
    again = policy.begin_round(RoundInput(now, np.full(len(now), 100), np.array(limits)))
    assert again.rows.tolist() == decision.rows.tolist()


def test_who_regains_room_drafts_that_much(monkeypatch):
    policy, compared = standing_for("abcdefgh", monkeypatch, [4] * 7 + [2])
    policy.begin_round(RoundInput("abcdefgh", np.full(8, 100), np.full(8, 4)))
    assert not compared
    assert policy.lengths(np.full((8, 4), 0.95)).tolist() == [4] * 8


@pytest.mark.parametrize("options", [{"policy": "off"}, {"max_draft_tokens": 0}, {"max_draft_tokens": 2}])
def test_requests_with_options_of_their_own_are_decided_on_when_they_come(monkeypatch, options):
    policy, compared = standing_for("abcdefgh", monkeypatch)
    policy.add("new", **options)
    policy.begin_round(RoundInput(["new", *"bcdefgh"], np.full(8, 100), np.full(8, 4)))
    assert compared


def test_where_every_request_must_keep_a_speed_newcomers_are_decided_on(monkeypatch):
    policy, compared = standing_for("abcdefgh", monkeypatch, min_tokens_per_second_per_request=1.0)
    policy.begin_round(RoundInput(["new", *"bcdefgh"], np.full(8, 100), np.full(8, 4)))
    assert compared


def test_a_decision_that_is_taken_over_fills_the_next_step_and_no_more():
    """16 requests have 48 tokens left below the cliff; 20 have 44."""
    table = CostTable((32, 48, 64, 128), (0.0108, 0.0108, 0.0108, 0.024), (1, 512), (0.0005, 0.0006), captured=128)
    policy = make(table, width=7)
    names = [f"r{index}" for index in range(16)]
    for _ in range(40):
        play(policy, 1, 0.9, names=names)
    while policy._standing._until < policy.round + 2:
        play(policy, 1, 0.9, names=names)
    assert play(policy, 1, 0.9, names=names).sum() == 48
    more = [*names, *(f"new{index}" for index in range(4))]
    assert policy._standing._until > policy.round
    assert play(policy, 1, 0.9, names=more).sum() == 44


def test_a_lone_request_is_decided_on_when_it_comes(monkeypatch):
    policy, compared = standing_for(("a",), monkeypatch)
    policy.begin_round(RoundInput(("b",), np.full(1, 100), np.full(1, 4)))
    assert compared


@pytest.mark.parametrize(("requests", "times"), [(1, 1.0), (2, 8 / 7), (8, 2.0), (20, 2.0)])
def test_a_probe_is_charged_up_to_twice_where_many_ask_for_it(requests, times):
    names = [f"r{index}" for index in range(requests)]
    policy = make(STEEP)
    play(policy, 60, 0.1, names=names)
    policy.ledger.credit, policy.probing.fleet_due = 1.0, 0
    policy.probing.due[:] = 0
    policy._exploring._surprise = 10.0  # else everybody would be looked at
    policy._standing.drop()
    took = policy.ledger.probing
    assert policy.begin_round(RoundInput(names, np.full(len(names), 100))).reason == "probing"
    seconds = policy._plan.probe_seconds
    assert seconds > 0
    assert policy.ledger.probing - took == pytest.approx(seconds)
    assert policy.ledger.credit == pytest.approx(1.0 - times * seconds)


@pytest.mark.parametrize("others", [(), ("off",), ("off", "fixed")])
def test_who_may_not_draft_is_not_among_everybody(others):
    policy = make()
    for number, kind in enumerate(others):
        policy.add(f"other{number}", policy=kind)
    names = tuple(f"other{number}" for number in range(len(others)))
    policy.begin_round(RoundInput(("a", "b", *names), np.full(2 + len(names), 100)))
    assert policy._plan.able == 2 + others.count("fixed")
    assert policy._standing._everybody


def test_a_trial_is_not_taken_for_drafting_that_pays(monkeypatch):
    """What it showed counts: the request is not looked at again after two rounds, as after drafting that no longer pays."""
    found = Choice(1, 0.0, off=100.0, best=99.0, deviation=0.05, off_seconds=0.010)
    monkeypatch.setattr("vllm_dspark.verification.choice.choose", lambda *arguments: found)
    policy = make()
    for _ in range(4):
        policy.begin_round(RoundInput(("a",), np.full(1, 100)))
    assert policy.begin_round(RoundInput(("a",), np.full(1, 100))).reason == "trying"
    (slot,) = policy._plan.slots
    assert not policy.probing.on[slot]
    assert policy.probing.due[slot] > policy.round + 2


def test_trying_is_rare_and_paid_for_as_probing(monkeypatch):
    """A small loss is expected, but step times are known so badly that it may be a gain."""
    found = Choice(2, 0.0, off=100.0, best=99.0, deviation=0.05, off_seconds=0.010)
    monkeypatch.setattr("vllm_dspark.verification.choice.choose", lambda *_, **__: found)
    policy = make()
    policy._exploring._surprise = 10.0  # nothing is explored
    tried, before = [], 0.0
    for now in range(60):
        decision = policy.begin_round(RoundInput(("a", "b"), np.full(2, 100)))
        paid, before = policy.ledger.probing - before, policy.ledger.probing
        if decision.reason == "trying":
            tried.append(now)
            assert decision.rows.tolist() == [0, 1]
            assert paid == pytest.approx(found.risk)
        if decision.drafting:
            policy.lengths(np.full((decision.rows.size, policy.width), 0.5))
    assert np.greater_equal(np.diff(tried), [4, 6, 10, 16][: len(tried) - 1]).all()
    assert policy.ledger.credit >= 0.0


@pytest.mark.parametrize(("credit", "rounds"), [(0.030, range(2, 20)), (0.0, range(500, 700))])
def test_rounds_on_trial_soon_show_that_drafting_pays_again(credit, rounds):
    """Five rounds too many were lost. Without trials nothing makes up for it but a small share of time."""
    policy = make()
    play(policy, 60, 0.9)
    policy.ledger.balance, policy.ledger.credit = policy.ledger.limit - 0.050, credit
    policy.ledger.probe_share = 0.0
    guarded = 0
    while policy.ledger.balance < policy.ledger.limit:
        play(policy, 1, 0.9)
        guarded += 1
    assert guarded in rounds
    assert (policy.counters["on trial"] > 0) is bool(credit)


def test_what_a_trial_loses_is_paid_like_a_probe(monkeypatch):
    """Estimates promise half as much again; in truth drafting doubles a round and brings nothing."""
    policy = make()
    play(policy, 60, 0.9)
    promised = Choice(2, 0.0, off=100.0, best=150.0, deviation=0.01, off_seconds=0.010, seconds=0.015)
    monkeypatch.setattr("vllm_dspark.verification.choice.choose", lambda *arguments: promised)
    ledger = policy.ledger
    ledger.balance = ledger.limit - 0.5
    balance, credit, paid, trials = ledger.balance, ledger.credit, ledger.probing, 0
    for _ in range(400):
        decision = policy.begin_round(RoundInput(("a", "b"), np.full(2, 100)))
        lengths = policy.lengths(np.full((decision.rows.size, 4), 0.05)) if decision.drafting else np.zeros(0, dtype=int)
        policy.observe(Outcomes([("a", "b")[row] for row in decision.rows], lengths, 0 * lengths))
        seconds, drafting = (0.018, 0.006) if decision.drafting else (0.010, 0.0)
        policy.observe_step(
            StepTiming(2 + int(lengths.sum()), 2, 200.0, seconds, None, len(lengths), 100.0 * len(lengths), drafting)
        )
        trials += decision.reason == "on trial"
        assert decision.reason in ("on trial", "guarded")
    assert trials > 2
    assert 0.0049 * trials <= ledger.probing - paid <= credit + 0.015 + ledger.probe_share * 400 * 0.011
    assert balance <= ledger.balance < balance + 1.1 * ledger.loss_share * 400 * 0.011


@pytest.mark.parametrize("prompts", [0, 50])
def test_no_round_goes_without_drafts_to_be_measured_in_a_step_with_prompts(prompts):
    """Its time is not learned from."""
    policy, reasons = make(), []
    for _ in range(40):
        decision = policy.begin_round(RoundInput(("a", "b"), np.full(2, 100), other_tokens=prompts))
        if decision.drafting:
            lengths = policy.lengths(np.full((decision.rows.size, 4), 0.95))
            policy.observe(Outcomes([("a", "b")[row] for row in decision.rows], lengths, lengths))
        reasons.append(decision.reason)
    assert "pays" in reasons
    assert ("measuring no drafting" in reasons) is (prompts == 0)


def test_a_trial_with_nothing_at_stake_is_paid_like_a_probe():
    ledger = make().ledger
    ledger.begin(0.010)
    ledger.saved(-0.002, 0.0)
    assert (ledger.balance, ledger.probing) == (0.0, 0.002)
    ledger.saved(-0.002)
    assert (ledger.balance, ledger.probing) == (-0.002, 0.002)
