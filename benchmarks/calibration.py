"""How well the confidences of the bundled drafter are calibrated, raw and after STS, and what that is worth.

    python benchmarks/calibration.py                  # about ten minutes on two cores
    python benchmarks/calibration.py --samples 2 --repeats 3 --no-plot

First every draft of many sampled requests is verified, so that no position is censored, and the survival's ECE, AUROC and
Brier score are computed per domain and position: raw; after offline STS fitted on the first half; after online STS that has
seen 2,000 rounds. All are judged on the same rounds, the second half. Then two engines serve greedy requests under the adaptive
policy, one of them held to raw confidences, and take turns.
"""

import datetime
import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from cpu_matrix import MIXED, RESULTS, machine, prompts
from rich.console import Console
from rich.table import Table

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess
from vllm_dspark.verification import calibration
from vllm_dspark.verification.calibration import Rounds
from vllm_dspark.verification.online import OnlineSTS
from vllm_dspark.verification.survival import Floats, survival

ROUNDS = 2_000  # that online STS learns from
CELLS = (("code", 1), ("prose", 8), ("records", 8), (MIXED, 32))


def record() -> None:
    """In an engine's process: append every verified round to the file that DSPARK_ROUNDS names."""
    from vllm_dspark.verification import policy

    original = policy.Policy.observe

    def observe(self: Any, outcomes: Any) -> None:
        plan = self._plan
        if plan is not None and plan.raw is not None:
            places = plan.places(outcomes.requests).tolist()
            with open(os.environ["DSPARK_ROUNDS"], "a") as file:
                for place, verified, accepted in zip(places, outcomes.verified, outcomes.accepted, strict=True):
                    if place >= 0:
                        file.write(json.dumps([plan.raw[place].tolist(), int(verified), int(accepted)]) + "\n")
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
        return original(self, slots, logits)

    history.History.conditional = conditional


def collect(head: str, samples: int, tokens: int, folder: Path) -> dict[str, Rounds]:
    """Rounds per domain: temperature 1, drafts drawn from q, all of them verified."""
    found = {}
    path = folder / "rounds.jsonl"
    options = _options(head, {"policy": "fixed"}, draft_sample_method="probabilistic")
    with EngineProcess(prepare="calibration:record", environment={"DSPARK_ROUNDS": str(path)}, **options) as engine:
        for domain in demo.DOMAINS:
            path.unlink(missing_ok=True)
            texts = demo.prompts(domain) * samples
            engine.generate(texts, max_tokens=tokens, concurrency=32, temperature=1.0)
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            confidences, verified, accepted = zip(*(row for row in rows if row[1] == len(row[0])), strict=True)
            found[domain] = Rounds(np.array(confidences), np.array(verified), np.array(accepted))
    return found


def _options(head: str, dspark: dict[str, Any], **more: Any) -> dict[str, Any]:
    speculative = {
        "method": "dspark", "model": str(demo.drafter(head)), "num_speculative_tokens": 7, "dspark": dspark, **more
    }  # fmt: skip
    return {
        "model": str(demo.TARGET), "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 64,
        "speculative_config": speculative,
    }  # fmt: skip


def part(rounds: Rounds, which: slice) -> Rounds:
    return Rounds(rounds.confidences[which], rounds.verified[which], rounds.accepted[which])


def temperatures(rounds: Rounds) -> dict[str, Floats]:
    """Temperatures by method, learned from the first half."""
    half = len(rounds.verified) // 2
    learn = part(rounds, slice(0, half))
    online = OnlineSTS(rounds.confidences.shape[1])
    for start in range(0, min(half, ROUNDS), 16):
        step = part(learn, slice(start, min(start + 16, ROUNDS)))
        online.observe(step.confidences, step.verified, step.accepted)
        online.tick()
    return {
        "raw": np.ones(rounds.confidences.shape[1]),
        "offline STS": calibration.fit(learn),
        "online STS": online.temperatures,
    }


def judge(rounds: Rounds) -> dict[str, Any]:
    """Figures of each method, per position, on the second half; and the ECE that chance alone leaves there."""
    rest = part(rounds, slice(len(rounds.verified) // 2, None))
    figures: dict[str, Any] = {"rounds": len(rest.verified)}
    for name, learned in temperatures(rounds).items():
        quality = calibration.quality(rest, learned)
        figures[name] = {
            "temperatures": learned.tolist(), "ece": [q.ece for q in quality], "auroc": [q.auroc for q in quality],
            "brier": [q.brier for q in quality],
        }  # fmt: skip
    figures["chance_ece"] = chance(survival(rest.confidences, np.asarray(figures["offline STS"]["temperatures"])))
    return figures


def chance(predicted: Floats, repeats: int = 50) -> list[float]:
    """ECE per position if the predictions were exactly right: what so few rounds cannot tell from nothing."""
    rng = np.random.default_rng(0)
    draws = rng.random((repeats, *predicted.shape)) < predicted
    width = predicted.shape[1]
    return [float(np.mean([calibration.ece(predicted[:, k], drawn[:, k]) for drawn in draws])) for k in range(width)]


def worth(head: str, repeats: int, console: Console) -> list[dict[str, Any]]:
    """Throughput of the adaptive policy, calibrated over raw, per cell."""
    results = []
    with (
        EngineProcess(**_options(head, {})) as calibrated,
        EngineProcess(prepare="calibration:hold_raw", **_options(head, {})) as raw,
    ):
        for engine in (calibrated, raw):
            engine.generate(prompts(MIXED, 32), max_tokens=96, concurrency=8)  # something to learn from
        for domain, load in CELLS:
            texts = prompts(domain, max(2 * load, 4))
            ratios = []
            for repeat in range(repeats):
                order = (calibrated, raw) if repeat % 2 else (raw, calibrated)
                speed = {id(e): e.generate(texts, max_tokens=96, concurrency=load).tokens_per_second for e in order}
                ratios.append(speed[id(calibrated)] / speed[id(raw)])
            low, middle, high = statistics.quantiles(ratios, n=4)
            results.append({"domain": domain, "concurrency": load, "median": middle, "quartiles": [low, high]})
            console.print(f"calibrated over raw, {domain} c={load}: {middle:.3f} ({low:.3f}–{high:.3f})")
    return results


def plot(collected: dict[str, Rounds], path: Path) -> None:
    """Reliability diagrams: how often the first k drafts survived over what was predicted, per domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(collected), figsize=(4 * len(collected), 4), sharey=True)
    for axis, (domain, rounds) in zip(axes, collected.items(), strict=True):
        rest = part(rounds, slice(len(rounds.verified) // 2, None))
        for name, learned in temperatures(rounds).items():
            a = survival(rest.confidences, learned)
            happened = np.stack([rest.survived(k) for k in range(a.shape[1])], axis=1)
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
    for name in ("domain", "rounds", "raw", "offline STS", "online STS", "chance alone"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, found in figures.items():
        errors = [found["raw"]["ece"], found["offline STS"]["ece"], found["online STS"]["ece"], found["chance_ece"]]
        cells = [f"{100 * np.mean(e):.1f} ({100 * e[0]:.1f}, {100 * e[-1]:.1f})" for e in errors]
        table.add_row(domain, str(found["rounds"]), *cells)
    console.print(table)


def main(
    head: Annotated[str, typer.Option(help="correction head of the drafter")] = "vanilla",
    samples: Annotated[int, typer.Option(help="times that every held-out prompt is sampled")] = 10,
    tokens: Annotated[int, typer.Option(help="tokens generated for each request")] = 96,
    repeats: Annotated[int, typer.Option(help="runs of every arm in every cell; 0: no throughput")] = 9,
    draw: Annotated[bool, typer.Option("--plot/--no-plot", help="draw the reliability diagram")] = True,
    out: Annotated[Path, typer.Option(help="where the JSON goes; the diagram lies beside it")] = RESULTS / "calibration.json",
) -> None:
    """Collect, judge, compare, write."""
    console = Console()
    out.parent.mkdir(parents=True, exist_ok=True)
    collected = collect(head, samples, tokens, out.parent)
    (out.parent / "rounds.jsonl").unlink()
    figures = {domain: judge(rounds) for domain, rounds in collected.items()}
    show(figures, console)
    if draw:
        plot(collected, out.with_suffix(".png"))
    throughput = worth(head, repeats, console) if repeats > 1 else []
    kept = {"date": datetime.date.today().isoformat(), "machine": machine(), "head": head, "tokens": tokens, "samples": samples}
    out.write_text(json.dumps({**kept, "domains": figures, "calibrated_over_raw": throughput}, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
