"""A stand-in for the V2 runner around ``Rounds``: requests, a batch, a device whose results land a round late, a clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dspark.engine.v2_rounds import Rounds
from vllm_dspark.verification.asynchronous import AsynchronousPolicy, BatchCostModel
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming
from vllm_dspark.verification.records import PolicyOptions

WIDTH, CONTEXT, LONGEST = 4, 100, 100_000
FLAT = CostTable((1, 4096), (0.010, 0.0101), (1, 512), (0.002, 0.0021))
STEEP = CostTable((1, 4096), (0.001, 4.0), (1, 512), (0.002, 0.01))


class Landing:
    """Parcels that are there at once; opened only when the caller comes to it."""

    def send(self, *tensors: Any) -> Any:
        copies = [tensor.clone().numpy() for tensor in tensors]
        return SimpleNamespace(open=lambda: copies)


class World:
    """Plays an engine's rounds. ``noise`` multiplies what the clock shows: it differs between ranks, the device does not."""

    def __init__(self, table: CostTable | None = FLAT, names: tuple[str, ...] = ("a", "b"), **given: Any) -> None:
        self.names, self.truth = list(names), CostModel(table or FLAT, 4096, 512)
        self.now, self.noise, self.lag = 0.0, given.pop("noise", 1.0), 0
        self.on_device = given.pop("on_device", False)
        self.rng = np.random.default_rng(7)
        cost = None if table is None else BatchCostModel(table, 4096, 512)
        options = {name: given.pop(name) for name in ("policy", "fallback", "max_draft_tokens") if name in given}
        self.policy = AsynchronousPolicy(WIDTH, cost, PolicyOptions(**options))
        self.states = SimpleNamespace(req_id_to_index={}, num_computed_tokens_np=np.full(64, CONTEXT))
        speculator = SimpleNamespace(asked=WIDTH, num_query_per_req=WIDTH)
        self.runner = SimpleNamespace(
            req_states=self.states, max_model_len=LONGEST, max_num_tokens=4096, speculator=speculator,
            decode_query_len=WIDTH + 1,
            model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1),
            input_buffers=SimpleNamespace(query_start_loc=torch.zeros(64, dtype=torch.int32)),
        )  # fmt: skip
        self.rounds = Rounds(self.policy, self.runner, Landing(), self, **given)  # type: ignore[arg-type]
        self.sent: np.ndarray = np.zeros((0, WIDTH))
        self.log: list[tuple[bool, tuple[int, ...]]] = []

    def mark(self) -> float:
        return self.now * self.noise

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def arrive(self) -> None:
        self.states.req_id_to_index = {name: slot for slot, name in enumerate(self.names)}

    def batch(self) -> Any:
        count = len(self.names)
        return SimpleNamespace(
            req_ids=self.names, num_reqs=count, seq_lens_cpu_upper_bound=torch.full((count,), CONTEXT),
            prefill_len_np=np.full(count, CONTEXT - 1), num_computed_tokens_np=np.full(count, CONTEXT - 1),
            num_scheduled_tokens=np.full(count, 1), has_prefill=False,
        )  # fmt: skip

    def spread(self, caps: dict[str, int]) -> dict[str, int]:
        """Drafts that a step verifies of each request, from what :meth:`Rounds.verify` said."""
        return self.rounds.lengths()

    def step(self, confidence: Any, hits: np.ndarray | None = None, room: int = WIDTH, most: int | None = None) -> np.ndarray:
        """One step and one round; drafts verified of each request. ``confidence``: what the drafts of this round claim, or a
        function of the drafts verified and accepted that says so. ``room``: drafts that are scheduled of each request, of
        this round ``most``."""
        self.arrive()
        count, lengths = len(self.names), dict[str, int]()
        if self.log and room:
            drafts = dict.fromkeys(self.names, [-1] * room)
            lengths = self.spread(self.rounds.verify(dict.fromkeys(self.names, 1 + room), drafts, ranked_later=self.on_device))
        verified = np.array([lengths.get(name, 0) for name in self.names])
        drawn = self.rng.random((count, WIDTH))
        if hits is None:
            hits = np.cumprod(drawn[:, :] < confidence, axis=1).sum(axis=1)
        accepted = np.minimum(hits, verified)
        self.now += self.truth.step(StepTiming(count + int(verified.sum()), count, count * CONTEXT, 1.0))[0]
        self.rounds.sampled(torch.tensor(1 + accepted), torch.tensor(verified - accepted))
        drafting = self.rounds.begin(self.batch(), most)
        self.now += float(self.truth.drafting(count, count * CONTEXT)) if drafting else 0.0
        claimed = confidence(verified, accepted) if callable(confidence) else confidence
        claimed = np.broadcast_to(np.asarray(claimed, dtype=np.float32), (count, WIDTH))
        self.rounds.end(torch.tensor(claimed.copy()))
        self.rounds.exchange()
        self.log.append((drafting, tuple(verified.tolist())))
        return verified

    def serve(self, steps: int, confidence: float, under_way: int = 1) -> list[int]:
        """Play with a scheduler that schedules no drafts where it was told that none will come; drafts scheduled of each round.

        ``under_way``: steps that it has scheduled already when it is told.
        """
        told, room = [0] * (under_way + 1), [WIDTH]
        for _ in range(steps):
            most = 0 if told[-1 - under_way] > under_way else WIDTH
            self.step(confidence, room=room[-1], most=most)
            told.append(self.rounds.resting)
            room.append(most)
        return room[1:]

    def play(self, steps: int, confidence: float) -> np.ndarray:
        return np.array([self.step(confidence) for _ in range(steps)])
