"""Steps without drafts run as if the engine did not speculate, and only those."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.engine.plain import without_speculation

CONFIG = object()


class Runner:
    """Shows what vLLM's runner would see of the speculative config in each half of a step."""

    def __init__(self, hybrid: bool = False) -> None:
        self.model_config = SimpleNamespace(is_hybrid=hybrid)
        self.speculative_config: Any = CONFIG
        self.execute_model_state: Any = None
        self.seen: list[Any] = []
        self.fails = False

    def _prepare_inputs(self, scheduler_output: Any, more: int) -> int:
        self.seen.append(self.speculative_config)
        return more

    def sample_tokens(self, grammar_output: Any) -> str:
        self.seen.append(self.speculative_config)
        if self.fails:
            raise RuntimeError("no memory")
        self.execute_model_state = None
        return f"sampled {grammar_output}"

    def step(self, drafts: dict[str, list[int]]) -> str:
        scheduled = SimpleNamespace(scheduled_spec_decode_tokens=drafts, total_num_scheduled_tokens=3)
        assert self._prepare_inputs(scheduled, more=5) == 5
        self.execute_model_state = SimpleNamespace(scheduler_output=scheduled, aux_hidden_states=["a", "b"])
        return self.sample_tokens("with grammar")


def make(answers: list[bool], **options: Any) -> tuple[Runner, list[Any]]:
    runner, kept = Runner(**options), []
    without_speculation(runner, lambda: answers.pop(0), lambda tokens, states: kept.append((tokens, states)))
    return runner, kept


def test_a_step_after_which_nobody_drafts_never_sees_the_config():
    runner, kept = make([True])
    assert runner.step({}) == "sampled with grammar"
    assert runner.seen == [None, None]
    assert kept == [(3, ["a", "b"])]
    assert runner.speculative_config is CONFIG


def test_a_step_without_drafts_before_a_drafting_one_sees_it_when_it_has_prepared():
    runner, kept = make([False])
    runner.step({})
    assert runner.seen == [None, CONFIG]
    assert kept == []


def test_a_step_with_drafts_is_vllms_own_and_nobody_is_asked():
    runner, kept = make([])
    runner.step({"a": [1, 2]})
    assert runner.seen == [CONFIG, CONFIG]
    assert kept == []


def test_a_step_that_was_not_run_is_sampled_as_before():
    runner, kept = make([])
    runner.sample_tokens(None)
    assert runner.seen == [CONFIG]
    assert kept == []


def test_the_config_is_back_after_a_failure():
    runner, kept = make([True])
    runner.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        runner.step({})
    assert runner.speculative_config is CONFIG
    assert kept == []


def test_a_forward_that_failed_is_vllms_to_report_and_forgotten_in_the_next_step():
    runner, kept = make([True, False])
    runner._prepare_inputs(SimpleNamespace(scheduled_spec_decode_tokens={}), more=5)
    runner.sample_tokens(None)  # no state: with pipeline parallelism it is asked for all the same
    assert kept == []
    runner.step({})
    assert runner.seen[-1] is CONFIG


def test_models_with_recurrent_state_are_left_alone():
    runner, _ = make([], hybrid=True)
    runner.step({})
    assert runner.seen == [CONFIG, CONFIG]
