"""Between the V2 runner and the policy: what landed of earlier rounds, and what is decided for the next.

The runner prepares a step while the device still works on the one before. So a round's confidences are read when the next
round has been asked for, and its verdict one round after that, always at the same point and never "when it is ready": every
rank of a tensor-parallel group sees the same numbers in the same order. Times differ between ranks; rank 0's are used on all.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.engine.landing import Clock, Landing, Parcel, counts
from vllm_dspark.engine.rounds import request_options
from vllm_dspark.metrics import Counters
from vllm_dspark.verification.asynchronous import Allotment, AsynchronousPolicy, Flight, Step, nobody
from vllm_dspark.verification.cost import StepTiming
from vllm_dspark.verification.records import RoundInput, Rows
from vllm_dspark.verification.standing import ONCE

logger = logging.getLogger("vllm.dspark")

EAGER, EVERY = 64, 8  # all of the first rounds at a load are timed, then one of so many
OTHER_LOAD = 0.3  # it is another load with more than this share of the requests, and more than two, more or fewer
RESTING = "resting"
FIRST = 1000.0  # logit of what comes before everything else
SHARED = 64  # rounds between two exchanges of times, where there are several ranks


@dataclass
class Landed:
    """One step of the runner and the round that followed it.

    Attributes:
        names: the batch's order. flight: of the round; judged: the flight that the step verified. room: drafts that were
            scheduled of it. outcome: tokens sampled and logits rejected, each ``(R,)``. confidences: ``(R, γ)``.
        started, ended: of the drafting. shape: of the step, if it can be learned from; without its drafts.
        verified: drafts in all, once that has landed.
    """

    names: Sequence[str]
    flight: Flight
    judged: Flight
    room: Mapping[str, int]
    outcome: Parcel | None
    started: Any
    shape: StepTiming | None
    drafting: bool = True
    confidences: Parcel | None = None
    ended: Any = None
    verified: int = 0


class Rounds:
    """Runs the policy for the requests of a V2 runner.

    Attributes:
        allotment: of the step to come. resting: rounds after the last in which nobody will draft, as far as is known.
    """

    def __init__(
        self,
        policy: AsynchronousPolicy,
        runner: Any,
        landing: Landing,
        clock: Clock,
        agree: Callable[[Any], Any] | None = None,
        counters: Counters | None = None,
        whole: bool = False,
        always: bool = False,
    ) -> None:
        """Begin without a history.

        Args:
            agree: gives every rank rank 0's value; None where there is one rank. whole: steps verify everything or nothing.
            always: the block forward runs whatever is decided, because other engines wait for it.
        """
        self.policy, self.runner = policy, runner
        self._landing, self._clock, self._agree, self._counters = landing, clock, agree, counters
        self._whole, self._always = whole, always
        self._options: dict[str, Any] = {}
        self._arrived: set[str] = set()  # since the last round
        self._names: Sequence[str] = ()
        self._flight = nobody(0, "nothing yet")
        self._verifying = self._flight
        self._room: Mapping[str, int] = {}
        self._outcome: Parcel | None = None
        self._gone: list[str] = []
        self._landed: list[Landed] = []  # the last four, newest first
        self._times: list[StepTiming] = []
        self._round = 0
        self.resting = 0
        self._load = 0  # requests when all rounds began to be timed
        self._eager = 0  # all rounds before this one are timed
        self.allotment = Allotment(counts([]), 0, counts([]))

    def announce(self, request: str, extra_args: Any) -> None:
        """A request comes, with options of its own among its extra arguments."""
        self._options[request] = request_options(extra_args)
        self._arrived.add(request)  # one that was preempted has a new slot: what it drafted is gone

    def verify(self, tokens: Mapping[str, int], drafts: Mapping[str, Sequence[int]], ranked_later: bool) -> dict[str, int]:
        """Most drafts of each request that the step to come verifies; how many in all, and how they are spread, is in
        :attr:`allotment`.

        Args:
            tokens, drafts: scheduled for each request; drafts that were not made are among them. ranked_later: see
                :meth:`AsynchronousPolicy.allot`.
        """
        flight = self._flight
        room = {name: len(drafts.get(name, ())) for name in tokens}
        limits = counts([0 if name in self._arrived else room.get(name, 0) for name in flight.requests])
        sure = sum(tokens.values()) - sum(room.values())
        context = float(self.runner.req_states.num_computed_tokens_np[self._slots(list(tokens))].sum())
        self.allotment = self.policy.allot(flight, Step(sure, len(tokens), context), limits, ranked_later, self._whole)
        self._verifying, self._room = flight, room
        return dict.fromkeys(tokens, 0) | dict(zip(flight.requests, self.allotment.caps.tolist(), strict=True))

    def lengths(self) -> dict[str, int]:
        """How the allotment is spread over the flight's requests."""
        return dict(zip(self._verifying.requests, self.allotment.lengths.tolist(), strict=True))

    def corrections(self, slots: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """How this round's confidences are to be ranked: the survival of drafts is that of σ(scale · logit(c) + shift).

        From earlier rounds alone, like the budget. Drafts that are verified whatever the others' are worth come first.

        Args:
            slots: of the runner's requests. width: drafts of each.

        Returns:
            scale ``(width,)`` and shift ``(slots, width)``.
        """
        flight = self._verifying
        factor, own = self.policy.history.corrections(flight.slots)
        shift = np.zeros((slots, width), dtype=np.float32)
        here = counts([self.runner.req_states.req_id_to_index.get(name, -1) for name in flight.requests])
        shift[here[here >= 0]] = np.where(flight.adaptive[:, None], own[:, :width], FIRST)[here >= 0]
        return (factor / self.policy.sts.temperatures)[:width].astype(np.float32), shift

    def _slots(self, names: Sequence[str]) -> NDArray[np.int64]:
        where = self.runner.req_states.req_id_to_index
        return counts([where[name] for name in names])

    def sampled(self, num_sampled: Any, num_rejected: Any) -> None:
        """The step has sampled: tokens of each request and logits rejected, device tensors ``(R,)``."""
        self._outcome = self._landing.send(num_sampled, num_rejected) if self._room else None

    def begin(self, batch: Any, most: int | None = None) -> bool:
        """Choose who drafts; whether the block forward has to run.

        Args:
            most: drafts of each request that the scheduler can use; None: all; 0: it was told that nobody drafts, and the
                policy is only asked whether that still holds.
        """
        self._round += 1
        names = list(batch.req_ids)
        if names != self._names or self._arrived:
            self._meet(names)
        self._arrived.clear()
        clean = self._rest(batch, names) if most == 0 and not self._always else self._decide(batch, names, most)
        shape = None
        if clean and self._times_this(len(names)):
            context = float(batch.seq_lens_cpu_upper_bound[: len(names)].sum())
            shape = StepTiming(len(names), len(names), context, 1.0)
        now = Landed(
            names, self._flight, self._verifying, self._room, self._outcome,
            None if shape is None else self._clock.mark(), shape,
        )  # fmt: skip
        self._verifying, self._room, self._outcome = nobody(self._round, "verified nothing"), {}, None
        now.drafting = bool(self._flight.slots.size) or self._always
        self._landed = [now, *self._landed[:3]]
        return now.drafting

    def _decide(self, batch: Any, names: list[str], most: int | None) -> bool:
        """Ask the policy who drafts; whether the step only decoded."""
        inputs, rows, clean = self._inputs(batch, names, most)
        self._flight, self.resting = nobody(self._round, "nobody can draft"), 0
        if rows:
            self.policy.begin_round(inputs)
            self._flight = self.policy.depart()
            self._flight.rows = counts(rows)[self._flight.rows]
            self.resting = 0 if self._always else self.policy.resting()
        return clean

    def _rest(self, batch: Any, names: list[str]) -> bool:
        """Nobody drafts; whether the step only decoded."""
        clean = not batch.has_prefill
        sampling = names if clean else self._inputs(batch, names, 0)[0].requests
        self._flight = nobody(self._round, RESTING)
        self.resting = self.policy.resting() if sampling and self.policy.rest(sampling) else 0
        return clean

    def _times_this(self, requests: int) -> bool:
        """Whether this round is timed; a time takes two rounds in a row."""
        if abs(requests - self._load) > max(OTHER_LOAD * self._load, 2) or not self._load:
            self._load, self._eager = requests, self._round + EAGER
        elif self._flight.reason in ONCE:  # decided in order to learn from it
            self._eager = max(self._eager, self._round + 2)
        return self._round < self._eager or self._round % EVERY < 2

    def end(self, confidences: Any) -> None:
        """The round has been asked for, or was skipped; learn from what has landed meanwhile.

        Args:
            confidences: device tensor ``(R, γ)``; None: there is no head.
        """
        now = self._landed[0]
        if now.shape is not None:
            now.ended = self._clock.mark()
        if now.flight.slots.size and confidences is not None:
            now.confidences = self._landing.send(confidences[: len(now.names)])
        self._learn()
        self.policy.finish(self._gone)
        self._gone = []

    @property
    def drafted(self) -> bool:
        """Whether the last round had a block forward."""
        return bool(self._landed) and self._landed[0].drafting

    def last_outcome(self) -> tuple[list[str], Parcel] | None:
        """Names of the batch and the outcome of the step that was sampled last; None if no drafts were scheduled for it."""
        last = self._landed[0] if self._landed else None
        return (list(last.names), last.outcome) if last is not None and last.outcome is not None else None

    def _learn(self) -> None:
        """The round before's confidences, the verdict of the step before it, and the time of the round before that."""
        if len(self._landed) < 2:
            return
        _, last, *earlier = self._landed
        if last.outcome is None:  # no drafts were scheduled
            none = np.zeros(len(last.names), dtype=np.int64)
            self._judge(last, none, none)
        else:
            sampled, rejected = (array.astype(np.int64) for array in last.outcome.open())
            verified = np.where(sampled > 0, np.maximum(sampled + rejected - 1, 0), 0)
            last.verified = int(verified.sum())
            self._judge(last, verified, np.maximum(sampled - 1, 0))
        if last.flight.slots.size:
            raw = None if last.confidences is None else last.confidences.open()[0][last.flight.rows]
            self.policy.drew(last.flight, raw)
        if len(earlier) == 2:  # the device is past all of their marks
            after, before = earlier
            if before.ended is not None and after.shape is not None and not set(before.names).isdisjoint(after.names):
                self._time(before, after, after.shape)

    def _judge(self, last: Landed, verified: Rows, accepted: Rows) -> None:
        place = {name: row for row, name in enumerate(last.names)} if last.judged.slots.size else {}
        rows = counts([place.get(name, -1) for name in last.judged.requests])
        here = rows >= 0
        self.policy.judged(last.judged, np.where(here, verified[rows], 0), np.where(here, accepted[rows], 0))
        if self._counters is not None:
            drafted = dict.fromkeys(last.judged.requests)
            known = sum(room for name, room in last.room.items() if name in drafted)
            done, right = int(verified.sum()), int(np.minimum(accepted, verified).sum())
            every = sum(last.room.values())
            self._counters.add(done, right, max(known - done, 0), every - known, not last.drafting)

    def _time(self, before: Landed, after: Landed, shape: StepTiming) -> None:
        """The time from one drafting to the next belongs to the drafting and to the step that verified it."""
        total = self._clock.seconds(before.started, after.started)
        drafting = self._clock.seconds(before.started, before.ended) if before.drafting else 0.0
        drafted = len(before.names) if before.drafting else 0
        self._times.append(
            replace(
                shape, tokens=shape.tokens + after.verified, target_seconds=total - drafting, drafted=drafted,
                draft_context=shape.context if drafted else 0.0, draft_seconds=drafting,
            )
        )  # fmt: skip
        if self._agree is None:
            self._hand_over()

    def _hand_over(self) -> None:
        times, self._times = self._times, []
        for timing in times:
            self.policy.timed(timing)

    def exchange(self) -> None:
        """Every so many rounds, take rank 0's times instead of our own."""
        if self._agree is not None and self._round % SHARED == 0:
            self._times = self._agree(self._times)
            self._hand_over()

    def _meet(self, names: list[str]) -> None:
        """Tell the policy of requests that came and of those that went."""
        alive = self.runner.req_states.req_id_to_index
        self._gone = [name for name in self._names if name not in alive]
        known = set(self._names).difference(self._gone, self._arrived)
        for name in names:
            if name not in known:
                options = self._options.get(name) or request_options(None)
                kind = options.dspark_policy
                kind = None if kind == "adaptive" and self.policy.cost is None else kind
                self.policy.add(name, options.dspark_max_draft_tokens, kind)
        self._options = {name: options for name, options in self._options.items() if name in alive}
        self._names = names

    def _inputs(self, batch: Any, names: list[str], most: int | None) -> tuple[RoundInput, list[int], bool]:
        """Who can draft, the rows of those, and whether the step only decoded."""
        count = batch.num_reqs
        contexts = batch.seq_lens_cpu_upper_bound[:count].numpy().astype(np.int64)
        prompt = batch.prefill_len_np[:count].astype(np.int64)
        there = batch.num_computed_tokens_np[:count] + batch.num_scheduled_tokens[:count]
        sampling = there >= prompt
        room = self.runner.max_model_len - self.runner.speculator.num_query_per_req
        asked = self.runner.speculator.asked
        limits = np.where(contexts <= room, asked if most is None else min(asked, most), 0)
        rows = sampling.nonzero()[0]
        waiting = int(np.maximum(prompt - there, 0).sum())
        waiting = min(waiting, max(self.runner.max_num_tokens - rows.size, 0))
        inputs = RoundInput(
            [names[row] for row in rows.tolist()], contexts[rows], limits[rows], waiting, float(contexts[~sampling].sum())
        )
        return inputs, rows.tolist(), bool(sampling.all()) and not batch.has_prefill
