"""The scheduler, told the truth: a draft that was never verified was not rejected, and none will be made for a while.

On the V2 runner k drafts of every request are scheduled whatever the policy decides. What was verified comes back with the
step's output; the rest is counted as vLLM counts drafts that a grammar forbids, which is not at all. So does for how many
rounds nobody will draft: meanwhile no drafts are scheduled, and a step takes the host as long as it does without speculation.
"""

import functools
from collections.abc import Mapping
from typing import Any


def update_from_output(original: Any) -> Any:
    """``Scheduler.update_from_output`` that leaves trimmed drafts out of the statistics, and schedules none while none come."""

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        verified = getattr(model_runner_output, "dspark_verified", None)
        if verified is not None:
            scheduler_output.num_invalid_spec_tokens = left_out(
                scheduler_output.scheduled_spec_decode_tokens, scheduler_output.num_invalid_spec_tokens, verified
            )
        result = original(self, scheduler_output, model_runner_output)
        resting = getattr(model_runner_output, "dspark_resting", None)
        if resting is not None:
            rest(self, resting)
        return result

    return wrapper


def rest(scheduler: Any, rounds: int) -> None:
    """Let the next step say that none of its drafts will be scheduled, if in its round nobody drafts.

    vLLM has a table for that, of drafts by the number of requests. Where the user has one it stays.

    Args:
        rounds: after the round whose results have come, in which nobody will draft.
    """
    table = getattr(scheduler, "dspark_none", None)
    if table is None:
        if scheduler.dynamic_sd_lookup is not None:
            return
        table = scheduler.dspark_none = [0] * (scheduler.vllm_config.scheduler_config.max_num_seqs + 1)
    under_way = int(scheduler.vllm_config.scheduler_config.async_scheduling)  # steps between that round's and the next
    scheduler.dynamic_sd_lookup = table if rounds > under_way and scheduler.running else None


def left_out(
    scheduled: Mapping[str, list[int]], invalid: Mapping[str, int] | None, verified: Mapping[str, int]
) -> dict[str, int]:
    """Drafts of each request that do not count: trimmed or against the grammar, both from the end."""
    trimmed = {name: len(drafts) - verified.get(name, 0) for name, drafts in scheduled.items()}
    return {name: max(count, (invalid or {}).get(name, 0)) for name, count in trimmed.items()}


def make_spec_decoding_stats(original: Any) -> Any:
    """``Scheduler.make_spec_decoding_stats`` without rounds that verified nothing."""

    @functools.wraps(original)
    def wrapper(self: Any, stats: Any, *args: Any, **given: Any) -> Any:
        invalid = given.get("num_invalid_spec_tokens") or {}
        if 0 < given.get("num_draft_tokens", 0) <= invalid.get(given.get("request_id"), 0):
            return stats
        return original(self, stats, *args, **given)

    return wrapper
