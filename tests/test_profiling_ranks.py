"""Tensor-parallel ranks measure step times together: rank 0's cache and rank 0's clock count."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from vllm_dspark.verification.cost import CostTable

pytest.importorskip("vllm")
from vllm_dspark.engine import profiling

FOUND = CostTable((1, 8), (0.1, 0.2), (1,), (0.05,))


class Ranks:
    """Rank 0 runs first and its words are kept; rank 1 hears them."""

    def __init__(self) -> None:
        self.rank_in_group = 0
        self.said: list[Any] = []

    def broadcast_object(self, value: Any) -> Any:
        if self.rank_in_group == 0:
            self.said.append(value)
            return value
        return self.said.pop(0)


class Profiler(profiling.Profiler):
    """Notes how many shapes each rank measured."""

    measured: ClassVar[list[int]] = []

    def __init__(self, runner: Any, proposer: Any, agree: Callable[[Any], Any], warming: float) -> None:
        self.proposer, self.agree, self.samples = proposer, agree, []
        self.measured.append(0)

    def _shapes(self) -> Iterator[tuple[int, int, int]]:
        yield from [(1, 0, 64)] * 5

    def _shape(self, *_: Any) -> None:
        self.measured[-1] += 1

    def _warm_up(self) -> None:
        pass

    def _upkeep(self) -> float:
        return 0.0

    def beats(self, table: CostTable) -> bool:
        return False


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks()
    Profiler.measured.clear()
    monkeypatch.setattr(profiling, "get_tp_group", lambda: ranks)
    monkeypatch.setattr(profiling, "Profiler", Profiler)
    monkeypatch.setattr(profiling.profile, "fit", lambda *_, **__: FOUND)
    monkeypatch.setattr(profiling, "key", lambda *_: {"depends": "on nothing"})
    return ranks


def table(rank: int, ranks: Ranks, folder: Path, now: float, monkeypatch: pytest.MonkeyPatch) -> CostTable:
    """What this rank gets if every look at its clock takes ``now`` seconds."""
    clock = iter(range(1000))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now * next(clock))
    ranks.rank_in_group = rank
    proposer = SimpleNamespace(draft_model_config=None, queries=7, rounds=None)
    return profiling.table(SimpleNamespace(vllm_config=None), proposer, 10.0, str(folder))


def test_the_slower_clock_of_another_rank_does_not_count(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(0, ranks, tmp_path / "first", 3.0, monkeypatch) == FOUND
    assert table(1, ranks, tmp_path / "second", 100.0, monkeypatch) == FOUND
    assert Profiler.measured == [3, 3]
    assert ranks.said == [], "a rank asked less often"


def test_what_rank_0_has_kept_is_everybodys(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(0, ranks, tmp_path, 3.0, monkeypatch)
    ranks.said.clear()
    assert table(0, ranks, tmp_path, 3.0, monkeypatch) == FOUND
    assert table(1, ranks, tmp_path / "nowhere", 3.0, monkeypatch) == FOUND
    assert Profiler.measured == [3, 0, 0], "measured again"
