"""Put into an engine's process by ``EngineProcess(prepare=...)``: planted errors, each of which must make a test fail,
policies that do on purpose what the real one does only now and then, and a machine that is never busy.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import wrapt


def shift_probabilities() -> None:
    """Hand the rejection sampler the q of the next position instead of the one each draft was drawn from."""

    def patch(module: object) -> None:
        proposer = module.DSparkProposer  # type: ignore[attr-defined]
        keep = proposer._keep_probabilities

        def shifted(self: object, q: object, *args: object) -> None:
            keep(self, None if q is None else q.roll(-1, dims=1), *args)  # type: ignore[attr-defined]

        proposer._keep_probabilities = shifted

    wrapt.register_post_import_hook(patch, "vllm_dspark.engine.v1")


def _after_import(name: str, patch: Any) -> None:
    wrapt.register_post_import_hook(patch, name)


def _replace_lengths(choose: Any) -> None:
    """Let ``choose(policy, plan, confidences)`` say how many drafts of each drafting request are verified."""

    def patch(module: Any) -> None:
        original = module.Policy.lengths

        def lengths(self: Any, confidences: Any, *args: Any) -> Any:
            most = original(self, confidences, *args)
            return np.minimum(most, choose(np.asarray(confidences, dtype=np.float32), most))

        module.Policy.lengths = lengths

    _after_import("vllm_dspark.verification.policy", patch)


def erratic_policy() -> None:
    """Who drafts, and how many drafts are verified, at random; with the policy fixed at all of them."""
    rng = np.random.default_rng(0)
    _replace_lengths(lambda confidences, most: rng.integers(0, most + 1))

    def patch(module: Any) -> None:
        original = module.Policy.begin_round

        def begin_round(self: Any, inputs: Any) -> Any:
            limits = np.where(rng.random(len(inputs.requests)) < 0.3, 0, inputs.limits)
            return original(self, dataclasses.replace(inputs, limits=limits))

        module.Policy.begin_round = begin_round

    _after_import("vllm_dspark.verification.policy", patch)


SECONDS = np.array([1.0, 1.7, 1.7, 1.7])  # one draft pays if it is nearly sure, a second is free


def _each_alone(decide: Any) -> None:
    """``decide(survival)`` says how many drafts of a request are verified.

    The confidences are planted. The second says which first draft it follows, as any confidence head's may: 0.98 after an even
    id, 0.02 after an odd one. The first is 0.65 or 0.95 by turns: alone it pays in every second row.
    """

    def patch(module: Any) -> None:
        original = module.DSparkProposer._draft

        def draft(self: Any, rows: Any, *args: Any) -> Any:
            block = original(self, rows, *args)
            planted = torch.full(block.tokens.shape, 0.5)
            planted[:, 0] = torch.where(torch.from_numpy(rows) % 2 == 0, 0.65, 0.95)
            planted[:, 1] = torch.where(block.tokens[:, 0] % 2 == 0, 0.98, 0.02)
            return block._replace(confidences=planted)

        module.DSparkProposer._draft = draft

    _after_import("vllm_dspark.engine.v1", patch)

    def choose(confidences: Any, most: Any) -> Any:
        survival = np.cumprod(confidences, axis=1)[:, : SECONDS.size - 1]
        return np.array([decide(row[None, :]) for row in survival])

    _replace_lengths(choose)


def stop_early() -> None:
    """Algorithm 1 for every request by itself, where stopping early and searching on differ all the time."""
    from vllm_dspark.verification import scheduler

    _each_alone(lambda survival: int(scheduler.synchronous(survival, SECONDS, 1)[0]))


def search_past_the_stop() -> None:
    """The best of all lengths instead: what follows a draft, which the draft decides, admits it."""
    from vllm_dspark.verification import scheduler

    _each_alone(lambda survival: scheduler.search(survival, SECONDS, 1)[0].drafts)


def decide_with_this_rounds_tokens() -> None:
    """Verify only where the first draft is an even id."""

    def patch(module: Any) -> None:
        proposer = module.DSparkProposer
        original = proposer._hand_over

        def hand_over(self: Any, drafts: Any, block: Any, rows: Any, lengths: Any) -> None:
            odd = (block.tokens[:, 0] % 2 == 1).numpy()
            original(self, drafts, block, rows, np.where(odd, 0, lengths))

        proposer._hand_over = hand_over

    _after_import("vllm_dspark.engine.v1", patch)


def off_for_200_tokens() -> None:
    """Nothing is drafted for a request's first 200 tokens, everything after them; with the policy fixed at all drafts."""

    def patch(module: Any) -> None:
        original, rests = module.Rounds._able, module.Rounds.rests

        def able(self: Any, names: Any, *args: Any) -> Any:
            rows, limits, waiting = original(self, names, *args)
            young = [len(self.runner.requests[names[row]].output_token_ids) <= 200 for row in rows]
            return rows, np.where(young, 0, limits), waiting

        def wakes(self: Any) -> bool:
            if any(len(self.runner.requests[name].output_token_ids) == 200 for name in self.runner.input_batch.req_ids):
                self.policy._standing.drop()  # limits never rise by themselves
            answer: bool = rests(self)
            return answer

        module.Rounds._able, module.Rounds.rests = able, wakes

    _after_import("vllm_dspark.engine.rounds", patch)


def policy_that_raises() -> None:
    """The policy's arithmetic breaks in the middle of serving."""

    def patch(module: Any) -> None:
        original = module.choose

        def choose(cost: Any, *args: Any) -> Any:
            choose.calls += 1
            if choose.calls > 2:
                raise ZeroDivisionError("planted")
            return original(cost, *args)

        choose.calls = 0
        module.choose = choose

    _after_import("vllm_dspark.verification.choice", patch)


def quiet_machine() -> None:
    """Step times count as measured on a quiet machine, so that they are kept, and found again, whatever else runs on it."""
    _after_import("vllm_dspark.verification.profile", lambda module: setattr(module, "disturbed", lambda samples: False))
    _after_import("vllm_dspark.engine.profiling", lambda module: setattr(module, "FASTER", 0.0))
