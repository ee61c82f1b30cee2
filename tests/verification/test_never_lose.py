"""Never lose, in simulation: regret against not drafting and against the best fixed k, whatever costs and acceptance do.

All figures are expected tokens over true time for the very tokens the policy produced (see simulate.Result), after 500 rounds.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from vllm_dspark.verification import traces
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.records import PolicyOptions
from vllm_dspark.verification.simulate import World, simulate

SIZES = tuple(2**i for i in range(13))
CURVES = ("flat", "linear", "steep", "roofline", "staircase", "cliff")


def table(curve, draft=0.3, context=False):
    """A cost table whose target step starts at about 10 ms and whose draft pass takes ``draft`` of that."""
    x = np.array(SIZES, dtype=float)
    seconds = {
        "flat": 10.0 + 0.0 * x,
        "linear": 4.0 + 0.1 * x,
        "steep": 1.0 + x,
        "roofline": np.maximum(10.0, 10.0 * x / 256),
        "staircase": 10.0 * (1.0 + 0.15 * np.arange(x.size)),
        "cliff": np.where(x <= 64, 10.0, 30.0) + 0.01 * x,
    }[curve] * 1e-3
    requests = np.array([1, 8, 64, 512])
    drafting = draft * seconds[0] * (1.0 + 0.1 * np.log2(requests))
    return CostTable(
        SIZES, tuple(seconds.tolist()), tuple(requests.tolist()), tuple(drafting.tolist()),
        captured=SIZES[-1] if curve in ("staircase", "cliff") else 0,
        per_context=2e-8 * context, per_token_context=5e-9 * context, draft_per_context=2e-9 * context,
        context_only=0.01 * float(seconds[0]),
    )  # fmt: skip


def mistaken(right, target, draft, tilt):
    """The same table with every time off by a factor, the target's growing with its size."""
    factors = target * np.asarray(right.sizes, dtype=float) ** tilt
    seconds = np.maximum.accumulate(np.asarray(right.seconds) * factors)
    drafting = np.asarray(right.draft_seconds) * draft
    return dataclasses.replace(right, seconds=tuple(seconds.tolist()), draft_seconds=tuple(drafting.tolist()))


def check(result, off=0.02, fixed=0.05):
    told = {name: round(result.regret(name), 4) for name in ("off", result.best_fixed, "oracle")}
    assert result.regret("off") <= off, (told, result.reasons)
    assert result.regret(result.best_fixed) <= fixed, (told, result.reasons)
    assert result.probing <= 0.01 * result.policy.seconds, (told, result.reasons)


@st.composite
def worlds(draw, most):
    """Everything at once: costs, what the policy believes of them, noise, requests, domains and how they change."""
    right = table(draw(st.sampled_from(CURVES)), draw(st.floats(0.1, 0.5)), draw(st.booleans()))
    believed = None
    if draw(st.booleans()):
        believed = mistaken(right, *(draw(st.sampled_from([0.7, 1.0, 1.3])) for _ in range(2)), draw(st.floats(-0.02, 0.02)))
    world = World(right, draw(st.sampled_from([0.0, 0.03, 0.1])), draw(st.sampled_from([0.0, 0.01])))
    requests = int(2 ** draw(st.floats(0, np.log2(most))))
    names = draw(st.lists(st.sampled_from(sorted(traces.DOMAINS)), min_size=1, max_size=4, unique=True))
    trace = traces.synthetic(
        max(64, requests), names, tokens=draw(st.sampled_from([60, 250])),
        context=(128, draw(st.sampled_from([1024, 131072]))), switch_every=draw(st.sampled_from([0, 0, 80])),
        seed=draw(st.integers(0, 1000)), overconfidence=draw(st.sampled_from([1.0, 1.6, 2.2])), blur=0.3,
    )  # fmt: skip
    return trace, world, requests, believed


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=30, **SETTINGS)
@given(worlds(most=48))
def test_never_loses(case):
    trace, world, requests, believed = case
    check(simulate(trace, world, concurrency=requests, rounds=500, believed=believed, seed=1))


@settings(max_examples=30, **SETTINGS)
@given(worlds(most=48))
def test_never_loses_running_ahead_of_the_device(case):
    trace, world, requests, believed = case
    check(simulate(trace, world, concurrency=requests, rounds=500, believed=believed, seed=1, ahead=True))


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
@seed(7)
@settings(max_examples=400, **SETTINGS | {"derandomize": False, "database": None})
@given(case=worlds(most=512))
def test_never_loses_sweep(ahead, case):
    trace, world, requests, believed = case
    check(simulate(trace, world, concurrency=requests, rounds=500, believed=believed, seed=1, ahead=ahead))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("requests", "names"), [(1, ["prose"]), (8, ["code"]), (32, ["records", "prose"])])
def test_never_loses_on_every_curve(curve, requests, names, ahead):
    trace = traces.synthetic(64, names, tokens=200, seed=requests)
    check(simulate(trace, World(table(curve)), concurrency=requests, rounds=500, ahead=ahead))


@pytest.mark.parametrize("start", [7, 8])
def test_a_hopeless_first_request_does_not_discourage(start):
    """One short request at a time, where the draft pass is dear and the first ones are the worst of four domains."""
    trace = traces.synthetic(64, ["code", "arithmetic", "prose", "records"], tokens=60, context=(128, 1024), seed=start)
    check(simulate(trace, World(table("staircase", draft=0.4375), 0.0), concurrency=1, rounds=500, seed=1))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("curve", ["roofline", "cliff"])
def test_never_loses_with_512_requests(curve, ahead):
    trace = traces.synthetic(512, tokens=200, seed=3)
    check(simulate(trace, World(table(curve)), concurrency=512, rounds=500, ahead=ahead))


@pytest.mark.parametrize("wrong", [(0.7, 1.3), (1.3, 0.7), (1.3, 1.3)])
@pytest.mark.parametrize("curve", ["linear", "staircase"])
def test_a_table_wrong_by_thirty_percent_is_corrected(curve, wrong):
    right = table(curve)
    trace = traces.synthetic(64, ["code"], seed=2)
    result = simulate(trace, World(right, noise=0.05), concurrency=8, rounds=500, believed=mistaken(right, *wrong, 0.01))
    check(result)
    assert result.explained["target_error"] < 0.08


@pytest.mark.parametrize("wrong", [(4.0, 4.0), (4.0, 1.0), (1.0, 6.0)])
@pytest.mark.parametrize("name", ["code", "prose"])
def test_a_table_from_a_busy_machine_does_not_keep_drafting_off(name, wrong):
    """Times far too long, of everything or of drafting alone: the first few steps, or probes, show it."""
    right = table("linear")
    trace = traces.synthetic(64, [name], tokens=60, seed=2)
    world = World(right, noise=0.05, stalls=0.02)
    check(simulate(trace, world, concurrency=8 if name == "code" else 1, rounds=500, believed=mistaken(right, *wrong, 0.0)))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("requests", [8, 32])
def test_a_table_wrong_about_steps_without_drafts_does_not_keep_drafting_on(requests, ahead):
    """Small steps were profiled on a busy machine, large ones not: drafting seems to pay twice over, and never does."""
    right = table("steep")
    busy = np.where(np.array(right.sizes) <= requests, 3.0, 1.0)
    believed = dataclasses.replace(right, seconds=tuple(np.maximum.accumulate(busy * right.seconds).tolist()))
    trace = traces.synthetic(64, ["prose"], seed=2)
    result = simulate(trace, World(right, noise=0.05), concurrency=requests, rounds=500, believed=believed, ahead=ahead)
    check(result)


@pytest.mark.parametrize("period", [40, 150])
def test_never_loses_to_off_when_everything_switches_at_once(period):
    trace = traces.synthetic(64, ["records", "prose"], tokens=400, period=period, seed=4)
    check(simulate(trace, World(table("linear")), concurrency=8, rounds=500))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("curve", ["flat", "linear", "steep", "cliff"])
def test_an_adversary_costs_at_most_two_percent(curve, requests, ahead):
    """Drafts are worthless whenever the policy drafted in the round before, and excellent whenever it did not."""
    hopeless = {"hopeless": traces.domain(0.03)}
    trace = traces.synthetic(64, ["records"], domains=hopeless, adversary=("hopeless", "records"), seed=5)
    result = simulate(trace, World(table(curve)), concurrency=requests, rounds=500, ahead=ahead)
    assert result.regret("off") <= 0.02, result.reasons
    assert result.probing <= 0.01 * result.policy.seconds


def test_long_context_decides():
    """A verify cost that grows with context: at 128k drafting is off, at 1k it is on; neither loses."""
    costs = dataclasses.replace(table("staircase"), per_token_context=4e-7)
    for context, drafts in ((1024, True), (131072, False)):
        trace = traces.synthetic(64, ["code"], context=(context, context), seed=6)
        result = simulate(trace, World(costs), concurrency=8, rounds=500)
        check(result)
        assert (result.drafted > 0.5 * 8 * result.rounds) == drafts


def test_the_checks_can_fail():
    """Fixed k in a world where drafting does not pay, and off where it does, break the bounds the policy keeps."""
    trace = traces.synthetic(64, ["prose"], seed=8)
    fixed = simulate(trace, World(table("steep")), PolicyOptions(policy="fixed"), concurrency=8, rounds=100)
    with pytest.raises(AssertionError):
        check(fixed)
    trace = traces.synthetic(64, ["records"], seed=8)
    off = simulate(trace, World(table("flat")), PolicyOptions(policy="off"), concurrency=8, rounds=100)
    with pytest.raises(AssertionError):
        check(off)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_gain_that_hides_in_padding_and_noise_is_found(noise, ahead):
    """Drafts in place of a graph's padding are most of what is won here, and a few noisy steps say little of what they cost."""
    trace = traces.synthetic(107, ["prose"], tokens=60, context=(128, 1024), seed=0, blur=0.3)
    result = simulate(trace, World(table("staircase", 0.5), noise), concurrency=107, rounds=500, seed=1, ahead=ahead)
    check(result)
    assert result.regret("off") < -0.02, result.reasons
