"""The fused sequential stage: one launch a step for vanilla heads at small batches or over candidates, two otherwise.

Not one launch for all steps: its programs would have to meet between steps at a barrier in memory, all of them resident, which
no graph of an engine promises, to save what overlapping launches save as well (``common.follow``): the time between a step's
last maximum and the next step's first tile. What only one launch could do, keep W2 on the multiprocessors, needs 39 MB or less
in 30 MB of shared memory that Triton does not let a program address by itself.
"""

import torch
from torch import Tensor

from vllm_dspark.heads.candidates import Candidates, group_count
from vllm_dspark.heads.formats import Stored
from vllm_dspark.heads.kernels.advance import advance
from vllm_dspark.heads.kernels.buffers import allocate
from vllm_dspark.heads.kernels.candidates import candidate_parts, candidate_step, wipe
from vllm_dspark.heads.kernels.confidence import hidden_confidences
from vllm_dspark.heads.kernels.launch import device_of, step_launch
from vllm_dspark.heads.kernels.linear import linear
from vllm_dspark.heads.kernels.step import step
from vllm_dspark.heads.kernels.top import POOL_ROWS, choose
from vllm_dspark.heads.stage import Round
from vllm_dspark.heads.weights import HeadWeights


class FusedStage:
    """Does what ``heads.stage.EagerStage`` does, in Triton.

    Args:
        weights: prepared on ``device``. max_batch: rows of the largest round, padding included; also the number of request
            slots, where rounds name them. slots: K.
        candidates: choose among these only. Processed logits must then hold -inf everywhere before the first round.
    """

    def __init__(
        self,
        weights: HeadWeights,
        max_batch: int,
        slots: int,
        device: torch.device,
        candidates: Candidates | None = None,
    ) -> None:
        self.name = "fused"
        self.candidates = candidates
        if candidates is not None:
            self._written = torch.full((max_batch, slots, candidates.most), -1, dtype=torch.int32, device=device)
            self._pool = torch.zeros(POOL_ROWS * group_count(candidates.top), dtype=torch.int64, device=device)
            self._chosen = torch.zeros(max_batch, slots, candidates.top, dtype=torch.int32, device=device)
        self.weights = weights
        self.slots = slots
        self.device = device_of(device)
        self.buffers = allocate(weights, max_batch, slots, device)
        self.broken = self.buffers.broken

    def draft(self, round: Round) -> None:
        """Write tokens, confidences and processed logits of ``round``.

        Raises:
            ValueError: more rows or slots than the buffers have, strided ids or noise, or an engine's sampler.
        """
        self._check(round)
        batch, slots, vocab = round.logits.shape
        self.broken.zero_()
        if batch == 0:
            return
        weights = self.weights
        weight_bytes = 0 if weights.w2 is None else weights.w2.values.element_size()
        self._before(round)
        if self.candidates is not None:
            self._draft_candidates(round, self.candidates)
            return
        sampled = round.draws is not None
        launch = step_launch(self.device, batch, vocab, weights.rank, weight_bytes, weights.kind, sampled)
        for k in range(slots):
            if not launch.fused:
                advance(weights, self.buffers, round, k, launch.parts, self.device)
            step(weights, self.buffers, round, k, launch, self.device)
        advance(weights, self.buffers, round, slots, launch.parts, self.device)

    def _draft_candidates(self, round: Round, candidates: Candidates) -> None:
        slots = round.logits.shape[1]
        choose(round.logits, round.index, candidates.top, self._pool, self._chosen, self.device)
        written: Tensor | None = None
        if round.draws is not None and round.draws.processed is not None:
            written = self._written
            wipe(round, written)
        parts = candidate_parts(candidates)
        for k in range(slots):
            if self.weights.kind not in ("vanilla", "none"):
                advance(self.weights, self.buffers, round, k, parts, self.device)
            candidate_step(self.weights, self.buffers, round, k, candidates, self._chosen, written, self.device)
        advance(self.weights, self.buffers, round, slots, parts, self.device)

    def _before(self, round: Round) -> None:
        """All that needs hidden states alone."""
        weights, buffers = self.weights, self.buffers
        if weights.outer is not None and buffers.projected is not None:
            assert round.hidden is not None
            rows = round.hidden.flatten(0, 1)
            linear(
                rows,
                Stored(weights.outer, None, "native"),
                buffers.projected.flatten(0, 1)[: rows.shape[0]],
                weights.outer_bias,
            )
        if round.confidences is not None and weights.confidence is not None:
            assert round.hidden is not None
            hidden_confidences(round.hidden, *weights.confidence, buffers.hidden_confidences)

    def _check(self, round: Round) -> None:
        batch, slots, vocab = round.logits.shape
        if batch > self.broken.shape[0] or slots != self.slots:
            raise ValueError(
                f"a round of {batch} rows and {slots} slots; the buffers are for up to {self.broken.shape[0]} and {self.slots}"
            )
        if self.weights.w2 is not None and len(self.weights.w2.values) != vocab:
            raise ValueError(f"markov_w2 has {len(self.weights.w2.values)} rows; the draft vocabulary has {vocab}")
        if round.logits.stride(-1) != 1 or round.tokens.stride(-1) != 1:
            raise ValueError("logits and tokens need a contiguous last dimension")
        if round.sampler is not None:
            raise ValueError("the fused stage draws by itself; a sampler of the engine's needs the torch stage")
        if self.candidates is not None and self.candidates.top > vocab:
            raise ValueError(f"{self.candidates.top} candidates; the draft vocabulary has {vocab}")
        if self.candidates is not None and round.draws is not None and round.draws.processed is not None:
            held, built = round.draws.processed.shape[0], self.broken.shape[0]
            if held > built:
                raise ValueError(f"processed logits of {held} request slots; candidate mode was built for {built}")
        if round.draws is not None and round.draws.noise is not None and not round.draws.noise.is_contiguous():
            raise ValueError("injected noise must be contiguous")
