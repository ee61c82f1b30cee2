"""What the policy of an engine that runs ahead of its device expects."""

import numpy as np

from vllm_dspark.verification.asynchronous import AsynchronousPolicy, Step
from vllm_dspark.verification.cost import CostModel, CostTable
from vllm_dspark.verification.history import THRESHOLDS
from vllm_dspark.verification.policy import MANY
from vllm_dspark.verification.records import RoundInput


def test_what_runs_ahead_promises_only_what_averages_can_choose():
    """Half of the rounds 0.9, half 0.1: a round's own survivals tell them apart, averages do not."""
    policy = AsynchronousPolicy(4, CostModel(CostTable((1,), (0.010,), (1,), (0.002,)), 4096, 512))
    many = [f"r{number}" for number in range(MANY)]
    for name in many:
        policy.add(name)
    slots = np.array([policy.requests.rows([name], 1, 4)[0][0] for name in many])
    for now in range(40):
        survival = np.full((1, slots.size, 4), 0.9 if now % 2 else 0.1)
        policy.history.drew(slots, survival, now + 1, np.full(slots.size, 100.0))
    policy.round = 41
    at = THRESHOLDS.tolist().index(0.6)
    few, _ = policy._expected(slots[:1], np.array([4]), np.array([100.0]))
    all_, _ = policy._expected(slots, np.full(slots.size, 4), np.full(slots.size, 100.0))
    assert few[0, at] == 0.0
    assert all_[0, at] > 1.0
    policy.begin_round(RoundInput(many, np.full(slots.size, 100)))
    flight = policy.depart()
    policy.allot(flight, Step(slots.size, slots.size, 1600.0), flight.caps, ranked_later=False)
    assert policy._expected(slots, np.full(slots.size, 4), np.full(slots.size, 100.0))[0][0, at] == 0.0
