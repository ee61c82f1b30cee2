"""DSpark on vLLM's V1 runner: the proposer that its EAGLE branch builds when the method is ``dspark``.

One round: the target's hidden states are kept, to become context K/V in the paged cache; the policy says who drafts; those
requests run one non-causal block forward; the sequential stage turns it into drafts; the policy says how many of each are
verified, and those go to the scheduler. Scheduling is synchronous here, so sampled tokens arrive as lists and every length
is known on the host.
"""

import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dspark.engine import memory, models, pair, plain, quick, setup
from vllm_dspark.engine.context import DeferredContext
from vllm_dspark.engine.rounds import Decider, Served
from vllm_dspark.heads import sequential
from vllm_dspark.options import KEY, DSparkOptions
from vllm_dspark.verification.records import Rows

logger = logging.getLogger("vllm.dspark")


class DSparkProposer(DFlashProposer):
    """Drafts blocks for the V1 runner; DFlash's buffers and loading, DSpark's block layout and sequential stage."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        self.input_ids: Tensor
        self._last_draft_probs: Tensor | None
        speculative = vllm_config.speculative_config
        if vllm_config.scheduler_config.async_scheduling:
            raise ValueError(
                "DSpark on the V1 runner found asynchronous scheduling and needs it off; "
                "start with --no-async-scheduling, or use the V2 runner"
            )
        speculative.method = "dflash"  # DFlashProposer accepts no other
        try:
            super().__init__(vllm_config, device, runner)
        finally:
            speculative.method = "dspark"
        speculative.disable_padded_drafter_batch = True  # sampled tokens as lists, rejected ones dropped
        additional = vllm_config.additional_config
        self.options = DSparkOptions.parse(additional.get(KEY) if isinstance(additional, dict) else None)
        hf_config = self.draft_model_config.hf_config
        self.queries = pair.block_queries(hf_config)
        self.first_slot = 0 if hf_config.sample_from_anchor else 1
        self.width = self.queries - self.first_slot
        self.runner = runner
        runner.use_aux_hidden_state_outputs = True
        most = self.max_batch_size * self.queries
        self.max_query_tokens = most
        if most > self.max_padded_query_tokens:
            self.positions = torch.zeros(most, dtype=torch.int64, device=device)
            self._slot_mapping_buffer = torch.zeros(most, dtype=torch.int64, device=device)
        if most > self.input_ids.shape[0]:
            self.input_ids = torch.zeros(most, dtype=torch.int32, device=device)
        logger.info(
            "DSpark on the V1 runner: block of %d, first prediction in slot %d, options %s",
            self.queries,
            self.first_slot,
            self.options.model_dump(exclude_unset=True),
        )
        self._sampled: list[list[int]] = []
        self._warned_not_finite = False
        self._forgets = setup.forgets(vllm_config)
        self._shares = bool(vllm_config.cache_config.enable_prefix_caching)
        limit, together = setup.deferred_tokens(vllm_config, len(hf_config.eagle_aux_hidden_state_layer_ids))
        self.context = DeferredContext(self.write_context, limit, together)
        self.rounds: Decider = setup.decider(self, None)
        # Where another process reads the cache nothing is deferred, and the runner must know that something will be written.
        plain.without_speculation(runner, lambda: limit > 0 and self.rounds.rests(), self.keep)

    def _raise_if_padded_drafter_batch_disabled(self) -> None:
        """The base class would refuse what this proposer is built on: exact lengths."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        models.register()
        super().load_model(target_model)
        # The runner would give up drafting for the whole batch near the end of one request; this is done here per
        # request instead.
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.queries + 1
        self.model.allocate(self.max_batch_size, self.width, self.options)
        if self.device.type == "cpu":
            compiled = bool(self.vllm_config.compilation_config.mode)  # NONE is 0
            quick.quicken(target_model, self.model, compiled)

    def start_policy(self) -> None:
        """Measure step times, if the policy needs them; the runner is ready and nobody is served yet."""
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            memory.settle(self.runner.kv_caches)
        self.rounds = setup.decider(self, setup.cost(self))
        if on_cpu:
            memory.settle(self.runner.kv_caches)  # measuring has made the heap grow

    @torch.inference_mode()
    def keep(self, tokens: int, states: list[Tensor]) -> None:
        """Keep the hidden states of a step's T tokens, after which nobody drafts, ``[≥ T, d]`` per layer."""
        self.rounds.rested(time.perf_counter(), tokens)
        slots = self.runner.input_batch.block_table[self.kv_cache_gid].slot_mapping.gpu[:tokens]
        self.context.add(states, self.runner._get_positions(tokens), slots)
        self.rounds.end(time.perf_counter(), 0.0)

    def prepare_next_token_ids_cpu(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> None:
        """Keep the tokens sampled; the anchors are made of them if anybody drafts."""
        self._sampled = sampled_token_ids

    def prepare_inputs(
        self, common_attn_metadata: CommonAttentionMetadata, sampled_token_ids: list[list[int]], num_draft_tokens: list[int]
    ) -> tuple[CommonAttentionMetadata, Tensor]:
        self.rounds.judged(num_draft_tokens, common_attn_metadata.num_actual_tokens)
        kept: tuple[CommonAttentionMetadata, Tensor] = super().prepare_inputs(
            common_attn_metadata, sampled_token_ids, num_draft_tokens
        )
        return kept

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: None,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of every request in the batch, ``[]`` for those that do not draft, lengths up to k; ``[]`` if nobody does.

        Args:
            num_speculative_tokens: k. target_positions: ``[T]``, of the T tokens that were kept.
            target_hidden_states: concatenated target layers, ``[T, m*d]``.
            common_attn_metadata: of the R requests, rejected tokens removed.
        """
        began = time.perf_counter()
        metadata = common_attn_metadata
        self._last_draft_probs = None
        tokens = target_positions.shape[0]
        new = target_hidden_states, target_positions, metadata.slot_mapping[:tokens]
        starts = self._context_lengths(metadata)
        rows = self.rounds.begin(began, self._sampled, starts, num_speculative_tokens, tokens)
        if rows.size == 0:
            self.context.add(*new)
            self.rounds.end(time.perf_counter(), 0.0)
            return []
        drafts: list[list[int]] = [[] for _ in range(metadata.num_reqs)]
        sampled = [self._sampled[row] for row in rows.tolist()]
        written, writing = self.context.written, time.perf_counter()
        self._write_for(rows, metadata.num_reqs, new)
        written, writing = self.context.written - written, time.perf_counter() - writing
        late = writing * max(written - sum(map(len, sampled)), 0) / max(written, 1)  # of earlier steps' tokens and of prompts
        anchors = torch.tensor([tokens[-1] for tokens in sampled], dtype=torch.int32, device=self.device)
        block = self._draft(rows, starts[rows], anchors, metadata, sampling_metadata)
        if block is not None:
            confidences = None if block.confidences is None else block.confidences.float().cpu().numpy()
            lengths = self.rounds.lengths(confidences)
            self._hand_over(drafts, block, rows, lengths)
        ended = time.perf_counter()
        self.rounds.end(ended, ended - began - late, late)
        return drafts

    @property
    def _cache_block(self) -> int:
        """Tokens in a block, as requests are given them."""
        size: int = self.runner.kv_cache_config.kv_cache_groups[self.kv_cache_gid].kv_cache_spec.block_size
        return size

    def gone(self, served: Served) -> None:
        """A request has ended: nobody will read what lies in a block that it has not filled, or does not share."""
        size, request = self._cache_block, served.request
        shared = request.num_tokens // size if self._shares else 0
        self.context.forget(request.block_ids[self.kv_cache_gid][shared:], size)

    def write_context(self, states: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Turn concatenated target states ``[T, m*d]`` into the draft layers' K/V in the paged cache."""
        self.model.precompute_and_store_context_kv(self.model.combine_hidden_states(states), positions, slots)

    def _write_for(self, rows: Rows, requests: int, new: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write the context that a draft of these of so many requests reads; ``new``: what the step has added to it."""
        everybody = rows.size == requests
        if not self._forgets or (everybody and self.context.few):
            self.context.write_with(*new)
            return
        self.context.add(*new)
        names, known = self.runner.input_batch.req_ids, self.runner.requests
        blocks = [block for row in rows.tolist() for block in known[names[row]].block_ids[self.kv_cache_gid]]
        self.context.write_blocks(blocks, self._cache_block)
        if everybody:
            self.context.write_oldest()  # so that soon only few wait

    def _hand_over(self, drafts: list[list[int]], block: sequential.Drafts, rows: Rows, lengths: Rows) -> None:
        """Put the drafts that are to be verified into their requests' lists, and keep q for the rejection sampler."""
        longest = int(lengths.max(initial=0))
        if longest == 0:
            return
        chosen = block.tokens[:, :longest].tolist()
        for row, length, tokens in zip(rows.tolist(), lengths.tolist(), chosen, strict=True):
            drafts[row] = tokens[:length]
        self._keep_probabilities(block.probabilities, rows, len(drafts), longest)

    def _context_lengths(self, metadata: CommonAttentionMetadata) -> np.ndarray:
        """Tokens of context of each request, ``[R]``: also the position of its anchor."""
        exact = metadata.seq_lens_cpu_upper_bound
        lengths: np.ndarray = (metadata.seq_lens.cpu() if exact is None else exact).numpy()
        return lengths[: metadata.num_reqs]

    def _draft(
        self, rows: np.ndarray, starts: np.ndarray, anchors: Tensor, metadata: CommonAttentionMetadata, sampling: Any
    ) -> sequential.Drafts | None:
        """Block forward and sequential stage for ``rows`` with their anchors; None if the drafter's output is not finite."""
        index = torch.from_numpy(rows)
        hidden = self._block_forward(index, starts, anchors, metadata)[:, self.first_slot :]
        logits = self.model.compute_draft_logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        if not torch.isfinite(logits.sum()):
            self._warn_not_finite()
            return None
        temperature = noise = None
        if self._enable_probabilistic_draft_probs and not sampling.all_greedy:
            temperature = sampling.temperature[index]
            order = {int(row): place for place, row in enumerate(rows)}
            generators = {order[row]: g for row, g in sampling.generators.items() if row in order}
            noise = sequential.exponential_noise(logits.float(), generators)
        return sequential.draft_block(
            self.model.stage, hidden, logits, anchors, temperature, noise, self.model.target_vocab_size
        )

    def _block_forward(self, rows: Tensor, starts: np.ndarray, anchors: Tensor, metadata: CommonAttentionMetadata) -> Tensor:
        """Hidden states of the block queries, ``[n, queries, d]``: the anchor, then mask tokens."""
        count, width = rows.shape[0], self.queries
        total = count * width
        positions = torch.from_numpy(starts.astype(np.int64)).unsqueeze(1) + torch.arange(width)
        table = metadata.block_table_tensor[rows]
        slots = table.gather(1, positions // self.block_size).long() * self.block_size + positions % self.block_size
        ids = self.input_ids[:total].view(count, width)
        ids.fill_(self.parallel_drafting_token_id)
        ids[:, 0] = anchors
        self.positions[:total] = positions.flatten()
        lengths = torch.from_numpy(starts.astype(np.int32)) + width
        start_locations = torch.arange(0, total + 1, width, dtype=torch.int32)
        longest = int(lengths.max())
        block = CommonAttentionMetadata(
            query_start_loc=start_locations.to(self.device),
            query_start_loc_cpu=start_locations,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=count,
            num_actual_tokens=total,
            max_query_len=width,
            max_seq_len=longest,
            block_table_tensor=table,
            slot_mapping=slots.flatten(),
            causal=self.dflash_causal,
        )
        _, per_layer = self.build_per_group_and_layer_attn_metadata(block)
        mode, padded, across = self._determine_batch_execution_and_padding(total)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(padded, block.slot_mapping),
        ):
            hidden: Tensor = self.model(
                input_ids=self.input_ids[:padded], positions=self.positions[:padded], inputs_embeds=None
            )
        return hidden[:total].view(count, width, -1)

    def _keep_probabilities(self, q: Tensor | None, rows: np.ndarray, requests: int, k: int) -> None:
        """Hand the rejection sampler q over target ids, ``[R, k, V]``; rows that did not draft are never read."""
        if q is None:
            return
        q = q[:, :k]
        if rows.size < requests:
            spread = q.new_zeros(requests, *q.shape[1:])
            spread[torch.from_numpy(rows)] = q
            q = spread
        self._last_draft_probs = q.contiguous()

    def _warn_not_finite(self) -> None:
        if not self._warned_not_finite:
            self._warned_not_finite = True
            logger.warning("the drafter's logits are not finite; nothing is drafted in such rounds")
