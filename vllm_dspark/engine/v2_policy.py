"""The policy's hands in the V2 runner: how many of the drafts that were scheduled are verified.

The scheduler schedules k drafts of every request, whether or not they were made, unless it has been told that nobody drafts
(counting.py); the runner asks its ``adaptive_verification`` for less. There are two forms:

- *on the device*, vLLM's own: the host fixes the budget, the device spends it on the best drafts of this round. It needs
  attention that takes lengths the host does not know, and graphs captured for them.
- *on the host*: the lengths too are fixed before the round, from earlier ones. The host knows every length, so this runs with
  any attention backend, eagerly, and with LoRA.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from vllm_dspark.engine.v2_rounds import Rounds

Counts = NDArray[np.int32]


class HostVerification:
    """Takes the place of vLLM's ``AdaptiveVerificationManager``; the runner calls the methods in this order."""

    def __init__(self, rounds: Rounds, runner: Any, tail: tuple[Any, ...] = ()) -> None:
        """Args: tail: what this vLLM expects of :meth:`reallocate_drafts` beside the three results."""
        self.rounds, self.runner, self._tail = rounds, runner, tail
        self._order: list[str] = []
        self._lengths: Counts = np.zeros(0, dtype=np.int32)
        self._begins: Counts = np.zeros(1, dtype=np.int32)

    def add_request(self, req_idx: int) -> None:
        """Nothing is kept per slot."""

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Tokens of the step with the drafts that are verified."""
        self.rounds.verify(num_tokens_per_req, draft_tokens, ranked_later=False)
        lengths = self.rounds.lengths()
        self._order = sort_batch_req_ids(num_tokens_per_req, draft_tokens, self.runner.decode_query_len)
        self._lengths = np.array([lengths.get(name, 0) for name in self._order], dtype=np.int32)
        return sum(num_tokens_per_req.values()) - sum(map(len, draft_tokens.values())) + int(self._lengths.sum())

    def compact_batch(
        self, num_draft_tokens_per_req: Counts, num_scheduled_tokens: Counts, cu_num_logits_np: Counts
    ) -> tuple[Counts, Counts]:
        """Tokens of each request, ``(R,)``, and where their logits begin, ``(R + 1,)``.

        ``num_scheduled_tokens`` is changed in place: all that the runner plans on the host, LoRA included, is then exact.
        """
        bonus = self.runner.model_state.num_new_sampled_tokens_per_step
        num_scheduled_tokens -= num_draft_tokens_per_req - self._lengths
        begins = np.zeros_like(cu_num_logits_np)
        np.cumsum(self._lengths + bonus, out=begins[1:])
        self._begins = begins
        return num_scheduled_tokens, begins

    def reallocate_drafts(self, req_ids: Sequence[str], idx_mapping: Tensor) -> tuple[Any, ...]:
        """Where logits begin and queries begin, on the device, and the number of drafts."""
        if list(req_ids) != self._order:
            raise RuntimeError(f"the batch is {list(req_ids)}, lengths were chosen for {self._order}; please report this")
        begins = async_tensor_h2d(self._begins, idx_mapping.device)
        return begins, self.runner.input_buffers.query_start_loc, int(self._lengths.sum()), *self._tail

    def record_confidences(self, confidence_probs: Tensor, input_batch: Any) -> None:
        """They have been sent to the host already."""


def device_verification(original: Any) -> Any:
    """vLLM's ``AdaptiveVerificationManager`` with our policy's budgets and calibration; compaction and ranking stay vLLM's."""

    class DeviceVerification(original):
        rounds: Rounds  # set before anything is served
        num_speculative_steps: int
        _confidence_probs: Tensor

        def warm_up(self) -> None:
            """Rank made-up drafts, for what vLLM compiles then.

            Seconds otherwise, in the first step that verifies some of its drafts; and what the compiler leaves in memory would
            be looked through at every garbage collection, had vLLM not set aside what is there when an engine is ready.
            """
            for requests in (1, 3, 5):  # one by itself, and others than there are drafts: the compiler tells these apart
                names = [str(index) for index in range(min(requests, len(self._confidence_probs)))]
                slots = torch.arange(len(names), device=self._confidence_probs.device)
                self._batch_budget = dict.fromkeys(names, self.num_speculative_steps), dict.fromkeys(names, 1), len(names)
                with torch.inference_mode(), gpu_sync_allowed():
                    self.reallocate_drafts(names, slots)

        def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
            """None: step times are measured once for all forms, see v2_costs.py."""
            return iter(())

        def set_initial_cost_curves(self, samples: list[Any]) -> None:
            """The policy has its own."""

        def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
            caps = self.rounds.verify(num_tokens_per_req, draft_tokens, ranked_later=True)
            sure = {name: count - len(draft_tokens.get(name, ())) for name, count in num_tokens_per_req.items()}
            room = max(0, self._max_total_logits - len(sure) * self.num_bonus_tokens)
            budget = min(self.rounds.allotment.budget, room)
            self._batch_budget = caps, sure, budget
            return sum(sure.values()) + budget

        def reallocate_drafts(self, req_ids: list[str], idx_mapping: Tensor) -> tuple[Any, ...]:
            raw = self._confidence_probs
            caps, _, budget = self._batch_budget
            if 0 < budget < sum(caps.values()):
                scale, shift = (async_tensor_h2d(each, raw.device) for each in self.rounds.corrections(*raw.shape))
                self._confidence_probs = torch.logit(raw, eps=1e-6).mul_(scale).add_(shift).sigmoid_()
            try:
                result: tuple[Any, ...] = super().reallocate_drafts(req_ids, idx_mapping)
            finally:
                self._confidence_probs = raw
            return result

        def record_confidences(self, confidence_probs: Tensor, input_batch: Any) -> None:
            """What the device will rank by, if anything was drafted; the copies for the host have been sent already."""
            rounds = getattr(self, "rounds", None)  # some kernels' warm-up steps come before there are any
            if rounds is None or rounds.drafted:
                self._confidence_probs[input_batch.idx_mapping] = confidence_probs[: input_batch.num_reqs]

    return DeviceVerification
