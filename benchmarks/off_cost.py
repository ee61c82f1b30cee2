"""What the plugin costs while nothing is drafted, within one engine: steps with it and without, turn and turn about.

    python benchmarks/off_cost.py                     # about 5 minutes

Two engines that should be equally fast come out several percent apart, which is more than what is looked for. So one engine
changes sides every few steps: with drafting off, or with everything that vLLM does for speculation taken out of it (hidden
states for the drafter, the proposer, slots for drafts). Memory that the drafter occupies is occupied on both sides.
Steps in which a request joins are told apart; those right after a change are not counted, nor are stalls.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import cpu_matrix
import typer
from rich.console import Console
from rich.table import Table

Times = dict[str, list[float]]


def alternate(engine: Any, texts: list[str], lengths: list[int], load: int, turn: int, runs: int) -> dict[str, Times]:
    """In the engine's process: step times in seconds, by side ("off", "without") and kind ("decode", "join").

    Args:
        load: requests in flight; a run ends when there are fewer. turn: steps until the other side's turn.
    """
    from vllm import SamplingParams

    core, switch = engine.llm_engine, Switch(engine)
    times: dict[str, Times] = {side: {"decode": [], "join": []} for side in ("off", "without")}
    steps = 0
    for run in range(runs):
        waiting = list(range(len(texts)))
        while waiting or core.has_unfinished_requests():
            joined = False
            while waiting and core.get_num_unfinished_requests() < load:
                index, joined = waiting.pop(0), True
                sampling = SamplingParams(
                    temperature=0.0, max_tokens=lengths[index], ignore_eos=True, extra_args={"dspark_policy": "off"}
                )
                core.add_request(f"{run}-{index}-{time.time()}", texts[index], sampling)
            if core.get_num_unfinished_requests() < load:
                core.step()
                continue
            side = "without" if steps // turn % 2 else "off"
            if steps % turn == 0:
                switch.set(side == "off")
            began = time.perf_counter()
            core.step()
            seconds = time.perf_counter() - began
            if steps % turn:
                times[side]["join" if joined else "decode"].append(seconds)
            steps += 1
    switch.set(True)
    return times


class Switch:
    """Takes speculation out of an engine, and puts it back. Nothing may be drafted in between."""

    def __init__(self, engine: Any) -> None:
        self.core = engine.llm_engine.engine_core.engine_core
        self.runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        self.layers = tuple(self.runner.model.model.aux_hidden_state_layers)
        scheduler = self.core.scheduler
        self.fields = [
            (self.runner, "speculative_config", None), (self.runner, "use_aux_hidden_state_outputs", False),
            (self.runner, "num_spec_tokens", 0), (scheduler, "num_spec_tokens", 0), (scheduler, "num_lookahead_tokens", 0),
            (scheduler, "use_eagle", False), (self.core, "check_for_draft_tokens", False),
            *((self.runner, name, getattr(self.runner, name).__wrapped__) for name in ("_prepare_inputs", "sample_tokens")),
        ]  # fmt: skip
        self.usual = [getattr(owner, name) for owner, name, _ in self.fields]

    def set(self, on: bool) -> None:
        for (owner, name, without), usual in zip(self.fields, self.usual, strict=True):
            setattr(owner, name, usual if on else without)
        self.runner.model.set_aux_hidden_state_layers(self.layers if on else ())


def mean(seconds: list[float]) -> float:
    """Without stalls, which fall on either side by chance; the batched writes of the drafter's context are no stalls."""
    most = 1.8 * statistics.median(seconds) + 0.003
    return statistics.fmean(value for value in seconds if value <= most)


def main(
    concurrency: Annotated[list[int] | None, typer.Option(help="requests in flight; repeat for several")] = None,
    domain: Annotated[str, typer.Option(help="domain of the prompts")] = "code",
    repeats: Annotated[int, typer.Option(help="measurements of every load, by turns")] = 7,
    dtype: Annotated[str, typer.Option(help="of the models, as vLLM names it; auto: bfloat16")] = "auto",
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = cpu_matrix.RESULTS / "off_cost.json",
) -> None:
    """Measure, print the table, write the JSON."""
    console, loads = Console(), concurrency or [1, 8, 16, 32]
    found: dict[int, list[dict[str, float]]] = {load: [] for load in loads}
    with cpu_matrix.engine("vanilla", compiled=False, dtype=dtype) as engine:
        for repeat in range(-1, repeats):  # the first is not counted
            for load in loads:
                texts = cpu_matrix.prompts(domain, cpu_matrix.count(load))
                lengths = cpu_matrix.lengths(72, len(texts))
                times = engine.call("off_cost:alternate", texts, lengths, load, 17, 4 if load > 1 else 8)
                if repeat < 0:
                    continue
                kinds = {kind: mean(times["off"][kind]) / mean(times["without"][kind]) for kind in ("decode", "join")}
                every = {side: both["decode"] + both["join"] for side, both in times.items()}
                joins = len(every["off"]) and len(times["off"]["join"]) / len(every["off"])
                whole = {side: (1 - joins) * mean(both["decode"]) + joins * mean(both["join"]) for side, both in times.items()}
                found[load].append(kinds | {"all": whole["off"] / whole["without"], "step": whole["without"]})
    table = Table(title="Time of a step with drafting off, over one without speculation (medians, quartiles)")
    for name in ("requests", "ms without", "decode", "join", "all"):
        table.add_column(name, justify="right")
    cells = []
    for load, rows in found.items():
        spread = {name: statistics.quantiles([row[name] for row in rows], n=4) for name in ("decode", "join", "all")}
        step = statistics.median(row["step"] for row in rows)
        shown = [f"{middle:.3f} ({low:.3f}–{high:.3f})" for low, middle, high in spread.values()]
        table.add_row(str(load), f"{1e3 * step:.2f}", *shown)
        cells.append({"concurrency": load, "step_seconds": step, "quartiles": spread})
    console.print(table)
    cpu_matrix.save(out, console, cells, domain=domain, dtype=dtype, repeats=repeats)


if __name__ == "__main__":
    typer.run(main)
