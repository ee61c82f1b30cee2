"""Host time of one scheduling decision, beside the host work of vLLM's own adaptive verification where it can be imported.

Both get the same batch: R requests, γ = 7 confidences each, the same cost curve. vLLM's part is ``get_num_tokens``, what it runs
on the host every step (its ranking runs on the device); ours is the whole decision, ranking included. Repeats are interleaved.

    python benchmarks/scheduler.py [--repeats 41] [--json out.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_dspark.verification import scheduler
from vllm_dspark.verification.cost import CostModel
from vllm_dspark.verification.library import table
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import RoundInput
from vllm_dspark.verification.survival import survival

WIDTH = 7


def arms(requests: int) -> dict[str, Callable[[], Any]]:
    """Calls to time, by name."""
    rng = np.random.default_rng(requests)
    confidences = rng.beta(5.0, 1.0, (requests, WIDTH)).astype(np.float32)
    a = survival(confidences).astype(np.float32)
    seconds = 1.0 + np.arange(requests * WIDTH + 1) / requests * 0.6
    flat = np.ones(requests * WIDTH + 1)
    calls: dict[str, Callable[[], Any]] = {
        "Algorithm 1": lambda: scheduler.synchronous(a, seconds, requests),
        "Algorithm 1, all slots walked": lambda: scheduler.synchronous(a, flat, requests),
        "budget search": lambda: scheduler.search(a, seconds, requests),
        "ranking within a budget": lambda: scheduler.asynchronous(a, 2 * requests),
    }
    policy = Policy(WIDTH, CostModel(table("h200-8b-synthetic"), requests * (WIDTH + 1), requests))
    names = [f"r{index}" for index in range(requests)]
    inputs = RoundInput(names, np.full(requests, 512))

    def whole() -> None:
        decision = policy.begin_round(inputs)
        if decision.drafting:
            policy.lengths(confidences[decision.rows])

    calls["policy: who drafts + how many"] = whole
    native = vllm_call(confidences, seconds)
    if native is not None:
        calls["vLLM get_num_tokens"] = native
    return calls


def vllm_call(confidences: np.ndarray, seconds: np.ndarray) -> Callable[[], Any] | None:
    """vLLM's host decision on this batch; None where it cannot be imported."""
    try:
        from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager
    except Exception as error:  # whatever an absent or foreign vLLM raises
        print(f"vLLM's manager cannot be imported ({type(error).__name__}: {error})")
        return None
    requests = confidences.shape[0]
    manager = object.__new__(AdaptiveVerificationManager)

    class States:
        req_id_to_index = {f"r{index}": index for index in range(requests)}
        num_computed_tokens_np = np.full(requests, 512, dtype=np.int32)

        class prefill_len:  # noqa: N801 - vLLM's name
            np = np.full(requests, 100, dtype=np.int32)

    class Buffer:
        np = confidences

    manager.req_states = States()
    manager.num_speculative_steps = WIDTH
    manager.num_bonus_tokens = 1
    manager._max_total_logits = 1 << 30
    manager._stale_confidences, manager._stale_idx = [Buffer(), Buffer()], 0
    verify = np.concatenate([np.full(requests, seconds[0]), seconds])
    manager.cost_tables = (np.zeros(requests + 1), verify)
    tokens = {f"r{index}": 1 + WIDTH for index in range(requests)}
    drafts = {f"r{index}": [0] * WIDTH for index in range(requests)}
    return lambda: manager.get_num_tokens(tokens, drafts)


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of the microseconds per call, arms taken in turn."""
    for call in calls.values():
        for _ in range(20):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(10):
                call()
            times[name].append((time.perf_counter() - start) * 1e5)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"median": middle, "lower quartile": low, "upper quartile": high, "least": min(values)}
    return found


def main() -> None:
    """Measure R = 256 and 1,024 and print a table."""
    parser = argparse.ArgumentParser(description="host time of one scheduling decision")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--requests", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--json", dest="output")
    arguments = parser.parse_args()
    results = {requests: measure(arms(requests), arguments.repeats) for requests in arguments.requests}
    for requests, found in results.items():
        print(f"R = {requests}, γ = {WIDTH}; µs per decision: median [quartiles] least")
        for name, t in found.items():
            print(f"  {name:32s} {t['median']:8.1f} [{t['lower quartile']:.1f}, {t['upper quartile']:.1f}] {t['least']:.1f}")
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
