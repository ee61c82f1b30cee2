"""``vllm-dspark simulate``: what the policy would make of a load, on a cost table, without an engine."""

import importlib.util
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_dspark.verification import library, traces
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.records import PolicyOptions
from vllm_dspark.verification.simulate import World
from vllm_dspark.verification.simulate import simulate as run
from vllm_dspark.verification.traces import Trace


def simulate(
    table: Annotated[str, typer.Option(help="cost table: a name that comes with the package, or a file")] = "h200-8b-synthetic",
    domains: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(traces.DOMAINS)}")] = ",".join(traces.DOMAINS),
    trace: Annotated[Path | None, typer.Option(help="a recorded trace (JSON) instead of synthetic requests")] = None,
    concurrency: Annotated[str, typer.Option(help="comma-separated requests at a time")] = "1,4,16,64,256",
    requests: Annotated[int, typer.Option(help="requests per point, at least twice the concurrency", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="tokens generated per request", min=1)] = 200,
    context: Annotated[str, typer.Option(help="least and most context tokens")] = "128,2048",
    drafts: Annotated[str, typer.Option(help="fixed k to compare with, comma-separated")] = "1,3,5,7",
    seed: Annotated[int, typer.Option(help="of the synthetic requests and of all noise")] = 0,
    ahead: Annotated[
        bool, typer.Option(help="decide from rounds before the last, as on a GPU whose host runs ahead of it")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="write the Pareto plot there (PNG; needs matplotlib)")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="write all figures there")] = None,
) -> None:
    """Throughput and speed per user of no speculation, fixed k and the adaptive policy over concurrencies."""
    console = Console()
    try:
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'vllm-dspark[plot]'")
        costs = library.table(table)
        points = _integers(concurrency, "--concurrency")
        low, high = _range(context)
        arms = {"off": PolicyOptions(policy="off")}
        arms |= {f"fixed {k}": PolicyOptions(policy="fixed", fixed_drafts=k) for k in _integers(drafts, "--drafts")}
        arms["adaptive"] = PolicyOptions()
        recorded = None if trace is None else _recorded(trace)
        names = [name.strip() for name in domains.split(",")]
        unknown = [name for name in names if name not in traces.DOMAINS]
        if unknown:
            raise ValueError(f"--domains: unknown {', '.join(unknown)}; valid: {', '.join(traces.DOMAINS)}")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    def load(users: int) -> Trace:
        count = max(requests, 2 * users)
        return recorded or traces.synthetic(count, names, tokens=tokens, context=(low, high), seed=seed)

    results = sweep(load, costs, points, arms, seed, ahead, console)
    console.print(_table(results, costs))
    if output is not None:
        output.write_text(
            json.dumps({"table": table, "label": costs.label, "ahead": ahead, "points": results}, indent=1) + "\n"
        )
        console.print(f"figures: {output}")
    if plot is not None:
        pareto(results, costs.label, plot)
        console.print(f"plot: {plot}")


def sweep(
    load: Callable[[int], Trace],
    table: CostTable,
    points: list[int],
    arms: dict[str, PolicyOptions],
    seed: int,
    ahead: bool,
    console: Console,
) -> list[dict[str, Any]]:
    """One summary per concurrency and arm; ``load(concurrency)`` gives the workload."""
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=len(points) * len(arms))
        for users in points:
            trace = load(users)
            for name, options in arms.items():
                priced = name == "adaptive"
                found = run(trace, World(table), options, users, seed=seed, counterfactual=priced, ahead=ahead).summary()
                results.append({"concurrency": users, "arm": name, **found})
                progress.advance(task)
    return results


def pareto(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Throughput over speed per user, one line per arm; numbers beside the adaptive line say how many users."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    fixed = [arm for arm in dict.fromkeys(point["arm"] for point in results) if arm not in ("off", "adaptive")]
    shades = matplotlib.colormaps["viridis"]
    styles: dict[str, dict[str, Any]] = {"off": {"color": "0.5", "linestyle": "--", "marker": "s"}}
    styles |= {arm: {"color": shades(0.9 * i / max(len(fixed) - 1, 1)), "marker": "."} for i, arm in enumerate(fixed)}
    styles["adaptive"] = {"color": "crimson", "linewidth": 2.5, "marker": "o"}
    for arm, style in styles.items():
        own = [point for point in results if point["arm"] == arm]
        axes.plot([p["speed_per_user"] for p in own], [p["throughput"] for p in own], label=arm, **style)
    for point in (point for point in results if point["arm"] == "adaptive"):
        place = (point["speed_per_user"], point["throughput"])
        axes.annotate(str(point["concurrency"]), place, xytext=(5, 5), textcoords="offset points", fontsize=8, color="crimson")
    axes.set(xlabel="tokens/s per user", ylabel="tokens/s, all users", xscale="log", yscale="log")
    axes.set_title(textwrap.fill(title, 90), fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, title="numbers: users", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _table(results: list[dict[str, Any]], costs: CostTable) -> Table:
    arms = list(dict.fromkeys(point["arm"] for point in results))
    shown = Table(title=costs.label, caption="tokens/s of all users (of one user)")
    shown.add_column("users", justify="right")
    for arm in arms:
        shown.add_column(arm, justify="right")
    for users in dict.fromkeys(point["concurrency"] for point in results):
        row = {point["arm"]: point for point in results if point["concurrency"] == users}
        shown.add_row(str(users), *(f"{row[arm]['throughput']:.0f} ({row[arm]['speed_per_user']:.0f})" for arm in arms))
    return shown


def _integers(text: str, name: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: wanted whole numbers, found {text!r}") from None
    if not values or min(values) < 1:
        raise ValueError(f"{name}: wanted numbers of 1 or more, found {text!r}")
    return values


def _range(text: str) -> tuple[int, int]:
    values = _integers(text, "--context")
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError(f"--context: wanted the least and the most, found {text!r}")
    return values[0], values[1]


def _recorded(path: Path) -> Trace:
    found = Trace.load(path)
    if found is None:
        raise ValueError(f"--trace: {path} is not a usable trace")
    return found
