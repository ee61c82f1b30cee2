"""Steps that verify nothing, run as if the engine did not speculate.

vLLM's V1 runner sends every step of a speculating engine through the rejection sampler, drafts or not, which a small model
feels. It decides by looking whether there is a speculative config, so for such steps it is shown none.
"""

import functools
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
