"""The sequential stage: fused kernels against vLLM's operator sequence, torch.compile of it, and what the bytes allow.

    python benchmarks/kernels.py [--shape qwen3] [--batch 1 2 4 ...] [--out FILE.json] [--plot FILE.png]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --dry        # tiny shapes, every arm once, and the predictions

Needs torch, Triton and rich, not vLLM. One round is K = 7 steps. On a GPU every arm is timed as it is launched from Python
and as a CUDA graph, in a loop (caches as the last round left them) and after the second-level cache was overwritten. Every
arm's tokens are first compared with the eager stage's. Without a GPU the measured columns stay empty beside the predictions.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernels_model import SHAPES, SLOTS, Arm, Shape, cost
from kernels_vllm import Sampler, sequence
from serving import report
from torch import Tensor

from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.choose import why_no_kernels
from vllm_dspark.heads.modules import HeadKind, MarkovHead
from vllm_dspark.heads.stage import Draws, EagerStage, Round
from vllm_dspark.heads.weights import prepare

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Row:
    """One arm at one batch; seconds are microseconds a round, None where not measured."""

    arm: str
    shape: str
    batch: int
    sampled: bool
    bytes: int
    flops: int
    floor_us: float
    launches: int
    predicted_us: float
    loop_us: float | None = None
    graph_us: float | None = None
    graph_cold_us: float | None = None


ARMS = (
    Arm("vllm sequence", "sequence"),
    Arm("vllm sequence, compiled", "compiled sequence"),
    Arm("fused bf16", "fused"),
    Arm("fused int8", "fused", format="int8"),
    Arm("fused fp8", "fused", format="fp8"),
    Arm("fused bf16 gated", "fused", "gated"),
    Arm("fused bf16 rnn", "fused", "rnn"),
    Arm("candidates 256", "fused", top=256),
)


class Bench:
    """One shape and batch on one device: inputs, and every arm as a function without arguments."""

    def __init__(self, shape: Shape, batch: int, sampled: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16
        self.shape, self.batch, self.device = shape, batch, device
        kinds: tuple[HeadKind, ...] = ("vanilla", "gated", "rnn")
        self.heads = {kind: MarkovHead(kind, shape.vocab, shape.vocab, shape.rank, shape.hidden) for kind in kinds}
        first = self.heads["vanilla"]
        for head in self.heads.values():
            head.markov_w1, head.markov_w2 = first.markov_w1, first.markov_w2
            head.to(device, dtype).requires_grad_(False)
        hidden = torch.randn(batch, SLOTS, shape.hidden, device=device, dtype=dtype)
        logits = torch.randn(batch, SLOTS, shape.vocab, device=device, dtype=dtype) * 3
        draws = None
        if sampled:
            draws = Draws(
                torch.ones(batch, device=device),
                torch.arange(batch, device=device),
                torch.arange(batch * SLOTS, device=device).view(batch, SLOTS) + 1,
                None,
                torch.full((batch, SLOTS, shape.vocab), -torch.inf, device=device, dtype=dtype),
            )
        tokens = torch.zeros(batch, SLOTS, dtype=torch.int64, device=device)
        self.round = Round(hidden, logits, torch.arange(batch, device=device) % shape.vocab, tokens, draws=draws)

    def arm(self, arm: Arm) -> Callable[[], None]:
        """A function that drafts one round into ``self.round.tokens``."""
        weights = prepare(self.heads[arm.kind], None, None, arm.format)
        if arm.implementation == "fused":
            from vllm_dspark.heads.kernels.stage import FusedStage

            candidates = Candidates(min(arm.top, self.shape.vocab // 4)) if arm.top else None
            stage = FusedStage(weights, self.batch, SLOTS, self.device, candidates)
            if arm.top and self.round.draws is not None and self.round.draws.processed is not None:
                self.round.draws.processed.fill_(-torch.inf)
            return lambda: stage.draft(self.round)
        draws = self.round.draws
        sample = None if draws is None else Sampler(self.batch, draws, self.device)
        run = torch.compile(sequence) if arm.implementation == "compiled sequence" else sequence
        return lambda: run(self.heads["vanilla"], self.round, sample)

    def agreement(self, arm: Arm, run: Callable[[], None]) -> float:
        """Share of rows whose first token is the eager stage's (later ones may follow another tie)."""
        self.round.tokens.fill_(-1)
        run()
        found = self.round.tokens[:, 0].clone()
        candidates = Candidates(min(arm.top, self.shape.vocab // 4)) if arm.top else None
        weights = prepare(self.heads[arm.kind], None, None, arm.format)
        EagerStage(weights, self.batch, self.device, candidates).draft(self.round)
        return float((self.round.tokens[:, 0] == found).float().mean())


# -- timing --


def timed(run: Callable[[], None], repeats: int, flush: Tensor | None) -> float:
    """Median microseconds, by events; ``flush`` is overwritten before each run when given."""
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(row: Row, run: Callable[[], None], device: torch.device) -> None:
    """Fill the measured columns of ``row``."""
    flush = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    for _ in range(5):
        run()
    row.loop_us = timed(run, 30, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    inner = 10

    def replay() -> None:
        for _ in range(inner):
            graph.replay()

    row.graph_us = timed(replay, 20, None) / inner
    row.graph_cold_us = timed(graph.replay, 20, flush)


def fill(row: Row, bench: Bench, arm: Arm) -> None:
    """Measure ``arm``; torch.compile may fail on a kernel that is not torch's, which leaves its columns empty."""
    name = f"{row.shape} B={row.batch} {'sampled' if row.sampled else 'greedy'} {arm.name}"
    try:
        run = bench.arm(arm)
        print(f"{name}: first tokens agree in {bench.agreement(arm, run):.1%}", flush=True)
        measure(row, run, bench.device)
    except Exception as error:
        if arm.implementation != "compiled sequence":
            raise
        print(f"{name}: not measured, {type(error).__name__}: {error}", flush=True)


# -- report --


def table(rows: list[Row]) -> str:
    """The rows as text; a dash where nothing was measured."""

    def number(value: float | None) -> str:
        return f"{value:9.1f}" if value is not None else f"{'–':>9}"

    lines = [f"{'shape':7} {'arm':25} {'B':>4} {'draws':7} {'MB':>8} {'GFLOP':>8} {'launches':>8} {'floor µs':>9} "
             f"{'predicted':>9} "
             f"{'graph µs':>9} {'cold µs':>9} {'eager µs':>9}"]  # fmt: skip
    for r in rows:
        draws = "sampled" if r.sampled else "greedy"
        lines.append(
            f"{r.shape:7} {r.arm:25} {r.batch:4} {draws:7} {r.bytes / 1e6:8.1f} {r.flops / 1e9:8.2f} {r.launches:8} "
            f"{r.floor_us:9.1f} {r.predicted_us:9.1f} {number(r.graph_us)} {number(r.graph_cold_us)} {number(r.loop_us)}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Time a round over the batch, one line an arm; predictions dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = sorted({r.shape for r in rows})
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(7 * len(shapes), 5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for place, arm in enumerate(dict.fromkeys(r.arm for r in rows)):
            some = [r for r in rows if r.arm == arm and r.shape == shape and r.sampled]
            axis.plot([r.batch for r in some], [r.predicted_us for r in some], "--", color=f"C{place}", linewidth=1)
            seen = [r for r in some if r.graph_us is not None]
            axis.plot([r.batch for r in seen], [r.graph_us for r in seen], "o-", color=f"C{place}")
            axis.plot([], [], "o-" if seen else "--", color=f"C{place}", label=arm if seen else f"{arm} (predicted)")
        axis.set(xscale="log", yscale="log", xlabel="requests", ylabel="µs a round", title=f"{shape}, {SLOTS} steps, sampled")
        axis.legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES], default=["qwen3", "gemma4"])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dry", action="store_true", help="run every arm once on tiny shapes; print predictions")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry else "cpu")
    measuring = device.type == "cuda"
    rows = []
    for name in options.shape:
        for batch in options.batch:
            for sampled in (False, True):
                bench = Bench(SHAPES[name], batch, sampled, device) if measuring else None
                for arm in ARMS:
                    c = cost(arm, SHAPES[name], batch, sampled)
                    row = Row(
                        arm.name, name, batch, sampled, c.bytes, c.flops, round(c.floor_us(), 1), c.launches,
                        round(c.predicted_us(), 1),
                    )  # fmt: skip
                    if bench is not None:
                        fill(row, bench, arm)
                    rows.append(row)
                if options.out:
                    report.save(options.out, {"rows": [asdict(row) for row in rows]})
    print(table(rows))
    if options.dry:
        dry_run(device)
    if options.plot:
        plot(rows, options.plot)


def dry_run(device: torch.device) -> None:
    """Every arm once on the tiny shape; says which could not run."""
    for batch, sampled in ((1, False), (3, True)):
        bench = Bench(SHAPES["tiny"], batch, sampled, device)
        for arm in ARMS:
            weights = prepare(bench.heads[arm.kind], None)
            reason = why_no_kernels(device, weights.rank, interpreted=os.environ.get("TRITON_INTERPRET") == "1")
            if arm.implementation == "compiled sequence":
                reason = "compiling is left to GPUs"
            elif arm.implementation == "sequence" and not sampled:
                reason = None
            if reason is not None:
                print(f"dry B={batch} {arm.name}: not run, {reason}")
                continue
            agree = bench.agreement(arm, bench.arm(arm))
            print(f"dry B={batch} {'sampled' if sampled else 'greedy'} {arm.name}: first tokens agree in {agree:.1%}")


if __name__ == "__main__":
    main()
