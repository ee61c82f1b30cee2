"""Step times of a V2 runner: which dummy steps are run, how their times are told apart, and that ranks run the same ones."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm_dspark.engine import v2_costs
from vllm_dspark.engine.v2_costs import STEPS, Profiler
from vllm_dspark.options import DSparkOptions

K, WIDTH = 7, 8


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM has it where there is no accelerator."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)


class Machine:
    """A runner whose target takes 1 ms per token, whose drafter takes 2 ms per request and 0.1 ms to write a token's K/V."""

    def __init__(self, **more: Any) -> None:
        self.now, self.ran = 0.0, []
        self.max_num_reqs, self.max_num_tokens, self.max_model_len = 4, 4096, 2048
        self.decode_query_len = WIDTH
        self.cudagraph_manager = more.get("graphs")
        self.context_only = False
        self.speculator = SimpleNamespace(
            stamps=None, num_query_per_req=K, query_cudagraph_manager=None, _only_context=lambda: self,
            clock=SimpleNamespace(seconds=lambda first, second: second - first),
        )  # fmt: skip

    def __enter__(self) -> None:
        self.context_only = True

    def __exit__(self, *_: Any) -> None:
        self.context_only = False

    def _dummy_run(self, tokens: int, context_len: int, uniform_decode: bool, skip_eplb: bool) -> None:
        requests = tokens // WIDTH if uniform_decode else min(tokens, self.max_num_reqs)
        self.ran.append((tokens, context_len, uniform_decode))
        for seconds in (0.001 * tokens, 0.0001 * tokens if self.context_only else 0.002 * requests):
            self.now += seconds
            self.speculator.stamps.append((self.now, requests, tokens))


def test_target_and_drafter_are_told_apart() -> None:
    machine = Machine(graphs=SimpleNamespace(captured_token_counts=lambda: [1, 8, 32]))
    table = Profiler(machine, lambda late: late).table(float("inf"))
    assert table.target_curve(32)[[1, 2, 4, 8, 16, 32]] == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.016, 0.032], rel=0.02)
    assert table.draft_curve(4)[[1, 2, 4]] == pytest.approx([0.002, 0.004, 0.008], rel=0.02)
    assert table.captured == 32
    assert table.context_per_token == pytest.approx(0.0001)
    assert table.context_only == pytest.approx(0.0, abs=1e-6)
    contexts = {context for _, context, _ in machine.ran}
    assert contexts == {v2_costs.SHORT, 2048 - WIDTH}
    assert {(tokens, uniform) for tokens, _, uniform in machine.ran} >= {(4, False), (32, True)}
    assert len(machine.ran) % (1 + STEPS) == 0
    assert machine.speculator.stamps is None


def test_a_step_costs_what_the_graph_does_that_it_is_padded_to() -> None:
    """Whether that graph was measured or lies between two that were."""
    captured = [1, 2, 4, 8, 16, 24, 32]
    graphs = SimpleNamespace(captured_token_counts=lambda: captured, varlen_decode=True)
    machine, uniform = Machine(graphs=graphs), Machine(graphs=SimpleNamespace(captured_token_counts=lambda: captured))
    machine.max_num_reqs = uniform.max_num_reqs = 64
    for each in (machine, uniform):
        each.speculator.query_cudagraph_manager = SimpleNamespace(
            captured_token_counts=lambda: [K * n for n in (1, 2, 3, 4, 6)]
        )
    for each in (machine, uniform):
        table = Profiler(each, lambda late: late).table(float("inf"))
        assert table.target_curve(32)[[9, 16, 17, 24, 25]] == pytest.approx([0.016, 0.016, 0.024, 0.024, 0.032], rel=0.05)
        assert table.draft_curve(64)[[3, 5]] == pytest.approx([0.006, 0.012], rel=0.05)
        assert table.draft_captured == 6
    assert (24, v2_costs.SHORT, False) in machine.ran
    assert (24, v2_costs.SHORT, False) not in uniform.ran  # graphs there are of even steps


def test_no_point_is_added_beyond_what_was_measured() -> None:
    assert v2_costs.dense([2, 8], [0.2, 0.8], [1, 4, 8, 16]) == ((2, 4, 8), pytest.approx((0.2, 0.4, 0.8)))
    assert v2_costs.dense([2, 8], [0.2, 0.8], []) == ((2, 8), pytest.approx((0.2, 0.8)))


def test_times_of_another_kind_of_engine_are_not_taken_for_this_ones() -> None:
    def runner(**more: Any) -> Any:
        given = {"graphs": "FULL", "lora": None, "asked": K, "manager": object(), "dtype": "auto", **more}
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_mode=given["graphs"]), lora_config=given["lora"],
            cache_config=SimpleNamespace(cache_dtype=given["dtype"]),
            speculative_config=SimpleNamespace(draft_sample_method="greedy"),
        )  # fmt: skip
        return SimpleNamespace(
            vllm_config=config, adaptive_verification=given["manager"], speculator=SimpleNamespace(asked=given["asked"])
        )

    usual = v2_costs._key(runner(), DSparkOptions())
    others = [{"graphs": "PIECEWISE"}, {"lora": object()}, {"asked": 3}, {"manager": None}, {"dtype": "fp8"}]
    assert all(v2_costs._key(runner(**more), DSparkOptions()) != usual for more in others)
    assert v2_costs._key(runner(), DSparkOptions(w2_format="int8")) != usual
    assert v2_costs._key(runner(), DSparkOptions(policy="fixed", profile_seconds=1.0)) == usual


def test_every_rank_stops_where_rank_0_does() -> None:
    said: list[bool] = []

    def first(_: bool) -> bool:
        said.append(len(said) >= 3)
        return said[-1]

    one, two = Machine(), Machine()
    Profiler(one, first).table(0.0)
    answers = iter(said)
    Profiler(two, lambda _: next(answers)).table(float("inf"))
    assert one.ran == two.ran
    assert len(one.ran) == (1 + 3 + 2) * (1 + STEPS)


def test_a_table_that_the_engine_beats_by_far_is_noticed() -> None:
    table = Profiler(Machine(), lambda late: late).table(float("inf"))
    assert not Profiler(Machine(), lambda late: late).beats(table)
    slow = dataclasses.replace(table, seconds=tuple(2 * s for s in table.seconds), draft_seconds=(0.01, 0.02, 0.03))
    assert Profiler(Machine(), lambda late: late).beats(slow)


def test_without_time_one_shape_is_measured() -> None:
    """Where a step takes longer than there is time, it is well to know that."""
    machine = Machine()
    table = Profiler(machine, lambda late: late).table(0.0)
    assert table.sizes == (1,)
    assert table.target_curve(1)[1] == pytest.approx(0.001)
    assert len(machine.ran) == (1 + 2) * (1 + STEPS)
