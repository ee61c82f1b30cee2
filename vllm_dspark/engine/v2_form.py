"""Which form of verification a V2 engine gets. Decided from its configuration, so it is said before any weight is read."""

import logging
from typing import Any, Literal, NamedTuple

from vllm_dspark.options import KEY, DSparkOptions

logger = logging.getLogger("vllm.dspark")


class Form(NamedTuple):
    """``device``: budgets on the host, ranking on the device. ``host``: lengths on the host. ``whole``: as ``host``, but a
    step verifies everything or nothing. ``fixed``: always k drafts; the policy has no say.
    """

    kind: Literal["device", "host", "whole", "fixed"]
    why: str


def options(vllm_config: Any) -> DSparkOptions:
    """The plugin's options in this configuration."""
    additional = vllm_config.additional_config
    return DSparkOptions.parse(additional.get(KEY) if isinstance(additional, dict) else None)


def form(vllm_config: Any) -> Form:
    """The form this engine runs; the same in every process, once :func:`choose` has been asked."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.pipeline_parallel_size > 1:
        return Form("fixed", "pipeline parallelism: the first stages do not know what the last one decides")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return Form("fixed", "prefill context parallelism: ranks split a batch by the scheduled lengths")
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        return Form("fixed", "batch-sharded sampling: ranks split a batch by the scheduled lengths")
    if model.is_hybrid:
        return Form("fixed", "recurrent layers: their states are planned by the scheduled lengths")
    if vllm_config.speculative_config.enable_adaptive_verification:
        return Form("device", "graphs for any lengths")
    if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return Form("whole", obstacle(vllm_config) or "enable_adaptive_verification is not set")
    return Form("host", obstacle(vllm_config) or "enable_adaptive_verification is not set")


def all_or_nothing(vllm_config: Any, on_device: bool) -> bool:
    """Whether steps verify k drafts of every request or none, because there are graphs for nothing else.

    Args:
        on_device: lengths are decided there, as vLLM has agreed to.
    """
    speculative = vllm_config.speculative_config
    if on_device or speculative is None or speculative.method != "dspark" or options(vllm_config).policy == "fixed":
        return False
    return form(vllm_config).kind in ("whole", "device")


def obstacle(vllm_config: Any) -> str | None:
    """What keeps lengths from being decided on the device; None if nothing is known to."""
    from vllm.platforms import current_platform

    backend = vllm_config.attention_config.backend
    reasons = {
        "no full CUDA graphs": not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        "LoRA": vllm_config.lora_config is not None,
        "sampling masks are returned": bool(getattr(vllm_config.model_config, "return_sampling_mask", False)),
        "routed experts are returned": bool(getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False)),
        "attention without graphs for any lengths": not (
            current_platform.is_cuda() and any(map(current_platform.is_device_capability_family, (90, 100)))
        ),
        f"attention backend {getattr(backend, 'name', backend)}": getattr(backend, "name", None) not in (None, "FLASH_ATTN"),
        "FlashAttention 2": getattr(vllm_config.attention_config, "flash_attn_version", None) == 2,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def choose(vllm_config: Any) -> None:
    """Turn verification on the device on where it can run, and say what is run. For the process that reads the options."""
    speculative = vllm_config.speculative_config
    possible = form(vllm_config).kind != "fixed" and obstacle(vllm_config) is None
    if possible and options(vllm_config).policy == "adaptive":
        speculative.enable_adaptive_verification = True
    found = form(vllm_config)
    line = f"{_SAID[found.kind]} ({found.why})"
    if getattr(speculative, "dspark_said", None) != line:
        speculative.dspark_said = line
        logger.info("DSpark on the V2 runner: %s", line)


_SAID = {
    "device": "drafts to verify are budgeted from earlier rounds and ranked by this one's confidences",
    "host": "drafts to verify are chosen per request from earlier rounds",
    "whole": "all drafts are verified or none, chosen by the load and earlier rounds",
    "fixed": "every request verifies num_speculative_tokens drafts; 'policy' and 'dspark_max_draft_tokens' do nothing",
}
