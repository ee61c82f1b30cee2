"""Host time of one scheduling decision, beside the host work of vLLM's own adaptive verification where it can be imported.

Decision: both get the same batch, R requests with γ = 7 confidences each and the same cost curve. vLLM's part is
``get_num_tokens``, what it runs on the host every step (its ranking runs on the device); ours is the whole decision, ranking
included. Repeats are interleaved. Policy: everything a round calls (who drafts, how many, outcomes, timing), while drafting
pays and while it does not, mean over 400 rounds after 100.

    OMP_NUM_THREADS=1 python benchmarks/scheduler.py [--repeats 41] [--out FILE]
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_dspark.verification import scheduler
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming
from vllm_dspark.verification.policy import Policy
from vllm_dspark.verification.records import Outcomes, RoundInput
from vllm_dspark.verification.survival import survival

WIDTH = 7
RESULTS = Path(__file__).parent / "results"
STEPS = CostTable((1, 8, 32, 256, 1024), (0.010, 0.0105, 0.016, 0.06, 0.2), (1, 8, 32, 64), (0.004, 0.005, 0.009, 0.016))
STEEP = CostTable((1, 4096), (0.001, 4.0), (1, 512), (0.002, 0.01))


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

    names = [f"r{index}" for index in range(requests)]
    manager.req_states = SimpleNamespace(
        req_id_to_index={name: index for index, name in enumerate(names)},
        num_computed_tokens_np=np.full(requests, 512, dtype=np.int32),
        prefill_len=SimpleNamespace(np=np.full(requests, 100, dtype=np.int32)),
    )
    stale = SimpleNamespace(np=confidences)
    manager.num_speculative_steps = WIDTH
    manager.num_bonus_tokens = 1
    manager._max_total_logits = 1 << 30
    manager._stale_confidences, manager._stale_idx = [stale, stale], 0
    verify = np.concatenate([np.full(requests, seconds[0]), seconds])
    manager.cost_tables = (np.zeros(requests + 1), verify)
    tokens = dict.fromkeys(names, 1 + WIDTH)
    drafts = {name: [0] * WIDTH for name in names}
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


def policy_round(requests: int, table: CostTable, confidence: float, rounds: int = 500, warm: int = 100) -> dict[str, float]:
    """Mean microseconds of each call of the policy per round, and of all; outcomes come true as the confidences say."""
    policy = Policy(WIDTH, CostModel(table, requests * (WIDTH + 1), requests))
    truth = CostModel(table, requests * (WIDTH + 1), requests)
    names, rng = [f"r{index}" for index in range(requests)], np.random.default_rng(0)
    spent = dict.fromkeys(("begin_round", "lengths", "observe", "observe_step"), 0.0)
    drafting = 0

    def timed(name: str, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = getattr(policy, name)(*arguments)
        spent[name] += time.perf_counter() - start
        return result

    for step in range(rounds):
        if step == warm:
            spent, drafting = dict.fromkeys(spent, 0.0), 0
        rows = timed("begin_round", RoundInput(names, np.full(requests, 300 + step))).rows
        lengths = timed("lengths", np.full((rows.size, WIDTH), confidence)) if rows.size else rows
        drafting += bool(rows.size)
        hits = np.cumprod(rng.random((rows.size, WIDTH)) < confidence, axis=1).sum(axis=1)
        timed("observe", Outcomes([names[row] for row in rows], lengths, np.minimum(hits, lengths)))
        shape = (requests + int(lengths.sum()), requests, requests * (300.0 + step))
        target, draft = truth.step(StepTiming(*shape, 1.0, None, rows.size, rows.size * 300.0))
        noise = float(np.exp(0.05 * rng.standard_normal()))
        timed("observe_step", StepTiming(*shape, target * noise, None, rows.size, rows.size * 300.0, draft * noise))
    mean = {name: seconds / (rounds - warm) * 1e6 for name, seconds in spent.items()}
    return {**mean, "all": sum(mean.values()), "rounds_drafting": drafting / (rounds - warm)}


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "vllm-dspark")}
    return {"cpu": model, "cores": os.cpu_count() or 0, "python": platform.python_version(), **versions}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description="host time of one scheduling decision and of the policy")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--requests", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--out", type=Path, default=RESULTS / "scheduler.json")
    arguments = parser.parse_args()
    decisions = {requests: measure(arms(requests), arguments.repeats) for requests in arguments.requests}
    for requests, found in decisions.items():
        print(f"R = {requests}, γ = {WIDTH}; µs per decision: median [quartiles] least")
        for name, t in found.items():
            print(f"  {name:32s} {t['median']:8.1f} [{t['lower quartile']:.1f}, {t['upper quartile']:.1f}] {t['least']:.1f}")
    rounds = {}
    for name, table, confidence in (("on", STEPS, 0.9), ("off", STEEP, 0.3)):
        rounds[name] = {requests: policy_round(requests, table, confidence) for requests in (1, 32, 256)}
        for requests, t in rounds[name].items():
            parts = ", ".join(f"{part} {t[part]:.0f}" for part in ("begin_round", "lengths", "observe", "observe_step"))
            parts += f"; {t['rounds_drafting']:.0%} drafting"
            print(f"policy {name:3s} R = {requests:4d}: {t['all']:6.0f} µs per round ({parts})")
    record = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "repeats": arguments.repeats,
        "microseconds_per_decision": decisions, "policy_microseconds_per_round": rounds,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
