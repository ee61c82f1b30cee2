"""``vllm-dspark demo``: real vLLM on the bundled pair, without and with DSpark, side by side. No network."""

import importlib.util
import json
import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_dspark import demo as pair
from vllm_dspark.engine.session import EngineProcess, Run


class Head(StrEnum):
    """The bundled drafters' correction heads."""

    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


class Domain(StrEnum):
    """The domains that the bundled pair has prompts of."""

    ARITHMETIC = "arithmetic"
    RECORDS = "records"
    CODE = "code"
    PROSE = "prose"


class Policy(StrEnum):
    """What decides how much is drafted and verified."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"


@dataclass(frozen=True)
class Row:
    """What the demo measured for one domain; speeds are tokens per second, medians over the rounds."""

    domain: str
    requests: int
    identical: bool
    accepted_length: float
    speed_without: float
    speed_with: float
    speedup: float
    text: str


def demo(
    head: Annotated[Head, typer.Option(help="Correction head of the drafter.")] = Head.VANILLA,
    domain: Annotated[list[Domain] | None, typer.Option(help="Domain to run; repeat for several. Default: all.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens to generate for each prompt.")] = 96,
    prompts: Annotated[int, typer.Option(min=1, max=48, help="Prompts of each domain, one after the other.")] = 4,
    policy: Annotated[Policy, typer.Option(help="Whether drafting has to pay, or is always done.")] = Policy.ADAPTIVE,
    rounds: Annotated[int, typer.Option(min=1, help="Times each arm runs every prompt; the arms alternate.")] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Generate text with the bundled pair, without and with DSpark, and compare."""
    console = Console(stderr=json_output)
    if importlib.util.find_spec("vllm") is None:
        console.print("vLLM is not installed here. Install it first: pip install 'vllm-dspark[cpu]' (or [cuda]).")
        raise typer.Exit(1)
    began = time.monotonic()
    rows = measure(head, policy, domain or list(pair.DOMAINS), prompts, tokens, rounds, console)
    seconds = time.monotonic() - began
    if json_output:
        print(json.dumps({"head": head, "tokens": tokens, "seconds": seconds, "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, head, seconds, console)
    if not all(row.identical for row in rows):
        raise typer.Exit(2)


def measure(
    head: str, policy: str, domains: Iterable[str], prompts: int, tokens: int, rounds: int, console: Console
) -> list[Row]:
    """Start both engines, warm them up, and run the arms in turn on every domain."""
    # float32: in bfloat16 two logits are often equal, and which one wins changes with the number of tokens in a step.
    common: dict[str, Any] = {"model": str(pair.TARGET), "max_model_len": 1024, "enforce_eager": True, "dtype": "float32"}
    speculative = {"method": "dspark", "model": str(pair.drafter(head)), "num_speculative_tokens": 7,
                   "dspark": {"policy": str(policy)}}  # fmt: skip
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    domains = list(domains)
    rows = []
    with bar, ExitStack() as stack:
        task = bar.add_task("starting vLLM twice: without and with DSpark", total=len(domains) * rounds * 2 + 2)
        without = stack.enter_context(EngineProcess(**common))
        with_dspark = stack.enter_context(EngineProcess(**common, speculative_config=speculative))
        for arm in (without, with_dspark):
            arm.wait()
            bar.advance(task)
        for arm in (without, with_dspark):
            arm.generate(pair.prompts(domains[0])[-2:], max_tokens=32)
        for domain in domains:
            texts = pair.prompts(domain)[:prompts]
            runs: tuple[list[Run], list[Run]] = ([], [])
            for _ in range(rounds):
                for arm, name, done in ((without, "without", runs[0]), (with_dspark, "with", runs[1])):
                    bar.update(task, description=f"{domain} {name} DSpark")
                    done.append(arm.generate(texts, max_tokens=tokens, concurrency=1))
                    bar.advance(task)
            rows.append(summarise(domain, *runs))
    return rows


def summarise(domain: str, without: list[Run], with_dspark: list[Run]) -> Row:
    """One row; the speed-up is the median of the ratios of runs that stood next to each other."""
    ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(without, with_dspark, strict=True)]
    return Row(
        domain,
        requests=len(without[0].token_ids),
        identical=all(run.token_ids == without[0].token_ids for run in without + with_dspark),
        accepted_length=with_dspark[0].accepted_length,
        speed_without=statistics.median(run.tokens_per_second for run in without),
        speed_with=statistics.median(run.tokens_per_second for run in with_dspark),
        speedup=statistics.median(ratios),
        text=with_dspark[0].texts[0],
    )


def show(rows: list[Row], head: str, seconds: float, console: Console) -> None:
    """Print the generated text and the table."""
    for row in rows:
        prompt = pair.prompts(row.domain)[0]
        console.rule(f"[bold]{row.domain}")
        console.print(prompt, style="dim", end="", markup=False, highlight=False)
        console.print(row.text, markup=False, highlight=False)
    table = Table(title=f"vLLM without and with DSpark ({head} head), one request at a time")
    for name in ("domain", "requests", "same text", "accepted length", "tokens/s without", "tokens/s with", "speed-up"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for row in rows:
        table.add_row(
            row.domain, str(row.requests), "yes" if row.identical else "NO", f"{row.accepted_length:.2f}",
            f"{row.speed_without:.0f}", f"{row.speed_with:.0f}", f"{row.speedup:.2f}x",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Accepted length: tokens per round of the target, its own included. Took {seconds:.0f} s. This is a tiny model on "
        "this machine's CPU; speeds of real models on GPUs differ, the mechanism does not.",
        style="dim",
    )
