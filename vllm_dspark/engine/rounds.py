"""Between the V1 runner and the policy: what a round looked like, and what is decided for the next.

Everything here is host arithmetic on lists and small arrays; the policy itself knows nothing of vLLM.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_dspark.options import RequestOptions
from vllm_dspark.verification.cost import StepTiming
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import NOBODY, Outcomes, RoundInput, Rows
from vllm_dspark.verification.standing import MEASURING

logger = logging.getLogger("vllm.dspark")

_SAMPLE, _SETTLED = 32, 2  # of so many rounds in a row in which nobody drafts, one is timed; and this one of them


class Decider(Protocol):
    """What the proposer asks once per round, in this order; ``lengths`` only if rows were returned."""

    def rests(self) -> bool:
        """Whether nobody drafts after a step that verifies nothing; if so, ``rested`` and ``end`` follow and nothing else."""

    def rested(self, now: float, tokens: int) -> None:
        """That step ran on so many tokens and ended, clock ``now``, seconds."""

    def judged(self, drafts: Sequence[int], tokens: int) -> None:
        """The step verified so many drafts of each request and ran on so many tokens."""

    def begin(
        self, now: float, sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], k: int, tokens: int | None = None
    ) -> Rows:
        """Rows of the batch that draft."""

    def lengths(self, confidences: NDArray[np.floating] | None) -> Rows:
        """Drafts to verify of each of those rows."""

    def end(self, now: float, seconds: float, late: float = 0.0) -> None:
        """The round's drafting ended; ``seconds`` were spent on it, and ``late`` on context of earlier steps."""


class Rounds:
    """Runs the policy for the requests of a V1 runner."""

    def __init__(
        self, policy: Policy, runner: Any, queries: int, max_model_len: int, gone: Callable[["Served"], None] | None = None
    ) -> None:
        """Begin with nobody.

        Args:
            queries: of a block forward; a request drafts only while they all fit ``max_model_len``. gone: told who ended.
        """
        self.policy, self.runner, self._gone = policy, runner, gone
        self.queries, self.max_model_len = queries, max_model_len
        self._batch: list[str] = []  # in batch order
        self._before: list[str] = []  # the batch of the round before
        self._served: dict[str, Served] = {}
        self._drafted = 0
        self._draft_context = 0.0
        self._draft_seconds = self._late = 0.0
        self._ended: float | None = None
        self._rested = 0  # rounds since one was begun
        self._settling = False  # whether one more round goes without drafts, so that the next shows what it takes
        self._verified: Sequence[int] | None = None
        self._tokens = 0

    def rests(self) -> bool:
        self._meet(list(self.runner.input_batch.req_ids))
        self._rested = self._rested + 1 if self._settling or self.policy.rest(self._batch) else 0
        self._settling = False
        if not self._rested:
            return False
        self._drafted = 0
        return True

    def rested(self, now: float, tokens: int) -> None:
        """Tell some of these steps' times, so that what slows down the machine is not put down to drafting.

        Not the first: a step right after one with drafts finds nothing where it was left.
        """
        requests = len(self._batch)
        told = self._rested == _SETTLED or self._rested % _SAMPLE == 0
        if not told or self._ended is None or self._before is not self._batch or tokens != requests:
            return  # not one of the some; or somebody came, or prefill went on
        context = sum(each.prompt + len(each.outputs) - 1 for each in self._served.values())  # the last was just sampled
        self.policy.timed(StepTiming(tokens, requests, float(context), now - self._ended))

    def judged(self, drafts: Sequence[int], tokens: int) -> None:
        self._verified, self._tokens = drafts, tokens

    def begin(
        self, now: float, sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], k: int, tokens: int | None = None
    ) -> Rows:
        """Learn from the step that just ended, then choose who drafts.

        Args:
            now: clock at the end of the target's step, seconds. sampled: tokens of each request of the batch, ``[]`` where
                prefill goes on. contexts: tokens of context, ``(R,)``. k: most drafts of any request. tokens: that the step
                ran on, if it verified nothing; None: one of each request.
        """
        names = list(self.runner.input_batch.req_ids[: len(sampled)])
        total = float(contexts.sum())
        if self._verified is None and tokens is not None:
            self._tokens = tokens
        self._learn(now, names, sampled, contexts, total)
        self._meet(names)
        rows, limits, waiting = self._able(names, sampled, contexts, k)
        self._drafted = 0
        if not rows:
            return NOBODY
        everyone = len(rows) == len(names)
        able = names if everyone else [names[row] for row in rows]
        here = contexts if everyone else contexts[rows]
        elsewhere = 0.0 if everyone else total - float(here.sum())
        decision = self.policy.begin_round(RoundInput(able, here, np.array(limits), waiting, elsewhere))
        chosen = decision.rows
        if chosen.size == 0:
            self._settling = decision.reason == MEASURING and len(able) > 1
            return NOBODY
        if not everyone:
            chosen = np.array(rows, dtype=np.int64)[chosen]
        self._drafted = int(chosen.size)
        self._draft_context = float(contexts[chosen].sum())
        return chosen

    def lengths(self, confidences: NDArray[np.floating] | None) -> Rows:
        return self.policy.lengths(confidences)

    def end(self, now: float, seconds: float, late: float = 0.0) -> None:
        self._ended, self._draft_seconds, self._late, self._before = now, seconds, late, self._batch

    def _learn(
        self, now: float, names: list[str], sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], total: float
    ) -> None:
        """Outcomes and time of the step that just ended. ``total``: Σ contexts."""
        verified, tokens = self._verified, self._tokens or len(names)
        self._verified, self._tokens = None, 0
        drafts = 0
        if verified is not None:
            judged = [row for row, count in enumerate(verified) if count and sampled[row]]
            drafts = sum(verified)
            self.policy.observe(
                Outcomes(
                    [names[row] for row in judged],
                    np.array([verified[row] for row in judged], dtype=np.int64),
                    np.array([len(sampled[row]) - 1 for row in judged], dtype=np.int64),
                )
            )
        # The engine has not stood idle between two rounds if a request was in both, and prefill has costs of its own.
        if self._ended is None or tokens != len(names) + drafts or not all(sampled) or names[0] not in self._before:
            return
        spread = None if verified is None else total + float(np.dot(contexts, verified))
        timing = StepTiming(
            tokens, len(names), total, now - self._ended, spread, self._drafted, self._draft_context, self._draft_seconds,
            self._late,
        )  # fmt: skip
        self.policy.observe_step(timing)

    def _meet(self, names: list[str]) -> None:
        """The batch as it is now: tell the policy of requests that came, with their own options, and of those that went."""
        if names == self._batch:
            return
        requests = self.runner.requests
        ended = [name for name in self._batch if name not in requests]
        self.policy.finish(ended)
        before, self._served = self._served, {}
        if self._gone is not None:
            for name in ended:
                self._gone(before[name])
        for name in names:
            if name in before:
                self._served[name] = before[name]
                continue
            given = requests[name].sampling_params
            self._served[name] = Served.of(requests[name])
            options = request_options(given.extra_args if given is not None else None)
            kind = options.dspark_policy
            if kind == "adaptive" and self.policy.cost is None:
                kind = None  # nothing to compare: the engine's policy
            self.policy.add(name, options.dspark_max_draft_tokens, kind)
        self._batch = names

    def _able(
        self, names: list[str], sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], k: int
    ) -> tuple[list[int], list[int], int]:
        """Rows that will be in the next step after sampling a token, the most drafts of each, and other tokens of that step."""
        rows, limits, waiting = [], [], 0
        room = self.max_model_len - self.queries
        for row, (name, tokens, context) in enumerate(zip(names, sampled, contexts.tolist(), strict=True)):
            request = self._served[name]
            if not tokens:
                waiting += max(request.prompt - context, 0)
                continue
            left = request.most - len(request.outputs)
            if left > 0 and request.stops.isdisjoint(tokens):  # else it has ended, and the scheduler will find out
                rows.append(row)
                limits.append(min(k, left - 1) if context <= room else 0)
        return rows, limits, min(waiting, max(self.runner.max_num_tokens - len(rows), 0))


class Shared:
    """One decision for all tensor-parallel ranks: rank 0's, whose clock is the only one that counts.

    Everybody must run the block forward for the same requests. Only rank 0's drafts reach the scheduler, so the others need
    not know how many are verified.
    """

    def __init__(self, rounds: Rounds | None, group: Any, requests: int) -> None:
        """Args: rounds: rank 0's; None on the others. group: the ranks. requests: most in a batch."""
        self._rounds, self._group = rounds, group
        self._drafting = torch.zeros(requests, dtype=torch.int32, device=group.device)
        self._rows, self._k = 0, 0

    def rests(self) -> bool:
        return False  # rank 0 alone knows

    def rested(self, now: float, tokens: int) -> None:
        """Never asked for."""

    def judged(self, drafts: Sequence[int], tokens: int) -> None:
        if self._rounds is not None:
            self._rounds.judged(drafts, tokens)

    def begin(
        self, now: float, sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], k: int, tokens: int | None = None
    ) -> Rows:
        if self._rounds is not None:
            self._drafting.zero_()
            self._drafting[torch.from_numpy(self._rounds.begin(now, sampled, contexts, k, tokens))] = 1
        self._group.broadcast(self._drafting, src=0)
        chosen: Rows = self._drafting[: len(sampled)].cpu().numpy().nonzero()[0]
        self._rows, self._k = chosen.size, k
        return chosen

    def lengths(self, confidences: NDArray[np.floating] | None) -> Rows:
        if self._rounds is not None:
            return self._rounds.lengths(confidences)
        return np.full(self._rows, self._k, dtype=np.int64)

    def end(self, now: float, seconds: float, late: float = 0.0) -> None:
        if self._rounds is not None:
            self._rounds.end(now, seconds, late)


class Served(NamedTuple):
    """What ends a request: its prompt's length, its outputs (the runner's own list, which grows), most of them, stop ids.

    ``request``: the runner's state of it.
    """

    prompt: int
    outputs: list[int]
    most: int
    stops: frozenset[int]
    request: Any

    @classmethod
    def of(cls, request: Any) -> "Served":
        """From the runner's state of the request."""
        given = request.sampling_params
        if given is None:
            return cls(request.num_prompt_tokens, request.output_token_ids, sys.maxsize, frozenset(), request)
        most = sys.maxsize if given.max_tokens is None else given.max_tokens
        stops = frozenset([given.eos_token_id, *(given.stop_token_ids or ())])
        return cls(request.num_prompt_tokens, request.output_token_ids, most, stops, request)


def request_options(extra_args: Any) -> RequestOptions:
    """A request's own options; they were checked on entry, so a bad one here is only reported."""
    try:
        return RequestOptions.of(extra_args)
    except ValueError as error:
        logger.warning("%s; ignored", error)
        return RequestOptions()
