"""The ledger's part for the V1 runner, and for the draft models that V2 shares with it; see hooks.py."""

from collections.abc import Callable
from typing import Any

from vllm_dspark.engine import patches
from vllm_dspark.engine.hook import Hook
from vllm_dspark.engine.v2_hooks import CONFIG, SCHEDULER, SPECULATOR

RUNNER = "vllm.v1.worker.gpu_model_runner"
NO_V1 = "DSpark on the V1 runner (every CPU installation)"
WITH_V1 = "when the V1 runner is removed, or runs DSpark itself"
DFLASH, PROPOSER = "vllm.v1.spec_decode.dflash", "vllm.v1.spec_decode.llm_base_proposer"
MODELS, LAYERS = "vllm.model_executor.models", "vllm.model_executor.layers"
SCHEDULED = "vllm.v1.core.sched.output"
NO_COSTS = "measured step times: the policy learns them while serving"
NO_REST = "the speed of steps that verify nothing"
NO_QUICK = "some of the speed of drafting on a CPU"


def _v1(
    module: str,
    symbol: str,
    purpose: str,
    *parameters: str,
    mentions: tuple[str, ...] = (),
    replace: Callable[[Any], Any] | None = None,
    loses: str = NO_V1,
    when: str = RUNNER,
) -> Hook:
    """A symbol that the V1 integration needs, resolved before the V1 runner can use it; V2 shares the draft models."""
    shared = SPECULATOR if module.startswith("vllm.model_executor.") else None
    return Hook(module, symbol, purpose, loses, WITH_V1, parameters, mentions, when, replace, also=shared)


HOOKS: tuple[Hook, ...] = (
    _v1(
        CONFIG, "VllmConfig._get_v1_model_runner_unsupported_features", "let method 'dspark' pass on the V1 runner", "self",
        mentions=("dspark speculative decoding",), when=CONFIG, replace=patches.unsupported_features,
    ),
    _v1(
        CONFIG, "VllmConfig.num_lookahead_tokens",
        "reserve cache slots for the whole trained block, however few drafts are asked for",
        when=CONFIG, replace=patches.num_lookahead_tokens,
        loses="full blocks when num_speculative_tokens is below the block size",
    ),
    _v1(CONFIG, "VllmConfig.use_v2_model_runner", "tells which runner the reserved slots are for", "self", when=CONFIG),
    _v1(
        "vllm.config.speculative", "SpeculativeConfig", "says the method and the draft model; takes the proposer's settings",
        "method", "num_speculative_tokens", "draft_model_config", "disable_padded_drafter_batch",
        "disable_eagle_block_drop", when=CONFIG,
    ),
    _v1(
        SCHEDULER, "Scheduler.__init__", "schedule a single new token of a cached prompt as it is, without made-up drafts",
        "vllm_config", mentions=("dynamic_sd_lookup", "num_spec_tokens"), when=SCHEDULER, replace=patches.scheduler_init,
    ),
    _v1(
        SCHEDULER, "Scheduler.schedule", "makes them up, unless k depends on the number of requests", "self",
        mentions=("dynamic_sd_lookup", "num_spec_tokens"), when=SCHEDULER,
    ),
    _v1(
        RUNNER, "EagleProposer", "the branch of the V1 runner that method 'dspark' falls into: build our proposer there",
        "vllm_config", "device", "runner", replace=patches.eagle_proposer,
    ),
    _v1(
        RUNNER, "GPUModelRunner.__init__", "builds the proposer and holds what it sets on the runner", "vllm_config",
        mentions=("EagleProposer", "use_eagle", "drafter", "use_aux_hidden_state_outputs", "effective_drafter_max_model_len"),
    ),
    _v1(
        RUNNER, "GPUModelRunner.propose_draft_token_ids",
        "calls the proposer with sampled token lists and concatenated hidden states",
        "scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states", "sample_hidden_states",
        "aux_hidden_states", "spec_decode_metadata", "common_attn_metadata", "slot_mappings",
        mentions=(
            "_get_positions", "disable_padded_drafter_batch", "use_aux_hidden_state_outputs", "prepare_next_token_ids_cpu",
            "prepare_inputs", "propose", "take_last_draft_probs",
        ),
    ),
    _v1(
        DFLASH, "DFlashProposer.__init__", "ours extends the class; makes the buffers that the block queries are written to",
        "vllm_config", "device", "runner",
        mentions=("positions", "_slot_mapping_buffer", "max_query_tokens", "max_padded_query_tokens", "dflash_causal"),
    ),
    _v1(DFLASH, "DFlashProposer.build_per_group_and_layer_attn_metadata", "attention metadata of the draft layers", "cad"),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.initialize_attn_backend", "finds the draft layers' cache", "kv_cache_config",
        mentions=("kv_cache_gid",),
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.__init__", "makes the other buffers, and decides whether q is kept",
        mentions=(
            "vllm_config", "device", "draft_model_config", "max_model_len", "max_batch_size", "input_ids", "block_size",
            "_enable_probabilistic_draft_probs", "_last_draft_probs",
        ),
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer._init_parallel_drafting_params", "finds the mask token",
        mentions=("parallel_drafting_token_id",),
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer._raise_if_padded_drafter_batch_disabled",
        "overridden: exact lengths are what we build on", "self",
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.load_model", "loads the draft model and shares the target's weights with it",
        "target_model", mentions=("model",),
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.prepare_next_token_ids_cpu", "tells which requests sampled, and the anchors",
        "sampled_token_ids",
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.prepare_inputs",
        "drops the rejected tokens from the target's outputs before they become context",
        "common_attn_metadata", "sampled_token_ids", "num_draft_tokens",
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.propose", "overridden: one DSpark round",
        "num_speculative_tokens", "target_token_ids", "target_positions", "target_hidden_states", "next_token_ids",
        "token_indices_to_sample", "common_attn_metadata", "sampling_metadata", "mm_embed_inputs",
        "num_rejected_tokens_gpu", "slot_mappings",
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer.take_last_draft_probs", "hands q to the rejection sampler",
        mentions=("_last_draft_probs",),
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer._determine_batch_execution_and_padding",
        "chooses compiled or eager for the block forward", "num_tokens",
    ),
    _v1(
        PROPOSER, "SpecDecodeBaseProposer._get_slot_mapping", "tells the draft layers where the block's K/V go",
        "num_tokens", "slot_mapping", mentions=("_slot_mapping_buffer",),
    ),
    _v1(
        "vllm.v1.attention.backend", "CommonAttentionMetadata", "describes the block queries to the attention backend",
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs",
        "num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "causal",
    ),
    _v1(
        "vllm.forward_context", "set_forward_context", "runs the block forward on the paged cache",
        "attn_metadata", "vllm_config", "num_tokens", "num_tokens_across_dp", "cudagraph_runtime_mode", "slot_mapping",
    ),
    _v1(
        f"{MODELS}.qwen3_dflash", "DFlashQwen3ForCausalLM.__init__", "builds the Qwen3 backbone without a head",
        "vllm_config", "prefix", mentions=("config", "model", "draft_id_to_target_id"),
    ),
    _v1(
        f"{MODELS}.qwen3_dflash", "DFlashQwen3ForCausalLM.combine_hidden_states",
        "projects the target's hidden states to context", "hidden_states",
    ),
    _v1(
        f"{MODELS}.qwen3_dflash", "DFlashQwen3ForCausalLM.precompute_and_store_context_kv",
        "writes the context's K/V to the paged cache", "context_states", "context_positions", "context_slot_mapping",
    ),
    _v1(
        f"{MODELS}.qwen3_dflash", "DFlashQwen3Model._project_context_kv", "replaced on CPUs: with oneDNN's product",
        "context_states", "num_ctx", "num_layers", "num_kv_heads", "head_dim",
        mentions=("_hidden_norm_weight", "_rms_norm_eps", "_fused_kv_weight", "_fused_kv_bias"),
    ),
    _v1(
        f"{LAYERS}.layernorm", "RMSNorm.forward_native", "its C kernel on CPUs", "x", "residual",
        mentions=("weight", "pass_weight", "variance_epsilon", "variance_size_override"), loses=NO_QUICK,
    ),
    _v1(f"{LAYERS}.attention", "Attention.forward", "enters attention at once", mentions=("use_direct_call",), loses=NO_QUICK),
    _v1(
        "vllm.model_executor.custom_op", "CustomOp.forward", "runs that kernel", mentions=("_forward_method",), loses=NO_QUICK,
    ),
    _v1("vllm._custom_ops", "rms_norm", "the kernel", "out", "input", "weight", "epsilon", loses=NO_QUICK),
    _v1("vllm._custom_ops", "fused_add_rms_norm", "the same", "input", "residual", "weight", "epsilon", loses=NO_QUICK),
    _v1("vllm._custom_ops", "create_onednn_mm", "the product", "weight", "primitive_cache_size", loses=NO_QUICK),
    _v1("vllm._custom_ops", "onednn_mm", "the same", "dnnl_handler", "x", "bias", loses=NO_QUICK),
    _v1(
        f"{MODELS}.qwen3_dflash", "DFlashQwen3ForCausalLM.forward", "the block forward",
        "input_ids", "positions", "inputs_embeds",
    ),
    _v1(
        f"{MODELS}.qwen3_dspark", "Qwen3DSparkForCausalLM.compute_draft_logits", "base logits over draft ids", "hidden_states",
    ),
    _v1(
        f"{MODELS}.qwen3_dspark", "Qwen3DSparkForCausalLM.load_weights", "loads the Qwen3 backbone", "weights",
        mentions=("confidence_head", "draft_id_to_target_id"),
    ),
    _v1(
        f"{MODELS}.gemma4_dspark", "Gemma4DSparkForCausalLM.__init__", "builds the Gemma 4 backbone",
        "vllm_config", "prefix", mentions=("config", "model", "draft_id_to_target_id"),
    ),
    _v1(
        f"{MODELS}.gemma4_dspark", "Gemma4DSparkForCausalLM.load_weights", "loads the Gemma 4 backbone", "weights",
        mentions=("confidence_head",),
    ),
    _v1(
        "vllm.model_executor.model_loader.weight_utils", "default_weight_loader", "loads the heads' tensors",
        "param", "loaded_weight",
    ),
    Hook(
        "vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens",
        purpose="mend it on CPUs: its kernel there leaves temperatures, top-k and top-p of drafted requests uninitialised",
        loses="the target's own distribution when sampling with speculation on a CPU",
        removal="when vLLM's CPU kernel writes floats", when=RUNNER,
        parameters=("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"), replace=patches.expand_batch_to_tokens,
    ),
    _v1(
        "vllm.v1.worker.cpu_worker", "CPUWorker.compile_or_warm_up_model", "measure step times when all else is ready", "self",
        mentions=("model_runner",), when="vllm.v1.worker.cpu_worker", replace=patches.compile_or_warm_up_model, loses=NO_COSTS,
    ),
    _v1(
        "vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "the same on a GPU", "self",
        mentions=("model_runner",), when="vllm.v1.worker.gpu_worker", replace=patches.compile_or_warm_up_model, loses=NO_COSTS,
    ),
    _v1(
        "vllm.v1.worker.gpu_input_batch", "CachedRequestState", "the requests in the batch: limits, context, tokens so far",
        "sampling_params", "num_computed_tokens", "output_token_ids", "block_ids",
    ),
    _v1(
        RUNNER, "GPUModelRunner.execute_model", "one step, made up to be timed", "scheduler_output", loses=NO_COSTS,
        mentions=("execute_model_state",),
    ),
    _v1(
        RUNNER, "GPUModelRunner._prepare_inputs", "send steps without drafts past the rejection sampler", "scheduler_output",
        mentions=("speculative_config", "scheduled_spec_decode_tokens"), loses=NO_REST,
    ),
    _v1(
        RUNNER, "GPUModelRunner.sample_tokens", "its second half; passes over the proposer if nobody drafts", "grammar_output",
        mentions=("speculative_config", "execute_model_state"), loses=f"{NO_REST}, and {NO_COSTS}",
    ),
    _v1(
        RUNNER, "ExecuteModelState", "has such a step's hidden states", "scheduler_output", "aux_hidden_states", loses=NO_REST,
    ),
    _v1(
        RUNNER, "GPUModelRunner._get_slot_mappings", "where their context goes; -1 goes nowhere",
        mentions=("block_table", "slot_mapping"), loses=NO_REST,
    ),
    _v1(RUNNER, "GPUModelRunner.take_draft_token_ids", "its drafts, as the scheduler takes them", "self", loses=NO_COSTS),
    _v1(
        SCHEDULED, "SchedulerOutput", "a made-up step", "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens",
        "total_num_scheduled_tokens", "scheduled_spec_decode_tokens", "finished_req_ids", "num_spec_tokens_to_schedule",
        loses=NO_COSTS,
    ),
    _v1(
        SCHEDULED, "NewRequestData", "a made-up request", "req_id", "prompt_token_ids", "mm_features", "sampling_params",
        "pooling_params", "block_ids", "num_computed_tokens", "lora_request", loses=NO_COSTS,
    ),
    _v1(
        SCHEDULED, "CachedRequestData", "how it goes on", "req_ids", "resumed_req_ids", "new_token_ids", "all_token_ids",
        "new_block_ids", "num_computed_tokens", "num_output_tokens", loses=NO_COSTS,
    ),
    _v1(
        "vllm.distributed.parallel_state", "get_tp_group", "let rank 0 decide for all tensor-parallel ranks",
        mentions=("_TP",), loses="DSpark with tensor parallelism on the V1 runner",
    ),
    _v1(f"{MODELS}.utils", "maybe_prefix", "keeps the Gemma 4 draft layers' names apart from the target's", "prefix", "name"),
    _v1(
        f"{MODELS}.registry", "ModelRegistry.register_model", "draft model classes with every correction head",
        "model_arch", "model_cls", loses="the gated and rnn heads",
    ),
)  # fmt: skip
