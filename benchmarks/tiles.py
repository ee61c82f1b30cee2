"""Launch shapes of the step kernel, timed against what ``heads/kernels/launch.py`` chooses.

    python benchmarks/tiles.py --batch 64 --format native --tile 64,32,4,3,2 --tile 64,64,4,2,2 --out FILE.json

A tile is rows, ids, warps, pipeline stages and programs a multiprocessor is counted on to run at once; without any, a grid
of them is tried. Each times one round of Qwen3's shape (K = 7) as a CUDA graph, greedy and sampled; one that does not compile
or run is named and left out, as is what ``--seconds`` cut short. Its tokens are compared with the chosen launch's: other tiles
add in another order, so a tie may fall the other way. Needs a GPU, not vLLM. Processes compile first, then one measures.
"""

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from kernels import Bench, timed
from kernels_model import SHAPES, Arm
from rich.console import Console
from rich.table import Table
from serving import report
from torch import Tensor

from vllm_dspark.heads.kernels import stage as stage_module
from vllm_dspark.heads.kernels.launch import ALIGN, MAX_PARTS, StepLaunch, ceiling, device_of, step_launch
from vllm_dspark.kinds import WeightFormat

SHAPE = SHAPES["qwen3"]
ROWS, IDS, WARPS, STAGES, RESIDENT = (1, 16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4), (1, 2, 4)

Tile = tuple[int, int, int, int, int]
Try = tuple[str, int, bool, Tile | None]  # format, batch, sampled, tile (None: the chosen launch)


def grid(batch: int) -> list[Tile]:
    """Tiles that make sense for ``batch`` rows: one row streams without stages, larger blocks have 16 rows or no half empty."""
    rows = [n for n in ROWS if (batch <= 2 if n == 1 else n < 2 * max(batch, 16))]
    found = itertools.product(rows, IDS, WARPS, STAGES, RESIDENT)
    return [tile for tile in found if (tile[0] == 1) == (tile[3] == 1)]


def launch_of(tile: Tile, batch: int, processors: int) -> StepLaunch:
    rows, ids, warps, stages, resident = tile
    wanted = min(max(1, processors * resident // ceiling(batch, rows)), MAX_PARTS)
    chunk = ceiling(SHAPE.vocab, wanted * ALIGN) * ALIGN
    return StepLaunch(rows, ids, ceiling(SHAPE.vocab, chunk), chunk, warps, stages, resident, batch <= 16)


class Rounds:
    """Drafts a round of one try after another; what tries share is made once."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self._made: dict[tuple[str, int, bool], tuple[Bench, Callable[[], None]]] = {}

    def of(self, what: Try) -> tuple[Bench, Callable[[], None]]:
        form, batch, sampled, tile = what
        if what[:3] not in self._made:
            bench = Bench(SHAPE, batch, sampled, self.device)
            self._made[what[:3]] = bench, bench.arm(Arm("tile", "fused", format=cast(WeightFormat, form)))
        processors = device_of(self.device).processors
        fixed = None if tile is None else launch_of(tile, batch, processors)
        stage_module.step_launch = step_launch if fixed is None else lambda *_: fixed
        return self._made[what[:3]]


def compile_some(tries: Sequence[Try], seconds: float) -> list[Try]:
    """Run each once, so that Triton's cache has it; those that ran."""
    rounds, end, done = Rounds(), time.monotonic() + seconds, []
    for what in tries:
        try:
            if time.monotonic() > end:
                raise TimeoutError("not begun in time")
            rounds.of(what)[1]()
            torch.cuda.synchronize()
            done.append(what)
        except Exception as error:
            print(f"left out {what}: {type(error).__name__}: {str(error)[:80]}", flush=True)
            if "CUDA error" in str(error):
                break  # this process cannot use the GPU any more
    return done


def measure(tries: Sequence[Try], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each: microseconds a round (median), and the share of its tokens that are the chosen launch's."""
    rounds, chosen = Rounds(), dict[tuple[str, int, bool], Tensor]()
    for what in tries:
        bench, run = rounds.of(what)
        bench.round.tokens.fill_(-1)
        run()
        tokens = bench.round.tokens.clone()
        if what[3] is None:
            chosen[what[:3]] = tokens
        graph = torch.cuda.CUDAGraph()
        run()
        with torch.cuda.graph(graph):
            run()
        times = timed(lambda graph=graph: [graph.replay() for _ in range(5)], repeats, None)  # type: ignore[misc]
        same = round(float((tokens == chosen[what[:3]]).float().mean()), 3) if what[:3] in chosen else None
        row = dict(zip(("format", "batch", "sampled", "tile"), what, strict=True))
        yield {**row, "us": round(times / 5, 1), "same": same}


def main(
    form: Annotated[list[str] | None, typer.Option("--format", help="native, int8, fp8; repeat for several")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="rows; repeat for several")] = None,
    tile: Annotated[list[str] | None, typer.Option(help="rows,ids,warps,stages,resident; repeat for several")] = None,
    jobs: Annotated[int, typer.Option(help="processes that compile")] = 8,
    seconds: Annotated[float, typer.Option(help="for compiling")] = 600.0,
    repeats: Annotated[int, typer.Option(help="timings of each")] = 9,
    out: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Compile, measure, print the fastest of each and write all."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that this PyTorch can use: nothing was measured")
    given = [cast(Tile, tuple(int(n) for n in one.split(","))) for one in tile or ()]
    tries: list[Try] = [
        (f, n, sampled, some)
        for f, n, sampled in itertools.product(form or ["native", "int8", "fp8"], batch or [1, 8, 64], (False, True))
        for some in (None, *(given or grid(n)))
    ]
    first = sorted(tries, key=lambda what: what[3] is not None)  # what all are compared with
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(compile_some, first[at::jobs], seconds) for at in range(jobs)]
        ran = {what for part in parts for what in part.result()}
    rows = []
    for row in measure([what for what in tries if what in ran], repeats):
        rows.append(row)
        if out:
            report.save(out, {"rows": rows})
    table = Table(title="Microseconds a round")
    for name in ("format", "batch", "draws", "chosen", "the fastest"):
        table.add_column(name)
    for key, some in itertools.groupby(rows, key=lambda row: (row["format"], row["batch"], row["sampled"])):
        ordered = sorted(some, key=lambda row: row["us"])
        chosen = next((str(row["us"]) for row in ordered if row["tile"] is None), "–")
        best = "; ".join(f"{row['us']} {row['tile'] or 'chosen'}" for row in ordered[:4])
        table.add_row(key[0], str(key[1]), "sampled" if key[2] else "greedy", chosen, best)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
