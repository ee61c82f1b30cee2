"""Steps that verify nothing, run as if the engine did not speculate.

vLLM's V1 runner sends every step of a speculating engine through the rejection sampler, drafts or not, and every step's hidden
states to the proposer, which a small model feels. It decides by looking whether there is a speculative config. So for a step
without drafts it is shown none while it prepares its inputs, and if nobody is going to draft, none until it has sampled.
"""

import functools
from collections.abc import Callable
from typing import Any


def without_speculation(runner: Any, rests: Callable[[], bool], keep: Callable[[int, list[Any]], None]) -> None:
    """Wrap the runner's methods. Models with recurrent state are left alone: they count on rows with zero drafts.

    Args:
        rests: asked in such a step, when its batch is known: whether nobody drafts after it.
        keep: takes the step's tokens T and hidden states per layer, ``[≥ T, d]`` each, in place of the proposer.
    """
    if runner.model_config.is_hybrid:
        return
    config, prepare, sample = runner.speculative_config, runner._prepare_inputs, runner.sample_tokens

    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        plain = not scheduler_output.scheduled_spec_decode_tokens
        runner.speculative_config = None if plain else config
        inputs = prepare(scheduler_output, *args, **kwargs)
        if not (plain and rests()):
            runner.speculative_config = config
        return inputs

    @functools.wraps(sample)
    def sample_tokens(grammar_output: Any) -> Any:
        if runner.speculative_config is not None:
            return sample(grammar_output)
        state = runner.execute_model_state
        try:
            output = sample(grammar_output)
        finally:
            runner.speculative_config = config
        if state is not None:  # else the forward has failed
            keep(state.scheduler_output.total_num_scheduled_tokens, state.aux_hidden_states)
        return output

    runner._prepare_inputs, runner.sample_tokens = prepare_inputs, sample_tokens
