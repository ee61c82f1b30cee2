"""Graphs for steps that verify nothing, where vLLM captures full graphs of one length alone: 1 + k tokens of every request.

With them a step without drafts runs as it would without speculation. Without them it would run in pieces, or eagerly, and
not drafting would be slower than not speculating. The same for what then is left of drafting, one row of context per request:
of whole blocks there are graphs up to as many tokens as vLLM captures, which is about 70 requests.
"""

import functools
from typing import Any

from vllm_dspark.engine import v2_form


def graph_manager(original: Any) -> Any:
    """vLLM's ``ModelCudaGraphManager``, with graphs for one token of every request beside those for 1 + k."""

    class ModelCudaGraphManager(original):
        _candidates: dict[Any, list[Any]]
        _capture_descs: dict[Any, list[Any]]
        decode_query_len: int

        def _init_candidates(self) -> None:
            super()._init_candidates()
            if not v2_form.all_or_nothing(self.vllm_config, on_device=self.varlen_decode):
                return
            candidates, captured, width = self._candidates, self._capture_descs, self.decode_query_len
            self._candidates, self._capture_descs, self.decode_query_len = {}, {}, 1
            try:
                super()._init_candidates()
                for size, found in self._candidates.items():
                    candidates[size] = [*filter(_single, found), *candidates.get(size, ())]
                for mode, found in self._capture_descs.items():
                    both = [*captured.get(mode, ()), *filter(_single, found)]
                    if both:
                        captured[mode] = sorted(both, key=lambda graph: graph.num_tokens, reverse=True)
            finally:
                self._candidates, self._capture_descs, self.decode_query_len = candidates, captured, width

    return ModelCudaGraphManager


def _single(graph: Any) -> bool:
    return bool(graph.uniform_token_count == 1)


def for_one_each(manager: Any) -> Any:
    """A manager of graphs for one row of each request that is asked for blocks, as vLLM's speculators ask."""
    dispatch = manager.dispatch

    @functools.wraps(dispatch)
    def wrapper(num_reqs: int, num_tokens: int, uniform_token_count: int | None, **more: Any) -> Any:
        return dispatch(num_reqs, num_reqs, 1, **more)

    manager.dispatch = wrapper
    return manager


def telling_single(gather_batch_req_state: Any) -> Any:
    """The runner's ``gather_batch_req_state``, which takes a step for uneven whose drafts are all left out: it has one token
    of every request, and such graphs are there."""

    @functools.wraps(gather_batch_req_state)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        state, uniform = gather_batch_req_state(*args, **kwargs)
        if state is not None and state.decode_graph_eligible and state.num_tokens == len(state.req_ids):
            uniform = 1
        return state, uniform

    return wrapper
