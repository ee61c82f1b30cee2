"""The ledger's part for the V2 runner; see hooks.py."""

from collections.abc import Callable
from typing import Any

from vllm_dspark.engine import counting, patches
from vllm_dspark.engine.hook import Hook

CONFIG = "vllm.config.vllm"
V2 = "vllm.v1.worker.gpu.spec_decode"
SPECULATOR = f"{V2}.dspark.speculator"
SCHEDULER = "vllm.v1.core.sched.scheduler"
V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
NO_POLICY = "the policy on the V2 runner (GPUs)"
NO_V2 = "the gated and rnn heads, and confidences, on the V2 runner (GPUs)"


def _v2(
    symbol: str,
    purpose: str,
    *parameters: str,
    module: str = SPECULATOR,
    mentions: tuple[str, ...] = (),
    replace: Callable[[Any], Any] | None = None,
    when: str = SPECULATOR,
    loses: str = NO_V2,
    removal: str = "when vLLM's speculator runs every head",
) -> Hook:
    """A symbol that the V2 integration needs, resolved before the V2 runner builds its speculator."""
    return Hook(module, symbol, purpose, loses, removal, parameters, mentions, when, replace)


def _trim(
    symbol: str,
    purpose: str,
    *parameters: str,
    module: str = "",
    mentions: tuple[str, ...] = (),
    replace: Callable[[Any], Any] | None = None,
    when: str = "",
) -> Hook:
    """A symbol that the policy needs on the V2 runner."""
    removal = "when vLLM lets plugins choose what is verified"
    module = module or V2_RUNNER
    return Hook(module, symbol, purpose, NO_POLICY, removal, parameters, mentions, when or module, replace)


HOOKS: tuple[Hook, ...] = (
    _v2(
        "DSparkSpeculator.__init__", "lays the block out and makes the buffers that the stage reads", "vllm_config", "device",
        mentions=("_anchor_idx", "_draft_topk", "num_speculative_steps", "use_confidence_head"),
    ),
    _v2(
        "DFlashSpeculator.propose", "one round; of its drafts, all of the trained block, the first k are handed on",
        "num_speculative_tokens", module=f"{V2}.dflash.speculator",
        mentions=("draft_tokens", "num_query_per_req", "query_cudagraph_manager", "_precompute_context_kv",
                  "_build_uniform_attn_metadata", "_generate_draft", "run_fullgraph"),
    ),
    _v2(
        "DSparkSpeculator.load_draft_model", "extended: our classes, our buffers", "target_model", "target_attn_layer_names",
        mentions=("enable_adaptive_verification", "use_acceptance_estimator", "use_confidence_head"),
    ),
    _v2(
        "DSparkSpeculator._sample_sequential", "overridden: the sequential stage", "num_reqs", "head_hidden",
        mentions=("sample_indices", "sample_idx_mapping", "sample_pos", "input_buffers", "input_ids", "draft_tokens",
                  "draft_token_confidence_probs", "compute_draft_logits"),
    ),
    _v2(
        "DSparkSpeculator._sample_logits", "draws with vLLM's salted noise, in target ids; the fused stage reads what it reads",
        "logits", "idx_map", "sample_pos", "step",
        mentions=("map_draft_to_target", "draft_logits", "temperature", "seeds", "draft_watermarker", "use_fp64_gumbel"),
    ),
    _v2(
        "DraftModelSpeculator.__init__", "the sizes and buffers that all speculators share", "vllm_config", "device",
        module=f"{V2}.speculator", mentions=("max_num_reqs", "draft_token_confidence_probs", "enable_adaptive_verification"),
    ),
    _trim(
        "VllmConfig._validate_adaptive_verification",
        "choose the form of verification before weights load; on V1, keep the last cached block of a prompt", "self",
        module=CONFIG, mentions=("enable_adaptive_verification", "lora_config"), replace=patches.validate_adaptive_verification,
    ),
    _v2(
        "DSparkSpeculator._generate_draft", "block forward and sequential stage; left out where only context is written",
        "num_reqs", mentions=("_sample_sequential",),
    ),
    _v2(
        "DraftModelSpeculator._build_uniform_attn_metadata", "metadata of the block forward; left out with it", "num_reqs",
        module=f"{V2}.speculator",
    ),
    _trim("async_tensor_h2d", "sends lengths and calibration to the device", "data", "device", module="vllm.utils.torch_utils",
          when=V2_RUNNER),
    _v2("gpu_sync_allowed", "opens what has landed from the device", "first_only", module="vllm.utils.gpu_sync_debug"),
    _trim("InputBatch", "a batch, as the policy is shown it", "req_ids", "num_reqs", "seq_lens_cpu_upper_bound",
          "prefill_len_np", "num_computed_tokens_np", "num_scheduled_tokens", "has_prefill", "idx_mapping",
          "has_structured_output_reqs", module="vllm.v1.worker.gpu.input_batch", when=V2_RUNNER),
    _trim(
        "maybe_create_adaptive_verification_manager", "trims drafts on the device: ours asks the policy",
        "enable_adaptive_verification", "attn_groups", "req_states", "vllm_config", replace=patches.adaptive_verification,
    ),
    _trim(
        "AdaptiveVerificationManager.get_num_tokens", "overridden: the budget", "num_tokens_per_req", "draft_tokens",
        mentions=("_batch_budget", "_max_total_logits", "num_bonus_tokens", "req_states"),
    ),
    _trim(
        "AdaptiveVerificationManager.compact_batch", "spends the budget on the host; ours on the host is exact",
        "num_draft_tokens_per_req", "num_scheduled_tokens", "cu_num_logits_np", mentions=("_batch_budget",),
    ),
    _trim(
        "AdaptiveVerificationManager.reallocate_drafts", "spends it on the device", "req_ids", "idx_mapping",
        mentions=("_batch_budget", "_confidence_probs", "query_start_loc", "_cu_num_logits"),
    ),
    _trim(
        "AdaptiveVerificationManager.record_confidences", "overridden: what the device ranks by", "confidence_probs",
        "input_batch", mentions=("_confidence_probs", "idx_mapping"),
    ),
    _trim(
        "AdaptiveVerificationManager.batches_to_profile", "overridden: step times are measured by us", "capture_sizes",
    ),
    _trim("AdaptiveVerificationManager.set_initial_cost_curves", "overridden: and kept by us", "samples"),
    _trim(
        "GPUModelRunner.gather_batch_req_state", "asks for the tokens of a step", "scheduler_output",
        mentions=("adaptive_verification", "get_num_tokens", "sort_batch_req_ids", "decode_query_len"),
    ),
    _trim(
        "GPUModelRunner.prepare_inputs", "asks for the lengths", "scheduler_output", "batch_req_state",
        mentions=("adaptive_verification", "compact_batch", "reallocate_drafts", "query_start_loc", "InputBatch"),
    ),
    _trim("BatchReqState", "that step, on the host", "req_ids", "num_tokens", "decode_graph_eligible"),
    _trim("BatchExecutionDescriptor", "what a graph was captured for", "num_tokens", "uniform_token_count"),
    _trim(
        "ModelCudaGraphManager._init_candidates", "chooses what is captured; ours chooses twice",
        mentions=("decode_query_len", "varlen_decode", "_candidates", "_capture_descs"),
    ),
    _trim(
        "ModelCudaGraphManager", "captures full graphs for 1 + k tokens of every request: ours for 1 too", "vllm_config",
        "decode_query_len", "varlen_decode", replace=patches.graph_manager,
    ),
    _trim("sort_batch_req_ids", "the order of a batch", "num_tokens_per_req", "draft_tokens", "decode_query_len"),
    _trim("GPUModelRunner.add_requests", "tells what requests ask for", "scheduler_output", mentions=("req_states",)),
    _trim(
        "GPUModelRunner.sample_tokens", "one round: verdict, drafting; its output tells the scheduler what was verified",
        "grammar_output", mentions=("observe_verification", "propose", "record_confidences", "draft_tokens", "AsyncOutput"),
    ),
    _trim("AsyncModelRunnerOutput.get_output", "that output, once it has landed", "self",
          module="vllm.v1.outputs", when=V2_RUNNER),
    _trim(
        "GPUModelRunner._dummy_run", "made-up steps, to be timed", "num_tokens", "uniform_decode", "context_len", "skip_eplb",
        mentions=("propose", "speculator"),
    ),
    _v2(
        "DFlashSpeculator.capture", "captures graphs of the manager it finds",
        module=f"{V2}.dflash.speculator",
        mentions=("query_cudagraph_manager", "_generate_draft", "_prepare_graph_forward"),
    ),
    _v2(
        "DFlashSpeculator._prepare_graph_forward", "the part of a graph that writes context K/V", "num_reqs", "attn_metadata",
        module=f"{V2}.dflash.speculator", mentions=("_precompute_context_kv",),
    ),
    _v2(
        "DFlashSpeculator._num_graph_context_tokens", "how many rows that part writes; ours fewer where nothing else is done",
        "num_reqs", module=f"{V2}.dflash.speculator",
    ),
    _v2(
        "DFlashSpeculator.init_cudagraph_manager", "makes that manager; ours makes two, one for a row of each request",
        "cudagraph_mode", module=f"{V2}.dflash.speculator", mentions=("query_cudagraph_manager", "num_query_per_req"),
    ),
    _v2(
        "DraftModelSpeculator.observe_verification", "extended: the verdict on the last drafts", "num_sampled", "num_rejected",
        module=f"{V2}.speculator",
    ),
    _trim(
        "Scheduler.update_from_output",
        "leave drafts that were never verified out of the statistics; have none scheduled while nobody drafts",
        "scheduler_output", "model_runner_output", module=SCHEDULER,
        mentions=("make_spec_decoding_stats", "num_invalid_spec_tokens", "request_id", "running"),
        replace=counting.update_from_output,
    ),
    _trim(
        "Scheduler.make_spec_decoding_stats", "and rounds that verified nothing", "num_draft_tokens", "num_invalid_spec_tokens",
        "request_id", module=SCHEDULER, replace=counting.make_spec_decoding_stats,
    ),
    # Last: what the entries above name must still be vLLM's.
    _v2(
        "DSparkSpeculator", "V2's speculator: swap in one with our draft classes and sequential stage", "vllm_config", "device",
        replace=patches.dspark_speculator,
    ),
)  # fmt: skip
