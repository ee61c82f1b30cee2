"""Steps that verify nothing, run as if the engine did not speculate.

vLLM's V1 runner sends every step of a speculating engine through the rejection sampler, drafts or not, which a small model
feels. It decides by looking whether there is a speculative config, so for such steps it is shown none. It also concatenates
hidden states for the proposer, which a drafter at rest does not need yet.
"""

import functools
from collections.abc import Callable
from typing import Any


def skip_rejection_sampling(runner: Any) -> None:
    """Wrap ``runner._prepare_inputs``. Models with recurrent state are left alone: they count on rows with zero drafts."""
    if runner.model_config.is_hybrid:
        return
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def wrapper(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.scheduled_spec_decode_tokens:
            return prepare(scheduler_output, *args, **kwargs)
        config, runner.speculative_config = runner.speculative_config, None
        try:
            return prepare(scheduler_output, *args, **kwargs)
        finally:
            runner.speculative_config = config

    runner._prepare_inputs = wrapper


def rest(runner: Any, rests: Callable[[list[list[int]], list[Any], Any], bool]) -> None:
    """Wrap ``runner.propose_draft_token_ids``: where nothing was verified, ``rests`` is asked first whether nobody drafts.

    Args:
        rests: takes the sampled tokens of each request, the hidden states per layer and the attention metadata.
    """
    propose = runner.propose_draft_token_ids

    @functools.wraps(propose)
    def wrapper(
        scheduler_output: Any, sampled_token_ids: Any, sampling_metadata: Any, hidden_states: Any, sample_hidden_states: Any,
        aux_hidden_states: Any, spec_decode_metadata: Any, common_attn_metadata: Any, slot_mappings: Any,
    ) -> Any:  # fmt: skip
        if spec_decode_metadata is None and rests(sampled_token_ids, aux_hidden_states, common_attn_metadata):
            return []
        return propose(
            scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states, aux_hidden_states,
            spec_decode_metadata, common_attn_metadata, slot_mappings,
        )  # fmt: skip

    runner.propose_draft_token_ids = wrapper
