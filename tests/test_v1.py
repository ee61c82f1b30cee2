"""The V1 proposer's own arithmetic, without an engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


def test_a_prompts_context_is_not_counted_as_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens are waiting to be written, which takes 1 s: of that, the two sampled in this step count."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    now = [0.0]
    monkeypatch.setattr(v1.time, "perf_counter", lambda: now[0])
    told: list[float] = []
    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.device, proposer._sampled = torch.device("cpu"), [[5], [7]]
    proposer.context = SimpleNamespace(
        tokens=100, add=lambda *_: None, write=lambda: now.__setitem__(0, now[0] + 1.0)
    )  # fmt: skip
    proposer.rounds = SimpleNamespace(
        begin=lambda *_: np.array([0, 1]), end=lambda _, seconds: told.append(seconds)
    )  # fmt: skip
    proposer._context_lengths = lambda _: np.array([60, 40])

    def draft(*_: Any) -> None:
        now[0] += 0.25

    proposer._draft = draft
    metadata: Any = SimpleNamespace(num_reqs=2, slot_mapping=torch.arange(100))
    states = torch.zeros(100, 4)
    assert proposer.propose(7, None, torch.arange(100), states, None, None, metadata, None) == [[], []]
    assert told == [pytest.approx(0.25 + 0.02)]
