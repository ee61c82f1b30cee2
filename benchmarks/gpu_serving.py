"""Qwen3-8B with a block-7 drafter on a GPU: no speculation, vLLM's own DSpark fixed and adaptive, and the plugin.

    python benchmarks/gpu_serving.py --context 1024 --domain code            # GPU_SERVING.md has the whole recipe
    python benchmarks/gpu_serving.py --dry                                   # tiny models, CPU, some minutes, no GPU

The configs are real, the weights are dummies: step times do not depend on their values, and vLLM's synthetic rejection sampling
accepts drafts as often as the paper reports. Confidences claim just those rates in every arm, so vLLM's adaptive mode gets the
best it can get. Requests start with their context in place; only decoding is timed.

Every arm is an engine in a process of its own, vLLM's three without the plugin. As many as fit the GPU are up at once and take
turns, repeat by repeat, in an order that rotates. With two at a time the plugin's stays up and the others follow one another
beside it: each of its ratios is of runs that alternated.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from serving import acceptance, models, report
from serving.report import NATIVE, NONE, OTHERS, PLUGIN

from vllm_dspark.engine.session import EngineProcess

HERE = Path(__file__).resolve().parent
DRAFTS = 7
MEMORY = 0.95  # of the GPU, for all engines together
DRY = {"domain": ["code"], "context": [32, 64], "concurrency": [1, 3], "tokens": 8, "repeats": 2, "steps": 3}
REAL = {
    "domain": list(acceptance.LENGTHS), "context": [1024, 8192, 32768], "concurrency": [1, 4, 16, 64, 128, 256],
    "tokens": 96, "repeats": 5, "steps": 15,
}  # fmt: skip
# vLLM fills the cache as if the context had been computed elsewhere.
CONTEXT_IN_PLACE = {
    "kv_connector": "DecodeBenchConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"startup_fill": True},
}  # fmt: skip

Cell = tuple[str, int, int]  # domain, tokens of context, requests at once


def speculative(arm: str, drafter: Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """``speculative_config`` of an arm; ``own``: the plugin's options."""
    if arm == NONE:
        return None
    config = {
        "method": "dspark", "model": str(drafter), "num_speculative_tokens": DRAFTS,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": acceptance.rates("code", DRAFTS),
    }  # fmt: skip
    if arm == PLUGIN:
        return {**config, "dspark": dict(own)}
    return {**config, "enable_adaptive_verification": arm == NATIVE}


def turns(arms: Sequence[str], together: int) -> list[list[str]]:
    """Sets of arms that are up at once, at most ``together``; the plugin, if there, is in each.

    Raises:
        ValueError: there is no room for a second arm beside the plugin.
    """
    others = [arm for arm in arms if arm != PLUGIN]
    kept = [PLUGIN] if PLUGIN in arms else []
    room = together - len(kept)
    if others and room < 1:
        raise ValueError(f"{together} engine at a time leaves the plugin nothing to be compared with")
    return [kept + others[at : at + room] for at in range(0, len(others), max(room, 1))] or [kept]


def rotated(arms: Sequence[str], repeat: int) -> list[str]:
    """The arms in the order of this repeat."""
    shift = repeat % len(arms)
    return [*arms[shift:], *arms[:shift]]


def room(load: int, context: int, tokens: int) -> int:
    """Tokens of cache that a cell needs, with the unevenness of its requests and the blocks they draft."""
    return load * (context + tokens + tokens // 2 + 64)


def measure(engines: Mapping[str, EngineProcess], cell: Cell, tokens: int, repeats: int, steps: int) -> dict[str, Any]:
    """By arm: tokens/s of every repeat, tokens of a request and milliseconds per step. Or why the cell was skipped."""
    domain, context, load = cell
    least = min(engine.call("serving.inside:capacity") for engine in engines.values())
    if least < room(load, context, tokens):
        return {"skipped": f"needs {room(load, context, tokens):,} tokens of cache, {least:,} fit"}
    for engine in engines.values():
        engine.call("serving.inside:accept", acceptance.rates(domain, DRAFTS))
        engine.call("serving.inside:decode", load, context, tokens)  # the first is for learning, and not counted
    speeds: dict[str, list[float]] = {arm: [] for arm in engines}
    per_step: dict[str, list[float]] = {arm: [] for arm in engines}
    for repeat in range(repeats):
        for arm in rotated(list(engines), repeat):
            run = engines[arm].call("serving.inside:decode", load, context, tokens)
            speeds[arm].append(run["tokens"] / run["seconds"])
            per_step[arm].append(run["tokens"] / run["steps"] / load)
    split = {
        arm: {"tokens": median(per_step[arm]), **engine.call("serving.inside:split", load, context, steps)}
        for arm, engine in engines.items()
    }
    return {"speeds": speeds, "per_step": split}


def summary(cell: Cell, done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a cell, from what each set of arms measured."""
    place = dict(zip(("domain", "context", "concurrency"), cell, strict=True))
    for part in done:
        if "skipped" in part:
            return {**place, "skipped": part["skipped"]}
    split = {arm: step for part in done for arm, step in part["per_step"].items()}
    return {**place, **report.figures([part["speeds"] for part in done]), "per_step": split}


def options(dry: bool, together: int, cells: Sequence[Cell], tokens: int, engine: Mapping[str, Any]) -> dict[str, Any]:
    """``vllm.LLM``'s, the same for all arms."""
    longest, most = max(context for _, context, _ in cells), max(load for _, _, load in cells)
    common = {
        "load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False, "dtype": "bfloat16",
        "max_num_seqs": most, "max_model_len": longest + 16 * tokens + 64, "kv_transfer_config": CONTEXT_IN_PLACE,
    }  # fmt: skip
    if dry:
        return {**common, "enforce_eager": True, "dtype": "float32", **engine}
    return {**common, "gpu_memory_utilization": round(MEMORY / together, 3), "max_num_batched_tokens": 4096, **engine}


def start(arm: str, folders: tuple[Path, Path], dry: bool, own: Mapping[str, Any], common: Mapping[str, Any]) -> EngineProcess:
    target, drafter = folders
    config = speculative(arm, drafter, {"cache_dir": str(target.parent / "step-times"), **own})
    more = {} if config is None else {"speculative_config": config}
    environment = {"VLLM_DSPARK": str(int(arm == PLUGIN)), "VLLM_USE_V2_MODEL_RUNNER": "1"}
    prepare = f"serving.inside:{'install_interpreted' if dry else 'install'}"
    return EngineProcess(environment, prepare, model=str(target), **common, **more)


def main(
    domain: Annotated[list[str] | None, typer.Option(help="code, math or chat; repeat for several")] = None,
    context: Annotated[list[int] | None, typer.Option(help="tokens of context; repeat for several")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="requests at once; repeat for several")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="arms to run; repeat for several")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens per request in a run")] = None,
    repeats: Annotated[int | None, typer.Option(help="runs of every arm in every cell")] = None,
    together: Annotated[int, typer.Option(help="engines up at once; more leave less cache to each")] = 2,
    engine: Annotated[str, typer.Option(help="JSON: options of vllm.LLM for all arms")] = "{}",
    dspark: Annotated[str, typer.Option(help="JSON: options of the plugin")] = "{}",
    dry: Annotated[bool, typer.Option("--dry", help="tiny models on a CPU, Triton interpreted: does it run?")] = False,
    show: Annotated[list[Path] | None, typer.Option(help="measure nothing; show these results together")] = None,
    out: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Measure the cells, print the tables, write the JSON after every cell."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    if show:
        report.show(report.merged([json.loads(path.read_text()) for path in show]), console)
        return
    if dry:
        sys.path.append(str(HERE.parent / "tests"))  # the interpreter's backend; engines inherit it
    usual = DRY if dry else REAL
    cells = list(product(domain or usual["domain"], context or usual["context"], concurrency or usual["concurrency"]))
    tokens, repeats = tokens or usual["tokens"], repeats or usual["repeats"]
    chosen = list(arm or (*OTHERS, PLUGIN))
    left_out = {NATIVE: "needs CUDA graphs"} if dry and NATIVE in chosen else {}
    groups = turns([name for name in chosen if name not in left_out], together)
    path = out or HERE / "results" / f"gpu_serving{'_dry' if dry else ''}.json"
    done: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    record = {"dry": dry, "tokens": tokens, "repeats": repeats, "engines_at_once": together, "left_out": left_out}
    record |= {"acceptance": {name: acceptance.rates(name, DRAFTS) for name, _, _ in cells}, "engine": json.loads(engine)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sizes = models.TINY if dry else models.QWEN3_8B
        folders, common = models.write(Path(folder), sizes), options(dry, together, cells, tokens, json.loads(engine))

        kept: dict[str, EngineProcess] = {}
        for group in groups:
            with ExitStack() as others:
                engines = dict(kept)
                for name in group:
                    if name not in kept:
                        console.print(f"starting {name}")
                        owner = stack if name == PLUGIN else others
                        engines[name] = owner.enter_context(start(name, folders, dry, json.loads(dspark), common))
                        if "kv_cache_memory_bytes" not in common:
                            engines[name].wait()  # one after the other: each measures the memory that is left
                kept = {name: one.wait() for name, one in engines.items() if name == PLUGIN}
                for cell in cells:
                    console.print(f"{cell[0]}, context {cell[1]}, c = {cell[2]}: {', '.join(group)}")
                    done[cell].append(measure(engines, cell, tokens, repeats, usual["steps"]))
                    report.save(path, {**record, "cells": [summary(cell, parts) for cell, parts in done.items() if parts]})
    report.show(json.loads(path.read_text()), console)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
