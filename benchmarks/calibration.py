"""How well the confidences of the bundled drafter are calibrated, raw and after STS, and what that is worth.

    python benchmarks/calibration.py                      # about twenty minutes on two cores
    python benchmarks/calibration.py --rounds DIR --repeats 0      # keep the rounds there, or judge those that lie there
    python benchmarks/calibration.py --only-throughput    # about ten minutes; the figures there are stay

First every draft of many sampled requests is verified, so that no position is censored, and the survival's ECE, AUROC and
Brier score are computed per domain and position: raw; after offline STS (each half judged with what the other taught); after
online STS that has seen 2,000 rounds in a row, averaged over several places to begin, each judged on all other rounds; and of
the whole policy, where corrections per position and request come on top, as it predicts round after round behind the first
2,000. Then two engines serve greedy requests under the adaptive policy, one of them held to raw confidences, and take turns.
"""

import datetime
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from cpu_matrix import MIXED, RESULTS, machine, prompts
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess
from vllm_dspark.verification import calibration
from vllm_dspark.verification.calibration import Rounds
from vllm_dspark.verification.history import History
from vllm_dspark.verification.online import OnlineSTS
from vllm_dspark.verification.survival import Floats, logit, survival

ROUNDS = 2_000  # that online STS learns from
WINDOWS = 8  # places to begin
METHODS = ("raw", "offline STS", "online STS", "whole policy")
CELLS = (("code", 1), ("prose", 8), ("records", 8), (MIXED, 32))


def record() -> None:
    """In an engine's process: append every verified round to the file that DSPARK_ROUNDS names."""
    from vllm_dspark.verification import policy

    original = policy.Policy.observe
    steps = itertools.count()

    def observe(self: Any, outcomes: Any) -> None:
        plan, step = self._plan, next(steps)
        if plan is not None and plan.raw is not None:
            places = plan.places(outcomes.requests).tolist()
            with open(os.environ["DSPARK_ROUNDS"], "a") as file:
                for place, name, verified, accepted in zip(
                    places, outcomes.requests, outcomes.verified, outcomes.accepted, strict=True
                ):
                    if place >= 0 and verified == self.width:
                        file.write(json.dumps([step, name, plan.raw[place].tolist(), int(accepted)]) + "\n")
        original(self, outcomes)

    policy.Policy.observe = observe


def hold_raw() -> None:
    """In an engine's process: the policy takes confidences as they come and corrects nothing."""
    from vllm_dspark.verification import history, online

    online.OnlineSTS.tick = lambda self: False
    original = history.History.conditional

    def conditional(self: Any, slots: Any, logits: Any) -> Any:
        self.positions[:] = 0.0
        self.shift[:] = 0.0
        self.factor[:] = 1.0
        return original(self, slots, logits)

    history.History.conditional = conditional


@dataclass(frozen=True)
class Recorded:
    """Fully verified rounds in the order in which they were served: step, request, raw confidences ``(n, γ)``, accepted."""

    step: NDArray[np.int64]
    request: NDArray[np.int64]
    confidences: Floats
    accepted: NDArray[np.int64]

    def part(self, which: slice | NDArray[Any]) -> Rounds:
        accepted = self.accepted[which]
        return Rounds(self.confidences[which], np.full(accepted.size, self.confidences.shape[1]), accepted)


def collect(head: str, count: int, tokens: int, folder: Path, console: Console) -> dict[str, Recorded]:
    """Rounds per domain: temperature 1, drafts drawn from q, all of them verified; those that lie in the folder are taken."""
    files = {domain: folder / f"{domain}.npz" for domain in demo.DOMAINS}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "rounds.jsonl"
        options = _options(head, {"policy": "fixed"}, draft_sample_method="probabilistic")
        with EngineProcess(prepare="calibration:record", environment={"DSPARK_ROUNDS": str(path)}, **options) as engine:
            for domain, file in files.items():
                path.unlink(missing_ok=True)
                drafts = 0
                while drafts < count:
                    texts = demo.prompts(domain) * 4
                    drafts += engine.generate(texts, max_tokens=tokens, concurrency=32, temperature=1.0).drafts
                    console.print(f"{domain}: {drafts} of {count} rounds")
                step, names, confidences, accepted = zip(*map(json.loads, path.read_text().splitlines()), strict=True)
                request = np.unique(names, return_inverse=True)[1]
                np.savez(file, step=step, request=request, confidences=confidences, accepted=accepted)
        path.unlink()
    return {domain: Recorded(**np.load(file)) for domain, file in files.items()}


def _options(head: str, dspark: dict[str, Any], **more: Any) -> dict[str, Any]:
    speculative = {
        "method": "dspark", "model": str(demo.drafter(head)), "num_speculative_tokens": 7, "dspark": dspark, **more
    }  # fmt: skip
    return {
        "model": str(demo.TARGET), "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 64,
        "speculative_config": speculative,
    }  # fmt: skip


def steps(found: Recorded, first: int, last: int) -> Iterator[slice]:
    """Rounds ``first`` to ``last``, those of one step together."""
    edges = first + 1 + np.flatnonzero(np.diff(found.step[first:last]))
    return (slice(a, b) for a, b in itertools.pairwise([first, *edges.tolist(), last]))


def online(found: Recorded, first: int) -> Floats:
    """Temperatures after the 2,000 rounds from ``first`` on."""
    sts = OnlineSTS(found.confidences.shape[1])
    for step in steps(found, first, first + ROUNDS):
        rounds = found.part(step)
        sts.observe(rounds.confidences, rounds.verified, rounds.accepted)
        sts.tick()
    return sts.temperatures


def served(found: Recorded) -> Floats:
    """Survivals ``(n, γ)`` as the policy predicts them: temperatures and corrections from the rounds before, no others."""
    width = found.confidences.shape[1]
    sts, history = OnlineSTS(width), History(width)
    predicted = np.empty(found.confidences.shape)
    for request in range(found.request.max() + 1):
        history.reset(request, 0)
    for step in steps(found, 0, found.step.size):
        rounds, slots = found.part(step), found.request[step]
        conditional = history.conditional(slots, logit(rounds.confidences) / sts.temperatures)
        predicted[step] = np.cumprod(conditional, axis=1)
        history.judged(slots, conditional, rounds.verified, rounds.accepted)
        sts.observe(rounds.confidences, rounds.verified, rounds.accepted)
        sts.tick()
    return predicted


def predictions(found: Recorded) -> dict[str, list[tuple[Floats, Rounds]]]:
    """Survivals and the rounds that judge them by method, one pair for every place to begin."""
    count = found.accepted.size
    halves = [slice(0, count // 2), slice(count // 2, count)]
    pairs: dict[str, list[tuple[Floats, Rounds]]] = {"raw": [(survival(found.confidences), found.part(slice(None)))]}
    tests = [(found.part(test), calibration.fit(found.part(learn))) for learn, test in (halves, halves[::-1])]
    pairs["offline STS"] = [(survival(rest.confidences, learned), rest) for rest, learned in tests]
    pairs["online STS"] = []
    for first in np.linspace(0, count - ROUNDS, WINDOWS).astype(int).tolist():
        rest = found.part(np.r_[0:first, first + ROUNDS : count])
        pairs["online STS"].append((survival(rest.confidences, online(found, first)), rest))
    pairs["whole policy"] = [(served(found)[ROUNDS:], found.part(slice(ROUNDS, None)))]
    return pairs


def judge(pairs: dict[str, list[tuple[Floats, Rounds]]]) -> dict[str, Any]:
    """Figures of each method per position, and the ECE that chance alone leaves."""
    figures: dict[str, Any] = {"rounds": pairs["raw"][0][1].verified.size}
    for name, found in pairs.items():
        qualities = [calibration.figures(predicted, rounds) for predicted, rounds in found]
        figures[name] = {
            figure: np.mean([[getattr(q, figure) for q in quality] for quality in qualities], axis=0).tolist()
            for figure in ("ece", "auroc", "brier")
        }
        means = [np.mean([q.ece for q in quality]) for quality in qualities]
        figures[name]["ece_spread"] = float(np.std(means))
    figures["chance_ece"] = chance(pairs["raw"][0][0])
    return figures


def chance(predicted: Floats, repeats: int = 50) -> list[float]:
    """ECE per position if the predictions were exactly right: what so few rounds cannot tell from nothing."""
    rng = np.random.default_rng(0)
    draws = rng.random((repeats, *predicted.shape)) < predicted
    width = predicted.shape[1]
    return [float(np.mean([calibration.ece(predicted[:, k], drawn[:, k]) for drawn in draws])) for k in range(width)]


def worth(head: str, repeats: int, console: Console) -> list[dict[str, Any]]:
    """Throughput of the adaptive policy, calibrated over raw, per cell; short runs, cells and arms by turns."""
    ratios: dict[tuple[str, int], list[float]] = {cell: [] for cell in CELLS}
    with (
        EngineProcess(**_options(head, {})) as calibrated,
        EngineProcess(prepare="calibration:hold_raw", **_options(head, {})) as raw,
    ):
        for engine in (calibrated, raw):
            engine.generate(prompts(MIXED, 64), max_tokens=96, concurrency=8)  # something to learn from
        for repeat, cell in itertools.product(range(repeats), CELLS):
            texts = prompts(cell[0], max(cell[1], 4))
            order = (calibrated, raw) if repeat % 2 else (raw, calibrated)
            speed = {id(e): e.generate(texts, max_tokens=64, concurrency=cell[1]).tokens_per_second for e in order}
            ratios[cell].append(speed[id(calibrated)] / speed[id(raw)])
            if cell == CELLS[-1] and repeat % 10 == 9:
                medians = ", ".join(f"{statistics.median(found):.3f}" for found in ratios.values())
                console.print(f"{repeat + 1} of {repeats}: {medians}")
    results = []
    for (domain, load), found in ratios.items():
        again = np.random.default_rng(0).choice(found, (2_000, len(found)))
        low, high = np.quantile(np.median(again, axis=1), (0.025, 0.975)).tolist()
        middle, quartiles = statistics.median(found), np.quantile(found, (0.25, 0.75)).tolist()
        results.append(
            {"domain": domain, "concurrency": load, "median": middle, "quartiles": quartiles, "interval": [low, high],
             "repeats": len(found)}
        )  # fmt: skip
        console.print(f"calibrated over raw, {domain} c={load}: {middle:.3f} (95 % of the median: {low:.3f}–{high:.3f})")
    return results


def plot(collected: dict[str, dict[str, list[tuple[Floats, Rounds]]]], path: Path) -> None:
    """Reliability diagrams: how often the first k drafts survived over what was predicted, per domain, all k together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(collected), figsize=(4 * len(collected), 4), sharey=True)
    for axis, (domain, pairs) in zip(axes, collected.items(), strict=True):
        for name, found in pairs.items():
            a = np.concatenate([predicted for predicted, _ in found])
            happened = np.concatenate([rounds.accepted[:, None] > np.arange(a.shape[1]) for _, rounds in found])
            index = np.minimum((a.ravel() * calibration.BINS).astype(int), calibration.BINS - 1)
            count = np.bincount(index, minlength=calibration.BINS)
            full = count >= 30
            means = [
                np.bincount(index, values.ravel(), minlength=calibration.BINS)[full] / count[full] for values in (a, happened)
            ]
            axis.plot(*means, marker="o", markersize=3, label=name)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axis.set(title=domain, xlabel="predicted survival")
    axes[0].set_ylabel("frequency")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(figures: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="ECE of the survival in %, mean over positions (positions 1 and last)")
    for name in ("domain", "rounds", *METHODS, "chance alone"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, found in figures.items():
        errors = [*(found[name]["ece"] for name in METHODS), found["chance_ece"]]
        cells = [f"{100 * np.mean(e):.2f} ({100 * e[0]:.1f}, {100 * e[-1]:.1f})" for e in errors]
        table.add_row(domain, str(found["rounds"]), *cells)
    means = [np.mean([found[name]["ece"] for found in figures.values()]) for name in METHODS]
    table.add_row("mean", "", *(f"{100 * mean:.2f}" for mean in means), "")
    console.print(table)


def main(
    head: Annotated[str, typer.Option(help="correction head of the drafter")] = "vanilla",
    count: Annotated[int, typer.Option(help="rounds recorded of each domain, at least")] = 40_000,
    tokens: Annotated[int, typer.Option(help="tokens generated for each request")] = 96,
    rounds: Annotated[Path | None, typer.Option(help="folder that keeps the rounds; those that lie there are taken")] = None,
    repeats: Annotated[int, typer.Option(help="runs of both arms in every cell; below 2: no throughput")] = 60,
    only_throughput: Annotated[bool, typer.Option("--only-throughput", help="keep the other figures of the JSON")] = False,
    draw: Annotated[bool, typer.Option("--plot/--no-plot", help="draw the reliability diagram")] = True,
    out: Annotated[Path, typer.Option(help="where the JSON goes; the diagram lies beside it")] = RESULTS / "calibration.json",
) -> None:
    """Collect, judge, compare, write."""
    console = Console()
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    kept |= {"date": datetime.date.today().isoformat(), "machine": machine(), "head": head}
    if not only_throughput:
        with tempfile.TemporaryDirectory() as folder:
            collected = collect(head, count, tokens, rounds or Path(folder), console)
        found = {domain: predictions(recorded) for domain, recorded in collected.items()}
        kept["domains"] = {domain: judge(pairs) for domain, pairs in found.items()}
        kept["tokens"] = tokens
        show(kept["domains"], console)
        if draw:
            plot(found, out.with_suffix(".png"))
    if repeats > 1:
        kept["calibrated_over_raw"] = worth(head, repeats, console)
    out.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
