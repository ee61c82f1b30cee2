"""The V1 proposer's own arithmetic, without an engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(
    ("kept", "adding", "writing", "counted"),
    [(100, 0.0, 1.0, 0.02), (2, 1.0, 0.0, 0.0)],
    ids=["before drafting", "as one of many"],
)
def test_context_of_earlier_tokens_is_not_counted_as_drafting(
    monkeypatch: pytest.MonkeyPatch, kept: int, adding: float, writing: float, counted: float
) -> None:
    """What is kept takes 1 s to write: for a draft, when two tokens of it were sampled in this step, or as it is too much."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    now = [0.0]
    monkeypatch.setattr(v1.time, "perf_counter", lambda: now[0])
    told: list[float] = []

    def takes(seconds: float) -> Any:
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.device, proposer._sampled = torch.device("cpu"), [[5], [7]]
    proposer.context = SimpleNamespace(tokens=kept, add=takes(adding), write=takes(writing))
    proposer.rounds = SimpleNamespace(
        begin=lambda *_: np.array([0, 1]), end=lambda _, seconds: told.append(seconds)
    )  # fmt: skip
    proposer._context_lengths = lambda _: np.array([60, 40])
    proposer._draft = takes(0.25)
    metadata: Any = SimpleNamespace(num_reqs=2, slot_mapping=torch.arange(100))
    states = torch.zeros(100, 4)
    assert proposer.propose(7, None, torch.arange(100), states, None, None, metadata, None) == [[], []]
    assert told == [pytest.approx(0.25 + counted)]
