"""What the proposer starts with: the policy, its costs and temperatures, from the options and the checkpoint."""

import logging
from typing import Any

from vllm.distributed.parallel_state import get_tp_group

from vllm_dspark.engine import profiling
from vllm_dspark.engine.rounds import Decider, Rounds, Shared
from vllm_dspark.options import DSparkOptions
from vllm_dspark.verification import calibration
from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import PolicyOptions
from vllm_dspark.verification.survival import Floats

logger = logging.getLogger("vllm.dspark")

TOGETHER = 512  # tokens whose context is written at once: enough for an efficient product
DEFERRED_TOKENS, DEFERRED_BYTES = 8192, 32 << 20  # most that wait on a CPU: many a request ends before its turn comes


def deferred_tokens(vllm_config: Any, layers: int) -> tuple[int, int]:
    """Most tokens whose context K/V may be written late, and how many at once; none where another process reads the cache.

    Args: layers: of the target, whose hidden states are kept.
    """
    if vllm_config.kv_transfer_config is not None:
        return 0, 0
    together = min(TOGETHER, int(vllm_config.scheduler_config.max_num_batched_tokens))
    if not forgets(vllm_config):
        return together, together
    model = vllm_config.model_config
    token = layers * model.get_hidden_size() * model.dtype.itemsize
    return max(together, min(DEFERRED_TOKENS, DEFERRED_BYTES // token)), together


def forgets(vllm_config: Any) -> bool:
    """Whether what ended requests have left need not be written: only where a look at it is free, and ranks need not agree."""
    return bool(vllm_config.device_config.device_type == "cpu" and vllm_config.parallel_config.tensor_parallel_size == 1)


def cost(proposer: Any) -> CostModel | None:
    """The cost model, from measured step times; None if the policy has nothing to compare."""
    options: DSparkOptions = proposer.options
    if options.policy != "adaptive":
        return None
    whole = proposer.vllm_config.parallel_config.pipeline_parallel_size == 1  # else no rank can run a step by itself
    table = profiling.table(proposer.runner, proposer, options.profile_seconds if whole else 0.0, options.cache_dir)
    requests = proposer.max_batch_size
    most = requests * (1 + proposer.num_speculative_tokens)
    return CostModel(table, most, requests, few_sizes=proposer.device.type == "cpu")


def decider(proposer: Any, costs: CostModel | None) -> Decider:
    """Who decides for the proposer: its own policy, or rank 0's."""
    if proposer.vllm_config.parallel_config.tensor_parallel_size == 1:
        return rounds(proposer, costs)
    group = get_tp_group()
    return Shared(rounds(proposer, costs) if group.rank_in_group == 0 else None, group, proposer.max_batch_size)


def rounds(proposer: Any, costs: CostModel | None) -> Rounds:
    """The policy's side of the proposer. Without costs an adaptive policy waits: nothing is drafted."""
    options: DSparkOptions = proposer.options
    kind = "off" if options.policy == "adaptive" and costs is None else options.policy
    chosen = PolicyOptions(
        policy=kind, min_tokens_per_second_per_request=options.min_tokens_per_second_per_request, fallback="off"
    )
    width = proposer.width
    policy = Policy(width, costs, chosen, temperatures(options, proposer.draft_model_config.hf_config, width))
    gone = proposer.gone if forgets(proposer.vllm_config) else None
    return Rounds(policy, proposer.runner, proposer.queries, proposer.max_model_len, gone)


def temperatures(options: DSparkOptions, hf_config: Any, width: int) -> Floats | float:
    """Temperatures of the confidences: as given, else a file's, else the checkpoint's, else 1.

    Raises:
        ValueError: there are not as many as positions.
    """
    given = options.temperatures
    if isinstance(given, str):
        found = calibration.load(given, width)
        if found is None:
            raise ValueError(f"dspark option 'temperatures': {given!r} is not a file of {width} temperatures")
        return found
    declared = hf_config.to_dict() if given is None else {"confidence_temperatures": given}
    found = calibration.from_config(declared, width)
    return 1.0 if found is None else found
