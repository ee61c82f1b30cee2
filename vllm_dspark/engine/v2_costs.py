"""Step times of a V2 runner, measured at start with its own dummy steps, once graphs are captured; kept where V1's are."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_dspark.engine import profiling
from vllm_dspark.options import DSparkOptions
from vllm_dspark.verification import profile
from vllm_dspark.verification.asynchronous import BatchCostModel
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming

SHORT, LONG = 64, 8192  # tokens of context profiled
STEPS = 3  # timed steps of every shape, after one that is not


def cost(runner: Any, options: DSparkOptions, agree: Callable[[Any], Any]) -> BatchCostModel:
    """The cost model of this runner, from kept or measured step times."""
    config, speculator = runner.vllm_config, runner.speculator
    depends = profiling.key(config, speculator.draft_model_config, speculator.num_query_per_req) | _key(runner, options)
    alone = config.parallel_config.data_parallel_size == 1  # engines that step together must take the same steps
    seconds = options.profile_seconds if alone else 0.0
    found = profiling.known(depends, seconds, options.cache_dir, lambda: Profiler(runner, agree), agree)
    requests = runner.max_num_reqs
    return BatchCostModel(found, requests * runner.decode_query_len, requests)


def _key(runner: Any, options: DSparkOptions) -> dict[str, Any]:
    """What else step times of this runner depend on."""
    config = runner.vllm_config
    stage = ("sequential_stage", "w2_format", "candidates", "listed_candidates", "draft_lm_head")
    return {
        "runner": "V2", "k": runner.speculator.asked, "graphs": str(config.compilation_config.cudagraph_mode),
        "on_device": runner.adaptive_verification is not None, "lora": config.lora_config is not None,
        "cache_dtype": str(config.cache_config.cache_dtype), "draft_sampling": config.speculative_config.draft_sample_method,
        **options.model_dump(include=set(stage)),
    }  # fmt: skip


def dense(sizes: Sequence[int], seconds: Sequence[float], captured: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """A measured curve with a point at every captured size too, on a line between its neighbours.

    A step is padded to the next captured size. Without that point it would be taken to cost as much as the next measured one.
    """
    every = sorted({*sizes, *(size for size in captured if sizes[0] < size < sizes[-1])})
    return tuple(every), tuple(np.interp(every, sizes, seconds).tolist())


class Profiler:
    """Runs dummy steps of a V2 runner, one after the other so that the device never waits for the host."""

    def __init__(self, runner: Any, agree: Callable[[Any], Any]) -> None:
        self.runner, self.speculator, self.agree = runner, runner.speculator, agree
        self.samples: list[StepTiming] = []

    def table(self, deadline: float) -> CostTable:
        """Measure shapes until all are done or rank 0's deadline has come, and fit them. The first is measured in any case."""
        with gpu_sync_allowed():
            once, per_token = self._upkeep()
            for tokens, context, uniform in self._shapes():
                if self.samples and self.agree(time.perf_counter() > deadline):
                    break
                self._shape(tokens, context, uniform)
        captured, width = self._captured(self.runner.cudagraph_manager), self.speculator.num_query_per_req
        drafting = [size // width for size in self._captured(self.speculator.query_cudagraph_manager)]
        table = profile.fit(
            self.samples, max(captured, default=0), max(drafting, default=0),
            f"measured on {profiling.device()}", context_only=once, context_per_token=per_token,
        )  # fmt: skip
        sizes, seconds = dense(table.sizes, table.seconds, captured)
        draft_sizes, draft_seconds = dense(table.draft_sizes, table.draft_seconds, drafting)
        return dataclasses.replace(table, sizes=sizes, seconds=seconds, draft_sizes=draft_sizes, draft_seconds=draft_seconds)

    def beats(self, table: CostTable) -> bool:
        """Whether one request is served far faster than this table has it. Warms the engine up."""
        with gpu_sync_allowed():
            self._shape(1, SHORT, False)
        model = CostModel(table, self.runner.decode_query_len, 1)
        return any(s.target_seconds + s.draft_seconds < profiling.FASTER * sum(model.step(s)) for s in self.samples)

    @staticmethod
    def _captured(manager: Any) -> list[int]:
        return list(manager.captured_token_counts()) if manager is not None else []

    def _shapes(self) -> Iterator[tuple[int, int, bool]]:
        """(tokens, context, whether every request verifies k drafts), the most telling first."""
        runner, width = self.runner, self.runner.decode_query_len
        requests = [1 << power for power in range(runner.max_num_reqs.bit_length())]
        long = min(LONG, runner.max_model_len - width)
        for context in (SHORT, long) if long >= 4 * SHORT else (SHORT,):
            for count in requests:
                if count * width <= runner.max_num_tokens:
                    yield count, context, False
                    yield count * width, context, True
        if getattr(runner.cudagraph_manager, "varlen_decode", False):
            known = {count * factor for count in requests for factor in (1, width)}
            yield from ((size, SHORT, False) for size in self._captured(runner.cudagraph_manager) if size not in known)

    def _run(self, tokens: int, context: int, uniform: bool) -> list[tuple[float, float, int, int]]:
        """Seconds of the target, seconds of the drafting, requests, tokens; of every timed step."""
        stamps = self.speculator.stamps = []
        try:
            for _ in range(1 + STEPS):
                self.runner._dummy_run(tokens, context_len=context, uniform_decode=uniform, skip_eplb=True)
        finally:
            self.speculator.stamps = None
        torch.accelerator.synchronize()
        seconds = self.speculator.clock.seconds
        marks, requests, ran = zip(*stamps, strict=True)
        return [
            (seconds(marks[place - 1], marks[place]), seconds(marks[place], marks[place + 1]), requests[place], ran[place])
            for place in range(2, len(marks), 2)
        ]

    def _shape(self, tokens: int, context: int, uniform: bool) -> None:
        for target, drafting, requests, ran in self._run(tokens, context, uniform):
            total = float(requests * context)
            self.samples.append(StepTiming(ran, requests, total, target, None, requests, total, drafting))

    def _upkeep(self) -> tuple[float, float]:
        """Seconds of a round that only keeps context K/V current: once, and per token."""
        few, many = 1, min(256, self.runner.max_num_reqs * self.runner.decode_query_len, self.runner.max_num_tokens)
        with self.speculator._only_context():
            small, large = (
                float(np.median([drafting for _, drafting, _, _ in self._run(tokens, SHORT, False)])) for tokens in (few, many)
            )
        per_token = max(large - small, 0.0) / max(many - few, 1)
        return max(small - per_token * few, 0.0), per_token
