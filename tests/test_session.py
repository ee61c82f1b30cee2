"""Runs side by side: whoever is behind goes on, and a pause is no time for those that are paused."""

import time
from typing import Any

from vllm_dspark.engine import session
from vllm_dspark.engine.session import Run, side_by_side


class Engine:
    """Generates so many tokens a slice, until it has them all."""

    def __init__(self, name: str, pace: int, tokens: int, log: list[str]) -> None:
        self.name, self.pace, self.tokens, self.log = name, pace, tokens, log
        self.done = 0

    def go_on(self, seconds: float) -> Run | int:
        self.log.append(self.name)
        self.done += self.pace
        return self.done if self.done < self.tokens else Run([[0] * self.tokens], [self.name], seconds)


def test_the_engine_that_is_behind_goes_on():
    log: list[str] = []
    engines: list[Any] = [Engine("fast", 10, 40, log), Engine("slow", 5, 40, log)]
    runs = side_by_side(engines)
    assert [run.texts for run in runs] == [["fast"], ["slow"]]
    assert log.count("fast") == 4
    assert log.count("slow") == 8
    for place in range(1, len(log)):
        ahead = 10 * log[:place].count("fast") - 5 * log[:place].count("slow")
        assert -5 <= ahead <= 10


def test_a_paused_engine_does_not_see_the_time_go_by(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])  # and put back what _Runs puts in its place

    def run(engine: Any) -> Any:
        yield 0
        seen = [time.perf_counter()]
        for tokens in (1, 2):
            now[0] += 0.5
            yield tokens
            seen.append(time.perf_counter())
        return seen

    monkeypatch.setattr(session, "_run", run)
    runs = session._Runs()
    runs.begin(None)
    now[0] += 7.0
    assert runs.go_on(None, 0.5) == 1
    now[0] += 20.0
    assert runs.go_on(None, 0.5) == 2
    now[0] += 3.0
    assert runs.go_on(None, 0.5) == [100.0, 100.5, 101.0]
