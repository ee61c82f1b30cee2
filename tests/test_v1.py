"""The V1 proposer's own arithmetic, without an engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


class Context:
    """Writes a token in 10 ms: the oldest 50 as soon as there are so many, none if there is no limit."""

    def __init__(self, clock: list[float], kept: int, limit: int) -> None:
        self.clock, self.tokens, self.limit = clock, kept, limit
        self.written = 0

    def add(self, _: torch.Tensor, positions: torch.Tensor, __: torch.Tensor) -> None:
        self.tokens += positions.shape[0]
        while self.tokens > self.limit:
            self._write(min(self.tokens, 50))

    def write_with(self, *new: torch.Tensor) -> None:
        self.add(*new)
        self._write(self.tokens)

    def _write(self, count: int) -> None:
        self.clock[0] += 0.010 * count
        self.tokens -= count
        self.written += count


@pytest.mark.parametrize(
    ("kept", "limit"), [(30, 1000), (47, 49), (48, 49), (49, 49), (0, 0)], ids=["at once", "-2", "-1", "oldest", "every step"]
)
def test_context_of_earlier_tokens_is_not_counted_as_drafting(monkeypatch: pytest.MonkeyPatch, kept: int, limit: int) -> None:
    """Whenever what is kept is written, of the time only that for the two tokens sampled in this step counts: 20 ms."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    now = [0.0]
    monkeypatch.setattr(v1.time, "perf_counter", lambda: now[0])
    told: list[float] = []
    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.device, proposer._sampled = torch.device("cpu"), [[5], [7]]
    proposer.context, proposer._forgets = Context(now, kept, limit), False
    proposer.rounds = SimpleNamespace(
        begin=lambda *_: np.array([0, 1]), end=lambda _, seconds, late: told.extend([seconds, seconds + late])
    )  # fmt: skip
    proposer._context_lengths = lambda _: np.array([60, 40])
    proposer._draft = lambda *_: now.__setitem__(0, now[0] + 0.25)
    metadata: Any = SimpleNamespace(num_reqs=2, slot_mapping=torch.arange(3))
    states = torch.zeros(3, 4)  # one of them a rejected draft's, or of a prompt
    assert proposer.propose(7, None, torch.arange(3), states, None, None, metadata, None) == [[], []]
    assert told == pytest.approx([0.25 + 0.02, now[0]]), "the rest is told apart"


@pytest.mark.parametrize(
    ("tokens", "shares", "left"), [(31, True, [5, 9]), (32, True, [9]), (33, True, [9]), (33, False, [7, 5, 9])]
)
def test_an_ended_request_leaves_only_full_blocks(tokens: int, shares: bool, left: list[int]) -> None:
    """In blocks of 16; the last block is the one kept for drafts."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.kv_cache_gid, proposer._shares = 1, shares
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    proposer.runner = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[None, group]))
    told: list[Any] = []
    proposer.context = SimpleNamespace(forget=lambda blocks, size: told.append((blocks, size)))
    request = SimpleNamespace(
        sampling_params=None, num_prompt_tokens=29, output_token_ids=[], num_tokens=tokens, block_ids=([1, 2, 3], [7, 5, 9])
    )
    proposer.gone(v1.Served.of(request))
    assert told == [(left, 16)]


@pytest.mark.parametrize(
    ("rows", "few", "forgets", "told"),
    [
        ([0, 2], True, True, ["add", [7, 5, 3]]),
        ([0, 1, 2], False, True, ["add", [7, 5, 4, 3], "oldest"]),
        ([0, 1, 2], True, True, ["all"]),
        ([0], False, False, ["all"]),
    ],
)
def test_a_draft_waits_for_its_own_context_alone(rows: list[int], few: bool, forgets: bool, told: list[Any]) -> None:
    """Unless everybody drafts: then all that waits is written, at once if it is little."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.kv_cache_gid, proposer._forgets = 0, forgets
    requests = {name: SimpleNamespace(block_ids=(ids,)) for name, ids in {"a": [7, 5], "b": [4], "c": [3]}.items()}
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    batch = SimpleNamespace(req_ids=[*"abc"])
    proposer.runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]), requests=requests, input_batch=batch
    )  # fmt: skip
    done: list[Any] = []
    proposer.context = SimpleNamespace(
        few=few, add=lambda *_: done.append("add"), write_with=lambda *_: done.append("all"),
        write_blocks=lambda blocks, size: done.append(blocks), write_oldest=lambda: done.append("oldest"),
    )  # fmt: skip
    nothing = torch.zeros(0)
    proposer._write_for(np.array(rows), 3, (nothing, nothing, nothing))
    assert done == told


@pytest.mark.parametrize(("device", "steps"), [("cpu", ["settle", "measure", "settle"]), ("meta", ["measure"])])
def test_memory_is_settled_for_measuring_and_after_it(monkeypatch: pytest.MonkeyPatch, device: str, steps: list[str]) -> None:
    """Measuring runs the largest steps, for which the heap grows."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import v1

    done: list[str] = []
    monkeypatch.setattr(v1.memory, "settle", lambda caches: done.append("settle"))
    monkeypatch.setattr(v1.setup, "cost", lambda _: done.append("measure"))
    monkeypatch.setattr(v1.setup, "decider", lambda *_: None)
    proposer: Any = object.__new__(v1.DSparkProposer)
    proposer.device, proposer.runner = torch.device(device), SimpleNamespace(kv_caches=[])
    proposer.start_policy()
    assert done == steps
