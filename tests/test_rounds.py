"""What the policy is told of the runner's rounds: who can draft, how much, what was accepted, how long it took."""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_dspark.engine.profiling import Script
from vllm_dspark.engine.rounds import Decider, Rounds, Shared
from vllm_dspark.verification.cost import StepTiming
from vllm_dspark.verification.records import DraftDecision
from vllm_dspark.verification.standing import MEASURING


class Policy:
    """Notes what it is told; everybody it is shown drafts."""

    cost: Any = object()

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments if len(arguments) > 1 else arguments[0]))

    def begin_round(self, inputs: Any) -> DraftDecision:
        self.calls.append(("begin_round", inputs))
        return DraftDecision(np.flatnonzero(np.asarray(inputs.limits) > 0), np.zeros(0, dtype=bool), "pays")

    def told(self, name: str) -> list[Any]:
        return [value for called, value in self.calls if called == name]


def request(prompt: int = 10, outputs: int = 1, max_tokens: int | None = 50, eos: int | None = 0, **more: Any) -> Any:
    parameters = SimpleNamespace(
        max_tokens=max_tokens, eos_token_id=eos, stop_token_ids=more.get("stop"), extra_args=more.get("extra_args")
    )
    return SimpleNamespace(sampling_params=parameters, num_prompt_tokens=prompt, output_token_ids=[5] * outputs)


def make(**requests: Any) -> tuple[Rounds, Policy]:
    runner = SimpleNamespace(
        requests=requests, input_batch=SimpleNamespace(req_ids=list(requests)), max_num_tokens=1000
    )  # fmt: skip
    policy = Policy()
    return Rounds(policy, runner, queries=7, max_model_len=100), policy  # type: ignore[arg-type]


@pytest.mark.parametrize("decider", [Rounds, Shared, Script])
def test_whoever_decides_is_asked_in_the_same_way(decider):
    for name in ("rests", "rested", "judged", "begin", "lengths", "end"):
        wanted = inspect.signature(getattr(Decider, name)).parameters
        assert list(inspect.signature(getattr(decider, name)).parameters.values()) == list(wanted.values())


def test_limits_are_what_is_left_to_generate_and_whether_the_block_fits():
    rounds, policy = make(
        young=request(), nearly=request(outputs=47), last=request(outputs=49), done=request(outputs=50), long=request(),
        free=request(max_tokens=None),
    )  # fmt: skip
    contexts = np.array([11, 57, 59, 60, 94, 93])
    rows = rounds.begin(0.0, [[5]] * 6, contexts, k=7)
    (inputs,) = policy.told("begin_round")
    assert list(inputs.requests) == ["young", "nearly", "last", "long", "free"]
    assert inputs.limits.tolist() == [7, 2, 0, 0, 7]  # 47 of 50: one comes from the target, two can be drafts
    assert inputs.contexts.tolist() == [11, 57, 59, 94, 93]
    assert rows.tolist() == [0, 1, 5]


def test_requests_that_ended_or_did_not_sample_do_not_draft():
    rounds, policy = make(
        eos=request(eos=9), middle=request(eos=9), stopped=request(stop=[3]), chunk=request(prompt=80), goes=request()
    )
    rows = rounds.begin(0.0, [[9], [9, 4], [4, 3], [], [5]], np.array([12, 12, 12, 30, 12]), k=7)
    (inputs,) = policy.told("begin_round")
    assert list(inputs.requests) == ["goes"]
    assert inputs.other_tokens == 50  # of the prompt that is still to come
    assert rows.tolist() == [4]


def test_requests_are_announced_with_their_own_options_and_finished_when_they_go():
    rounds, policy = make(a=request(), b=request(extra_args={"dspark_policy": "off", "dspark_max_draft_tokens": 2, "other": 1}))
    rounds.begin(0.0, [[5], [5]], np.array([11, 11]), k=7)
    assert policy.told("add") == [("a", None, None), ("b", 2, "off")]
    del rounds.runner.requests["a"]
    rounds.runner.requests["c"] = request(extra_args={"dspark_policy": "adaptive"})
    rounds.runner.input_batch.req_ids = ["b", "c"]
    rounds.begin(0.0, [[5], [5]], np.array([12, 11]), k=7)
    assert policy.told("finish")[-1] == ["a"]
    assert policy.told("add")[2:] == [("c", None, "adaptive")]


def test_those_that_ended_are_told_and_not_those_that_only_left_the_batch():
    requests = {"ended": request(prompt=9, outputs=4), "preempted": request(), "stays": request()}
    told: list[Any] = []
    runner = SimpleNamespace(requests=dict(requests), input_batch=SimpleNamespace(req_ids=list(requests)), max_num_tokens=1000)
    rounds = Rounds(Policy(), runner, queries=7, max_model_len=100, gone=told.append)  # type: ignore[arg-type]
    rounds.begin(0.0, [[5]] * 3, np.array([13, 11, 11]), k=7)
    assert told == []
    del runner.requests["ended"]
    runner.input_batch.req_ids = ["stays"]
    rounds.begin(0.0, [[5]], np.array([12]), k=7)
    (served,) = told
    assert served.request is requests["ended"]
    assert (served.prompt, len(served.outputs)) == (9, 4)


def test_a_request_that_asks_for_what_was_not_measured_gets_the_engines_policy():
    rounds, policy = make(a=request(extra_args={"dspark_policy": "adaptive"}))
    policy.cost = None
    rounds.begin(0.0, [[5]], np.array([11]), k=7)
    assert policy.told("add") == [("a", None, None)]


def test_a_policy_at_rest_is_told_nothing_while_the_batch_is_the_same():
    rounds, policy = make(a=request(), b=request())
    contexts = np.array([11, 12])
    rounds.begin(0.0, [[5], [5]], contexts, k=7)
    policy.calls.clear()
    policy.rest = lambda names: names == ["a", "b"]  # type: ignore[attr-defined]
    assert rounds.rests()
    assert policy.calls == []
    rounds.judged([2, 0], tokens=4)
    assert rounds.begin(2.0, [[5, 5], [5]], contexts + 2, k=7).size == 2
    assert policy.told("observe")
    policy.calls.clear()
    rounds.runner.requests["c"] = request()
    rounds.runner.input_batch.req_ids = ["b", "c"]
    assert not rounds.rests()
    assert rounds.begin(3.0, [[5], [5]], contexts, k=7).size == 2
    assert [name for name, *_ in policy.told("add")] == ["c"]
    rounds.end(3.5, 0.4)
    policy.calls.clear()
    rounds.runner.requests["d"] = request()
    rounds.runner.input_batch.req_ids = ["d"]
    assert not rounds.rests()
    rounds.begin(9.0, [[5]], np.array([4]), k=7)
    assert policy.told("observe_step") == []  # the engine may have stood idle


def test_a_policy_at_rest_is_told_who_comes_and_goes():
    rounds, policy = make(a=request(), b=request())
    rounds.begin(0.0, [[5], [5]], np.array([11, 12]), k=7)
    policy.rest = lambda names: True  # type: ignore[attr-defined]
    del rounds.runner.requests["a"]
    rounds.runner.requests["c"] = request(extra_args={"dspark_policy": "off"})
    rounds.runner.input_batch.req_ids = ["b", "c"]
    assert rounds.rests()
    assert policy.told("finish")[-1] == ["a"]
    assert policy.told("add")[-1] == ("c", None, "off")


def test_of_rounds_at_rest_some_are_timed():
    rounds, policy = make(a=request(outputs=4), b=request(outputs=2))
    policy.rest = lambda names: True  # type: ignore[attr-defined]
    for number in range(80):
        assert rounds.rests()
        rounds.rested(0.5 * number, 2)
        rounds.end(0.5 * number + 0.1, 0.0)  # what was left over took a while
    told = policy.told("timed")
    assert len(told) == 3  # the second, the 32nd and the 64th
    for timing in told:
        assert timing.target_seconds == pytest.approx(0.4)
        assert dataclasses.replace(timing, target_seconds=0.0) == StepTiming(2, 2, 24.0, 0.0)


@pytest.mark.parametrize(("comes", "tokens"), [(True, 3), (False, 9)])
def test_a_round_at_rest_is_not_timed_if_somebody_came_or_prefill_went_on(comes, tokens):
    rounds, policy = make(a=request(outputs=4), b=request(outputs=2))
    policy.rest = lambda names: True  # type: ignore[attr-defined]
    for number in range(2):
        if number == 1 and comes:
            rounds.runner.requests["c"] = request(outputs=5)
            rounds.runner.input_batch.req_ids = ["a", "b", "c"]
        rounds.rests()
        rounds.rested(0.5 * number, tokens if number == 1 else 2)
        rounds.end(0.5 * number, 0.0)
    assert policy.told("timed") == []


def test_what_no_drafting_takes_is_measured_in_the_second_round_without(monkeypatch):
    """The first finds little where it was left. It is run without speculation, and not timed."""
    rounds, policy = make(a=request(), b=request())
    policy.rest = lambda names: False  # type: ignore[attr-defined]
    nobody = DraftDecision(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), MEASURING)
    monkeypatch.setattr(policy, "begin_round", lambda inputs: nobody)
    rounds.begin(1.0, [[5], [5]], np.array([20, 30]), k=7, tokens=2)
    rounds.end(1.1, 0.0)
    assert rounds.rests()
    rounds.rested(2.0, 2)
    rounds.end(2.1, 0.0)
    assert not rounds.rests()
    assert not policy.told("timed")
    rounds.begin(3.0, [[5], [5]], np.array([22, 32]), k=7, tokens=2)
    (timing,) = policy.told("observe_step")
    assert timing.target_seconds == pytest.approx(0.9)


def test_a_lone_request_does_not_wait_for_that(monkeypatch):
    rounds, policy = make(a=request())
    policy.rest = lambda names: False  # type: ignore[attr-defined]
    nobody = DraftDecision(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), MEASURING)
    monkeypatch.setattr(policy, "begin_round", lambda inputs: nobody)
    rounds.begin(1.0, [[5]], np.array([20]), k=7, tokens=1)
    assert not rounds.rests()


def test_outcomes_and_times_are_those_of_the_round_before():
    rounds, policy = make(a=request(), b=request(), c=request())
    sampled, contexts = [[5]] * 3, np.array([20, 30, 40])
    rounds.begin(1.0, sampled, contexts, k=7)
    rounds.end(1.5, 0.4, 0.1)
    assert policy.told("observe_step") == []
    rounds.judged([7, 3, 0], tokens=13)
    rounds.begin(2.0, [[1, 2, 3], [1], [4]], np.array([23, 31, 41]), k=7)
    (outcomes,) = policy.told("observe")
    assert list(outcomes.requests) == ["a", "b"]
    assert outcomes.verified.tolist() == [7, 3]
    assert outcomes.accepted.tolist() == [2, 0]
    (timing,) = policy.told("observe_step")
    assert timing.target_seconds == pytest.approx(0.5)
    assert (timing.tokens, timing.requests, timing.drafted) == (13, 3, 3)
    assert (timing.draft_seconds, timing.late_seconds) == (0.4, 0.1)
    assert timing.context == 95
    assert timing.token_context == 95 + 7 * 23 + 3 * 31
    assert timing.draft_context == 90


def test_steps_that_say_nothing_about_decoding_are_not_timed():
    rounds, policy = make(a=request(), b=request())
    two = np.array([20, 30])
    rounds.begin(1.0, [[5], [5]], two, k=7)
    rounds.end(1.1, 0.0)
    rounds.begin(2.0, [[5], []], two, k=7)  # prefill in it
    rounds.end(2.1, 0.0)
    assert len(policy.told("observe_step")) == 0
    rounds.judged([0, 0], tokens=30)  # the last chunk of a prompt in it
    rounds.begin(3.0, [[5], [5]], two, k=7)
    rounds.end(3.1, 0.0)
    assert len(policy.told("observe_step")) == 0
    rounds.begin(3.5, [[5], [5]], two, k=7, tokens=30)  # likewise, where nothing was verified
    rounds.end(3.6, 0.0)
    assert len(policy.told("observe_step")) == 0
    rounds.begin(4.0, [[5], [5]], two, k=7, tokens=2)
    rounds.end(4.1, 0.0)
    assert len(policy.told("observe_step")) == 1
    rounds.runner.requests = {"c": request()}
    rounds.runner.input_batch.req_ids = ["c"]
    rounds.begin(99.0, [[5]], two[:1], k=7)  # another request: the engine may have stood idle
    assert len(policy.told("observe_step")) == 1


class Group:
    """Two ranks of one process: what the first sends, the second receives."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        if len(self.sent) % 2 == 0:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent[-1])
            self.sent.append(tensor)


def test_every_rank_drafts_for_whom_rank_0_chose():
    rounds, policy = make(a=request(), b=request(outputs=49), c=request())
    policy.lengths = lambda confidences: np.array([2, 5])  # type: ignore[method-assign]
    group = Group()
    first, second = Shared(rounds, group, 8), Shared(None, group, 8)
    for shared in (first, second):
        shared.judged([0, 0, 0], 3)
        rows = shared.begin(1.0, [[5]] * 3, np.array([20, 21, 22]), k=7)
        assert rows.tolist() == [0, 2]
        shared.end(2.0, 0.1)
    assert first.lengths(np.full((2, 7), 0.5)).tolist() == [2, 5]
    assert second.lengths(np.full((2, 7), 0.1)).tolist() == [7, 7]
    assert len(policy.told("begin_round")) == 1
    rounds.runner.requests["a"].output_token_ids += [5] * 49
    for shared in (first, second):
        assert shared.begin(3.0, [[5]] * 3, np.array([70, 21, 22]), k=7).tolist() == [2]
