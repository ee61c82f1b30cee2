"""Where step times come from: the cache, unless the engine shows that they were measured on a busy machine."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming, next_size

TRUE = CostTable((1, 64), (0.010, 0.020), (1, 8), (0.002, 0.003), label="measured")
Measure = Callable[..., CostTable]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """``profiling.table`` on an engine with the times of ``TRUE``, slowed down by turns as ``slow`` says."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import profiling

    monkeypatch.setattr(profiling, "key", lambda *_: {"device": "test"})
    monkeypatch.setattr(profiling, "get_tp_group", lambda: SimpleNamespace(broadcast_object=lambda value: value))
    monkeypatch.setattr(profiling.Profiler, "_upkeep", lambda _: 0.0)
    monkeypatch.setattr(profiling.Profiler, "_warm_up", lambda _: None)
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=32))
    runner: Any = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=999, kv_cache_groups=[group]),
        scheduler_config=SimpleNamespace(max_num_seqs=8), max_model_len=512, max_num_tokens=512, vllm_config=None,
    )  # fmt: skip
    proposer: Any = SimpleNamespace(num_speculative_tokens=7, width=7, draft_model_config=None, queries=7, rounds=None)

    def table(folder: Path, *slow: float, seconds: float = 10.0) -> CostTable:
        factors, model = itertools.cycle(slow), CostModel(TRUE, 64, 8)

        def shape(self: Any, script: Any, requests: int, drafts: int, context: int) -> None:
            drafted = requests if drafts else 0
            step = StepTiming(requests * (1 + drafts), requests, requests * 64.0, 1.0, None, drafted, drafted * 64.0)
            target, draft = model.step(step)
            for factor in itertools.islice(factors, profiling.STEPS):
                self.samples.append(dataclasses.replace(step, target_seconds=factor * target, draft_seconds=factor * draft))

        monkeypatch.setattr(profiling.Profiler, "_shape", shape)
        return profiling.table(runner, proposer, seconds, str(folder))

    return table


def test_step_times_are_kept_and_used_again(measure: Measure, tmp_path: Path) -> None:
    found = measure(tmp_path, 1.0)
    assert found.seconds[0] == pytest.approx(0.010, rel=0.01)
    (kept,) = tmp_path.iterdir()
    before = kept.read_text()
    assert measure(tmp_path, 1.2) == found
    assert measure(tmp_path, 8.0) == found, "a busy machine today says nothing about the times that were kept"
    assert kept.read_text() == before


def test_times_that_the_engine_beats_by_far_are_measured_again(measure: Measure, tmp_path: Path) -> None:
    slow = measure(tmp_path, 4.0)
    assert slow.seconds[0] == pytest.approx(0.040, rel=0.01)
    assert measure(tmp_path, 1.0).seconds[0] == pytest.approx(0.010, rel=0.01)
    assert measure(tmp_path, 1.0, seconds=0.0).seconds[0] == pytest.approx(0.010, rel=0.01)


def test_what_a_busy_machine_shows_is_used_but_not_kept(measure: Measure, tmp_path: Path) -> None:
    found = measure(tmp_path, 1.0, 3.0, 2.0, 5.0)
    assert found.seconds[0] < 0.025
    assert not list(tmp_path.iterdir())


def test_without_time_nothing_is_measured(measure: Measure, tmp_path: Path) -> None:
    assert "guess" in measure(tmp_path, 1.0, seconds=0.0).label
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [1, 3, 5, 7, 15])
def test_every_size_is_run_before_it_is_served(width: int) -> None:
    """Over 1, 2, 4, … 32 requests: all sizes up to the largest step, and all numbers of drafting requests but a few."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import profiling

    powers = [1 << power for power in range(6)]
    steps = [(requests, *step) for requests in powers for step in profiling.first_sizes(requests, width)]
    assert {tokens for _, tokens, _ in steps} == set(next_size(np.arange(2, 32 * (1 + width) + 1)).tolist())
    assert {drafting for *_, drafting in steps} >= set(range(1, 9))
    for requests, tokens, drafting in steps:
        drafts = profiling.spread(tokens - requests, requests)
        assert len(drafts) == requests
        assert sum(drafts) == tokens - requests
        assert max(drafts) <= min(width, min(drafts) + 1)
        assert requests // 2 < drafting <= requests


def test_sizes_run_as_long_as_there_is_time_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from vllm_dspark.engine import profiling

    clock = itertools.count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(clock)))
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=32))
    runner: Any = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=9999, kv_cache_groups=[group]),
        scheduler_config=SimpleNamespace(max_num_seqs=8), max_model_len=512, max_num_tokens=24,
    )  # fmt: skip
    usual = object()
    proposer: Any = SimpleNamespace(
        num_speculative_tokens=7, width=7, queries=7, rounds=usual, device=SimpleNamespace(type="cpu")
    )
    ran: list[tuple[int, list[int]]] = []

    @contextmanager
    def decoding(self: Any, requests: int, context: int) -> Iterator[Callable[[list[int]], None]]:
        assert proposer.rounds is not usual
        yield lambda drafts: ran.append((requests, drafts))

    monkeypatch.setattr(profiling.Profiler, "_decoding", decoding)
    profiler = profiling.Profiler(runner, proposer, lambda late: late, warming=9.5)
    profiler._warm_up()
    assert [requests for requests, _ in ran] == [1] * 7 + [2] * 2, "a look at the clock before every step"
    assert proposer.rounds is usual
    ran.clear()
    profiler._warm_up()
    assert not ran
    profiler = profiling.Profiler(runner, proposer, lambda late: late, warming=1000.0)
    profiler._warm_up()
    assert {requests for requests, _ in ran} == {1, 2, 4}
    assert max(requests + sum(drafts) for requests, drafts in ran) == 24, "no step is larger than the engine's largest"
    assert proposer.rounds is usual
    ran.clear()
    profiler._warm_up()
    assert not ran
