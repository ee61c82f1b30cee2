"""The simulator serves what it is given and prices the other arms on the same rounds."""

import dataclasses

import numpy as np
import pytest

from vllm_dspark.verification import traces
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.records import PolicyOptions
from vllm_dspark.verification.simulate import World, simulate

TABLE = CostTable((1, 64), (0.010, 0.0163), (1, 64), (0.002, 0.002))


@pytest.mark.parametrize("k", [1, 4, 7])
def test_a_fixed_policy_is_its_own_counterfactual(k):
    trace = traces.synthetic(8, ["code"], tokens=80, seed=1)
    result = simulate(trace, World(TABLE), PolicyOptions(policy="fixed", fixed_drafts=k), concurrency=4)
    assert result.policy.throughput == pytest.approx(result.arms[f"fixed {k}"].throughput)
    assert result.lengths[k] == result.drafted


def test_off_is_off():
    result = simulate(traces.synthetic(8, tokens=50), World(TABLE), PolicyOptions(policy="off"), concurrency=4)
    assert result.regret("off") == pytest.approx(0.0)
    assert result.drafted == 0
    assert result.emitted == sum(r.tokens for r in traces.synthetic(8, tokens=50).requests)


def test_the_oracle_is_never_beaten_by_a_fixed_k():
    result = simulate(traces.synthetic(16, tokens=100), World(TABLE), concurrency=8, rounds=100)
    assert all(tally.throughput <= result.arms["oracle"].throughput * 1.001 for tally in result.arms.values())


def test_emitted_tokens_agree_with_what_was_expected():
    result = simulate(traces.synthetic(64, ["arithmetic"], tokens=200), World(TABLE), concurrency=16, rounds=300)
    assert result.emitted == pytest.approx(result.policy.tokens, rel=0.03)


def test_arrivals_are_waited_for():
    trace = traces.synthetic(6, ["code"], tokens=20, rate=0.5, seed=2)
    result = simulate(trace, World(TABLE), concurrency=4)
    assert len(result.speeds) == 6
    assert result.policy.seconds < trace.requests[-1].arrival


def test_same_seed_same_run():
    trace = traces.synthetic(8, tokens=60, switch_every=20)
    first, second = (simulate(trace, World(TABLE, 0.1, 0.02), concurrency=4, seed=3) for _ in range(2))
    assert first.summary() == second.summary()


def test_acceptance_and_confidence_are_what_the_trace_says():
    trace = traces.Trace({"x": traces.domain(0.8, 0.6)}, (), overconfidence=2.0, blur=0.0)
    acceptance, confidences, would = traces.Drafter(trace, 0).draft(np.zeros(20_000, dtype=int))
    assert would.mean() == pytest.approx(np.cumprod(acceptance, axis=1).sum(axis=1).mean(), rel=0.02)
    odds = np.log(confidences / (1 - confidences)) / np.log(acceptance / (1 - acceptance))
    assert odds == pytest.approx(2.0)


def test_trace_files(tmp_path, caplog):
    trace = traces.synthetic(5, switch_every=50, seed=3, adversary=("code", "prose"), period=9)
    trace.save(tmp_path / "t.json")
    assert traces.Trace.load(tmp_path / "t.json") == trace
    text = (tmp_path / "t.json").read_text()
    (tmp_path / "t.json").write_text(text.replace('"prose"', '"verse"', 1))
    assert traces.Trace.load(tmp_path / "t.json") is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("users", [1, 4])
def test_what_other_arms_would_have_taken_is_what_they_take(users):
    """Requests whose tokens differ in price and in difficulty: adding up the rounds that another arm played would mislead."""
    table = dataclasses.replace(TABLE, per_context=2e-7)
    trace = traces.synthetic(40, ["records", "prose"], tokens=150, context=(128, 131072), seed=4)
    played = simulate(trace, World(table), PolicyOptions(policy="fixed", fixed_drafts=7), concurrency=users)
    for arm, options in (("off", PolicyOptions(policy="off")), ("fixed 2", PolicyOptions(policy="fixed", fixed_drafts=2))):
        own = simulate(trace, World(table), options, concurrency=users)
        assert played.arms[arm].throughput == pytest.approx(own.policy.throughput, rel=0.03), arm
