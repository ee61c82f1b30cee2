"""Which graphs a step without drafts finds where lengths are not decided on the device: vLLM's own manager, with and without
ours; nothing is captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_dspark.engine import v2_form, v2_graphs

K, REQUESTS, SIZES = 7, 16, [1, 2, 4, 8, 16, 24, 32, 64, 128]
ORIGINAL = cudagraph_utils.ModelCudaGraphManager


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: first)
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=object))


def config(mode: CUDAGraphMode, policy: str = "adaptive", method: str = "dspark", adaptive: bool = False) -> Any:
    parallel = SimpleNamespace(
        tensor_parallel_size=1, data_parallel_size=1, pipeline_parallel_size=1, prefill_context_parallel_size=1,
        enable_batch_sharded_sampling=False,
    )  # fmt: skip
    speculative = SimpleNamespace(
        method=method, enable_adaptive_verification=adaptive, uses_dynamic_speculative_decoding=lambda: False
    )
    return SimpleNamespace(
        parallel_config=parallel, speculative_config=speculative, num_speculative_tokens=K, lora_config=object(),
        model_config=SimpleNamespace(is_hybrid=False), additional_config={"dspark": {"policy": policy}},
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS), cache_config=SimpleNamespace(use_kda_recoverssm=False),
        attention_config=SimpleNamespace(backend=None, flash_attn_version=None),
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode, cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]
        ),
    )  # fmt: skip


def manager(kind: Any, mode: CUDAGraphMode, varlen: bool = False, **given: Any) -> Any:
    made = kind(config(mode, **given), "cuda", mode, 1 + K, varlen_decode=varlen, lora_capture_cases=[0, 2])
    made._graphs_captured = True
    return made


def found(made: Any, requests: int, each: int, loras: int = 0) -> tuple[Any, int]:
    graph = made.dispatch(requests, requests * each, each, loras, max_query_len=1 + K)
    return graph.cg_mode, graph.num_tokens


OURS = v2_graphs.graph_manager(ORIGINAL)
BOTH, DECODES = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY


@pytest.mark.parametrize(("mode", "without"), [(BOTH, CUDAGraphMode.PIECEWISE), (DECODES, CUDAGraphMode.NONE)])
@pytest.mark.parametrize("loras", [0, 1])
def test_a_step_that_verifies_nothing_runs_a_full_graph(mode: CUDAGraphMode, without: CUDAGraphMode, loras: int) -> None:
    native, ours = manager(ORIGINAL, mode), manager(OURS, mode)
    for requests in (1, 3, 16):
        assert found(native, requests, 1, loras)[0] == without
        size = next(size for size in SIZES if size >= requests)
        assert found(ours, requests, 1, loras) == (CUDAGraphMode.FULL, size)
        assert found(ours, requests, 1 + K, loras) == found(native, requests, 1 + K, loras)
        assert found(ours, requests, 3, loras) == found(native, requests, 3, loras)
    assert ours.decode_query_len == 1 + K


def test_what_is_dispatched_is_captured_once_and_the_largest_first() -> None:
    ours = manager(OURS, BOTH)
    captured = ours._capture_descs[CUDAGraphMode.FULL]
    assert len(captured) == len(set(captured))
    assert {graph for graphs in ours._candidates.values() for graph in graphs} == {
        graph for graphs in ours._capture_descs.values() for graph in graphs
    }
    sizes = [graph.num_tokens for graph in captured]
    assert sizes == sorted(sizes, reverse=True)
    assert all(graph.num_tokens == graph.num_reqs * graph.uniform_token_count for graph in captured)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        (BOTH, {"method": "eagle"}),
        (BOTH, {"policy": "fixed"}),
        (BOTH, {"adaptive": True, "varlen": True}),
        (CUDAGraphMode.FULL, {}),
        (CUDAGraphMode.PIECEWISE, {}),
        (CUDAGraphMode.NONE, {}),
    ],
    ids=["another method", "policy fixed", "any lengths", "full for all", "piecewise", "eager"],
)
def test_elsewhere_the_graphs_are_vllms(mode: CUDAGraphMode, given: dict[str, Any]) -> None:
    native, ours = manager(ORIGINAL, mode, **given), manager(OURS, mode, **given)
    assert ours._capture_descs == native._capture_descs
    assert ours._candidates == native._candidates


def test_where_vllm_refuses_lengths_on_the_device_steps_are_all_or_nothing() -> None:
    assert v2_form.all_or_nothing(config(BOTH, adaptive=True), on_device=False)
    assert not v2_form.all_or_nothing(config(BOTH, adaptive=True), on_device=True)
    refused = manager(OURS, BOTH, adaptive=True)
    assert found(refused, 3, 1)[0] == CUDAGraphMode.FULL


@pytest.mark.parametrize(
    ("tokens", "eligible", "uniform"), [(3, True, 1), (24, True, 1 + K), (10, True, None), (3, False, None)]
)
def test_a_step_with_one_token_of_every_request_is_an_even_one(tokens: int, eligible: bool, uniform: int | None) -> None:
    """However many were scheduled of each."""
    state = SimpleNamespace(req_ids=["a", "b", "c"], num_tokens=tokens, decode_graph_eligible=eligible)
    said = uniform if uniform == 1 + K else None
    told = v2_graphs.telling_single(lambda *_: (state, said))
    assert told("scheduled", False) == (state, uniform)
    assert v2_graphs.telling_single(lambda *_: (None, said))("scheduled", True) == (None, said)


def test_context_finds_a_graph_however_many_requests_there_are() -> None:
    """Whole blocks of more than 9 do not fit the largest size here."""
    blocks = config(DECODES)
    blocks.compilation_config.cudagraph_capture_sizes, blocks.compilation_config.max_cudagraph_capture_size = SIZES[:-1], 64
    made = [cudagraph_utils.CudaGraphManager(blocks, "cuda", DECODES, each, [0]) for each in (K, 1)]
    made[1] = v2_graphs.for_one_each(made[1])
    for one in made:
        one._graphs_captured = True
    graphs = [[one.dispatch(count, count * K, K, num_active_loras=0, max_query_len=None) for one in made] for count in (5, 16)]
    assert [(graph.cg_mode, graph.num_reqs) for graph in graphs[0]] == [(CUDAGraphMode.FULL, 5), (CUDAGraphMode.FULL, 8)]
    assert graphs[1][0].cg_mode == CUDAGraphMode.NONE
    assert (graphs[1][1].cg_mode, graphs[1][1].num_reqs) == (CUDAGraphMode.FULL, 16)
