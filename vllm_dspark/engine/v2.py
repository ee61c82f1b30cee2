"""DSpark on vLLM's V2 runner: what is ours of the speculator. vLLM keeps its buffers, its context K/V, its block forward.

Drafters of the families we describe get our draft classes and our sequential stage. Those that live in the target's files
(DeepSeek-V4, Kimi, ...) keep vLLM's.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dspark.engine import landing, models, pair, v2_graphs
from vllm_dspark.engine.v2_rounds import Rounds
from vllm_dspark.options import KEY, DSparkOptions

logger = logging.getLogger("vllm.dspark")


class SpeculatorParts:
    """Put before vLLM's ``DSparkSpeculator`` among the bases: loading, the sequential stage, and whole blocks.

    Everything runs inside vLLM's graph of the draft step: buffers are made when the model is loaded, and nothing is read
    back. Confidences go to ``draft_token_confidence_probs`` ``[R, k]`` whenever the drafter has a confidence head, whether
    or not adaptive verification is on; 1 where there is none.

    Attributes:
        num_speculative_steps: drafts of a block, γ or less; ``asked`` is k, how many of them are handed on.
        block_confidences: ``[R, num_speculative_steps]``, of which ``draft_token_confidence_probs`` is the first k columns.
        rounds: who drafts; None until the engine serves, and where every drafter always drafts.
        context_only: this step only keeps the context K/V current.
        blocks: block forwards asked for. stamps: times of dummy steps while they are profiled.
    """

    device: torch.device
    model: nn.Module
    max_num_reqs: int
    draft_logits: Tensor | None
    use_acceptance_estimator: bool
    _draft_topk: int | None
    num_speculative_steps: int
    num_query_per_req: int
    enable_adaptive_verification: bool
    rounds: Rounds | None = None
    context_only = False
    blocks = 0
    stamps: list[tuple[Any, int, int]] | None = None
    query_cudagraph_manager: Any = None
    context_cudagraph_manager: Any = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        self.asked: int = speculative.num_speculative_tokens
        speculative.num_speculative_tokens = pair.block_drafts(vllm_config)
        try:
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        finally:
            speculative.num_speculative_tokens = self.asked
        self.draft_token_confidence_probs: Tensor
        self.block_confidences = self.draft_token_confidence_probs.fill_(1.0)
        self.draft_token_confidence_probs = self.block_confidences[:, : self.asked]
        self.clock = landing.clock(device)
        self._nothing = torch.full((self.max_num_reqs, self.asked), -1, dtype=torch.int64, device=device)
        additional = getattr(vllm_config, "additional_config", None)
        self.options = DSparkOptions.parse(additional.get(KEY) if isinstance(additional, dict) else None)

    def start_policy(self, runner: Any) -> None:
        """The runner is ready and nobody is served yet."""
        from vllm_dspark.engine import v2_start

        v2_start.start(runner)

    def observe_verification(self, idx_mapping: Tensor, num_sampled: Tensor, num_rejected: Tensor) -> None:
        super().observe_verification(idx_mapping, num_sampled, num_rejected)  # type: ignore[misc]
        if self.rounds is not None:
            self.rounds.sampled(num_sampled, num_rejected)

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The first k drafts of every request's block, ``[R, k]``; -1 where nothing was drafted."""
        if kwargs.get("dummy_run") or self.rounds is None:
            self._stamp(input_batch)
            drafts: Tensor = super().propose(input_batch, *args, **kwargs)  # type: ignore[misc]
            self._stamp(input_batch)
            return drafts[:, : self.asked]
        if self.rounds.begin(input_batch, kwargs.get("num_speculative_tokens")):
            drafts = super().propose(input_batch, *args, **kwargs)  # type: ignore[misc]
        else:
            with self._only_context():
                drafts = super().propose(input_batch, *args, **kwargs)  # type: ignore[misc]
            if not input_batch.has_structured_output_reqs:  # a grammar is asked about the drafts, and knows no -1
                drafts = self._nothing[: input_batch.num_reqs]
        sure = self.use_confidence_head or self.use_acceptance_estimator
        self.rounds.end(self.block_confidences if sure else None)
        return drafts[:, : self.asked]

    def _stamp(self, batch: Any) -> None:
        if self.stamps is not None:
            self.stamps.append((self.clock.mark(), batch.num_reqs, batch.num_tokens))

    @contextlib.contextmanager
    def _only_context(self) -> Iterator[None]:
        """Steps in here write context K/V; nothing else of the draft model runs. They replay graphs of their own."""
        query, self.query_cudagraph_manager = self.query_cudagraph_manager, self.context_cudagraph_manager
        self.context_only = True
        try:
            yield
        finally:
            self.query_cudagraph_manager, self.context_only = query, False

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        super().init_cudagraph_manager(cudagraph_mode)  # type: ignore[misc]
        query, queries = self.query_cudagraph_manager, self.num_query_per_req
        self.num_query_per_req = 1  # context is written of one token per request: such graphs are there for more requests
        try:
            super().init_cudagraph_manager(cudagraph_mode)  # type: ignore[misc]
        finally:
            self.num_query_per_req = queries
        self.context_cudagraph_manager = v2_graphs.for_one_each(self.query_cudagraph_manager)
        self.query_cudagraph_manager = query

    def capture(self) -> None:
        super().capture()  # type: ignore[misc]
        with self._only_context():
            super().capture()  # type: ignore[misc]

    def _num_graph_context_tokens(self, num_reqs: int) -> int:
        """Rows of context K/V that a graph writes; more are written before it runs.

        A step that only keeps them current has seldom verified drafts: it has one row per request, not one more than drafts.
        """
        if self.context_only:
            return num_reqs
        rows: int = super()._num_graph_context_tokens(num_reqs)  # type: ignore[misc]
        return rows

    def _prepare_graph_forward(self, num_reqs: int, attn_metadata: dict[str, Any] | None) -> None:
        super()._prepare_graph_forward(num_reqs, None if self.context_only else attn_metadata)  # type: ignore[misc]

    def _build_uniform_attn_metadata(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        if self.context_only:
            return None
        metadata: dict[str, Any] | None = super()._build_uniform_attn_metadata(*args, **kwargs)  # type: ignore[misc]
        return metadata

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        if not self.context_only:
            self.blocks += 1
            super()._generate_draft(*args, **kwargs)  # type: ignore[misc]

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        models.register()
        model: nn.Module = super().load_draft_model(target_model, target_attn_layer_names)  # type: ignore[misc]
        if not isinstance(model, models.DraftHeads):
            logger.info("DSpark on the V2 runner: %s drafts as vLLM has it", type(model).__name__)
            return model
        self.use_confidence_head = model.confidence_head is not None
        # vLLM looks for the head on the backbone and finds none there; its estimator is for drafters without one.
        self.use_acceptance_estimator = self.enable_adaptive_verification and not self.use_confidence_head
        model.allocate(self.max_num_reqs, self.num_speculative_steps, self.options, self._why_vllm_draws(), self._draft_topk)
        if self.draft_logits is not None and not model.writes_every_logit:
            self.draft_logits.fill_(float("-inf"))
        logger.info(
            "DSpark on the V2 runner: %s head, %d of %d drafts verified, confidence %s",
            "no" if model.markov_head is None else model.markov_head.kind,
            self.asked,
            self.num_speculative_steps,
            "from the drafter" if self.use_confidence_head else "none",
        )
        return model

    def _why_vllm_draws(self) -> str | None:
        """What only vLLM's own sampler does, or None."""
        if self.use_acceptance_estimator:
            return "vLLM's acceptance estimator reads the logits of every step"
        if getattr(self, "draft_watermarker", None) is not None:
            return "vLLM's watermarking draws the drafts"
        return "use_fp64_gumbel is set" if getattr(self, "use_fp64_gumbel", False) else None

    def _sample_sequential(self, num_reqs: int, head_hidden: Tensor) -> None:
        """Ask the draft model first, as vLLM 0.33 does by itself."""
        if isinstance(self.model, models.DraftHeads):
            self.model.sample_sequential(self, num_reqs, head_hidden)
        else:
            super()._sample_sequential(num_reqs, head_hidden)  # type: ignore[misc]


def speculator(original: Any) -> Any:
    """vLLM's ``DSparkSpeculator`` with our parts."""

    class DSparkSpeculator(SpeculatorParts, original): ...

    return DSparkSpeculator
