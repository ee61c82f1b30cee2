"""Step times of the real engine, measured at start: the runner decodes made-up requests, with and without drafts.

Requests are put straight into the runner, as if their context had been computed before, so a long context costs nothing to
set up. Nobody else is served yet, and the cache blocks used are handed out again by the scheduler later.

A CPU's libraries prepare every new size of a matrix product, which can take longer than the product: the sizes that serving
will meet are run once before anything is timed, so that the first requests' first rounds do not pay for it.
"""

import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

import vllm_dspark
from vllm_dspark.engine import hooks
from vllm_dspark.engine.rounds import Decider
from vllm_dspark.verification import profile
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming, next_size
from vllm_dspark.verification.records import NOBODY, Rows

logger = logging.getLogger("vllm.dspark")

SHORT, LONG = 64, 4096  # tokens of context profiled
STEPS = 3  # timed steps of every shape in a pass, after one that is not
PASSES = 2
WARMING = 0.25  # most of the time that may go into running sizes for the first time
FASTER = 0.6  # of the time in a table: the table was measured while the machine was busy
UPKEEP_TOKENS = 256  # context tokens written at once to time that

# Where nothing was measured: a step of 10 ms. Serving corrects it within some dozens of steps.
GUESS = CostTable((1, 64, 512), (0.010, 0.016, 0.060), (1, 64), (0.003, 0.010), label="a guess, not measured")


def key(vllm_config: Any, draft_vllm_config: Any, width: int) -> dict[str, Any]:
    """Everything step times depend on."""
    models = {"target": vllm_config.model_config, "drafter": draft_vllm_config}
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    return {
        **{name: _digest(config.hf_config.to_json_string(use_diff=False)) for name, config in models.items()},
        "dtype": str(vllm_config.model_config.dtype), "quantization": str(vllm_config.model_config.quantization),
        "width": width, "vllm": hooks.vllm_version(), "vllm-dspark": vllm_dspark.__version__, "torch": torch.__version__,
        "device": device(), "threads": torch.get_num_threads(),
        "tensor_parallel": parallel.tensor_parallel_size, "pipeline_parallel": parallel.pipeline_parallel_size,
        "backend": str(vllm_config.attention_config.backend), "compilation": str(compilation.mode),
        "capture_sizes": _digest(str(compilation.cudagraph_capture_sizes)),
        "block_size": vllm_config.cache_config.block_size, "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
    }  # fmt: skip


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


class Measuring(Protocol):
    """Measures one engine.

    Attributes:
        samples: what was measured so far.
    """

    samples: list[StepTiming]

    def table(self, deadline: float) -> CostTable:
        """Step times, measured by then (``time.perf_counter``) or as far as that went."""

    def beats(self, table: CostTable) -> bool:
        """Whether the engine is far faster than this table has it."""


def table(runner: Any, proposer: Any, seconds: float, folder: str | None) -> CostTable:
    """Step times of a V1 runner, see :func:`known`. All tensor-parallel ranks call this together."""
    depends = key(runner.vllm_config, proposer.draft_model_config, proposer.queries)
    agree = get_tp_group().broadcast_object
    return known(depends, seconds, folder, lambda: Profiler(runner, proposer, agree, WARMING * seconds), agree)


def known(
    depends: dict[str, Any],
    seconds: float,
    folder: str | None,
    profiler: Callable[[], Measuring],
    agree: Callable[[Any], Any] = lambda value: value,
) -> CostTable:
    """Step times from the cache, or measured within ``seconds`` and put there; a guess if neither works.

    Times from the cache that the engine beats by far were measured on a busy machine, and are measured again.

    Args:
        depends: everything they depend on. agree: gives every rank rank 0's value.
    """
    path = Path(folder).expanduser() if folder else _user_cache()
    path /= f"steps-{_digest(str(depends))}.json"
    kept: CostTable | None = agree(CostTable.load(path, depends))
    if seconds <= 0:
        logger.info("DSpark step times: %s", f"from {path}" if kept else "not measured; serving will teach them")
        return kept or GUESS
    began = time.perf_counter()
    found, measuring = None, profiler()
    try:
        with torch.random.fork_rng(devices=[]):
            if kept is not None and not agree(measuring.beats(kept)):
                logger.info("DSpark step times: from %s", path)
                return kept
            logger.info("DSpark step times: measuring, for at most %.0f s (see the option profile_seconds)", seconds)
            found = measuring.table(began + seconds)
    except Exception as error:
        logger.warning("DSpark step times cannot be measured (%s: %s); serving will teach them", type(error).__name__, error)
    found = agree(found)
    if found is None:
        return kept or GUESS
    logger.info("DSpark step times: %d sizes in %.1f s", len(found.sizes), time.perf_counter() - began)
    if profile.disturbed(measuring.samples):
        logger.warning("DSpark step times: the machine was busy while they were measured; they are not kept for the next start")
        return found
    try:
        found.save(path, depends)
    except OSError as error:
        logger.warning("DSpark step times cannot be kept in %s (%s); they will be measured again", path, error)
    return found


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-dspark"


def first_sizes(requests: int, width: int) -> list[tuple[int, int]]:
    """(tokens of a step, requests that draft in it): the sizes from half of what these requests verify at most; all, of one.

    Over 1, 2, 4, … requests that makes every size there is, and every number of drafting requests up to 16.
    """
    most = requests * (1 + width)
    sizes = np.unique(next_size(np.arange(most // 2 + 1 if requests > 1 else 2, most + 1)))
    sizes = sizes[sizes <= most]
    drafting = np.linspace(requests, requests // 2 + 1, sizes.size).round().astype(np.int64)
    return list(zip(sizes.tolist(), drafting.tolist(), strict=True))


def spread(drafts: int, requests: int) -> list[int]:
    """Drafts of each request, as evenly as can be."""
    each, more = divmod(drafts, requests)
    return [each + (index < more) for index in range(requests)]


class Script(Decider):
    """Takes the policy's place while profiling: the first ``rows`` draft ``drafts`` tokens each, and the times are noted."""

    def __init__(self) -> None:
        self.rows = self.drafts = 0
        self.began = 0.0
        self.draft_seconds = 0.0

    def rests(self) -> bool:
        return False

    def rested(self, now: float, tokens: int) -> None:
        """Never asked for."""

    def judged(self, drafts: Sequence[int], tokens: int) -> None:
        """Nothing is learned here."""

    def begin(
        self, now: float, sampled: Sequence[Sequence[int]], contexts: NDArray[np.integer], k: int, tokens: int | None = None
    ) -> Rows:
        self.began, self.draft_seconds = now, 0.0
        return np.arange(self.rows) if self.rows else NOBODY

    def lengths(self, confidences: NDArray[np.floating] | None) -> Rows:
        return np.full(self.rows, self.drafts, dtype=np.int64)

    def end(self, now: float, seconds: float, late: float = 0.0) -> None:
        self.draft_seconds = seconds


class Profiler:
    """Decodes made-up requests on a V1 runner."""

    def __init__(self, runner: Any, proposer: Any, agree: Callable[[Any], Any], warming: float = 0.0) -> None:
        """Args: agree: gives every rank rank 0's value. warming: most seconds to run sizes for the first time."""
        self.runner, self.proposer, self.agree, self.warming = runner, proposer, agree, warming
        self.width = min(proposer.num_speculative_tokens, proposer.width)
        self.blocks = runner.kv_cache_config.num_blocks - 1  # block 0 is nobody's
        self.groups = [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
        self.samples: list[StepTiming] = []
        self.names = 0

    def table(self, deadline: float) -> CostTable:
        """Measure shapes until all passes are done or rank 0's deadline has come, and fit them.

        Raises:
            ValueError: there was not even time for one step with drafts and one without.
        """
        self._warm_up()
        self._measure(self._shapes(), deadline)
        return profile.fit(self.samples, context_per_token=self._upkeep(), label=f"measured on {device()}")

    def beats(self, table: CostTable) -> bool:
        """Whether one request, with drafts or without, is served far faster than this table has it. Warms the engine up."""
        self._warm_up()
        self._measure([(1, drafts, SHORT) for drafts in (0, self.width)])
        model = CostModel(table, 1 + self.width, 1)
        return any(sample.target_seconds + sample.draft_seconds < FASTER * sum(model.step(sample)) for sample in self.samples)

    def _warm_up(self) -> None:
        """Run every size of step for the first time, few requests before many, as far as the time for it goes."""
        deadline = time.perf_counter() + self.warming
        self.warming = 0.0  # a second call has nothing left to do
        if self.proposer.device.type != "cpu":
            return
        with self._scripted() as script:
            script.drafts = self.width
            for requests in self._powers():
                sizes = [size for size in first_sizes(requests, self.width) if size[0] <= self.runner.max_num_tokens]
                for first in range(0, len(sizes), 1 + STEPS):  # there is room for no more steps of the same requests
                    with self._decoding(requests, SHORT) as step:
                        for tokens, drafting in sizes[first : first + 1 + STEPS]:
                            if self.agree(time.perf_counter() > deadline):
                                return
                            script.rows = drafting
                            step(spread(tokens - requests, requests))

    def _measure(self, shapes: Iterable[tuple[int, int, int]], deadline: float = math.inf) -> None:
        with self._scripted() as script:
            for requests, drafts, context in shapes:
                if self.agree(time.perf_counter() > deadline):
                    break
                self._shape(script, requests, drafts, context)

    @contextmanager
    def _scripted(self) -> Iterator[Script]:
        script = Script()
        usual, self.proposer.rounds = self.proposer.rounds, script
        try:
            yield script
        finally:
            self.proposer.rounds = usual

    def _powers(self) -> list[int]:
        """Numbers of requests: 1, 2, 4, … as far as they fit."""
        most = self.runner.scheduler_config.max_num_seqs
        return [1 << power for power in range(most.bit_length()) if self._fits(1 << power, SHORT)]

    def _shapes(self) -> Iterator[tuple[int, int, int]]:
        """(requests, drafts of each, context), the most telling first."""
        sizes = self._powers()
        long = min(LONG, self.runner.max_model_len - self._room())
        drafts = dict.fromkeys([0, self.width, max(self.width // 2, 1), 1])
        for once in range(PASSES):
            for requests in sizes:
                yield from ((requests, k, SHORT) for k in drafts if requests * (1 + k) <= self.runner.max_num_tokens)
                if requests <= 4 and long >= 4 * SHORT and self._fits(requests, long) and once < 2:
                    yield from ((requests, k, long) for k in (0, self.width))

    def _room(self) -> int:
        """Tokens a profiled request may grow by, and those its last block forward looks at."""
        return (STEPS + 3) * (self.width + 1) + self.proposer.queries

    def _needs(self, context: int) -> int:
        return sum(-(-(context + self._room()) // size) for size in self.groups)

    def _fits(self, requests: int, context: int) -> bool:
        return context + self._room() <= self.runner.max_model_len and requests * self._needs(context) <= self.blocks

    def _shape(self, script: Script, requests: int, drafts: int, context: int) -> None:
        script.rows, script.drafts = requests if drafts else 0, drafts
        with self._decoding(requests, context) as step:
            for number in range(1 + STEPS):
                began = time.perf_counter()
                step([drafts] * requests)
                if number:
                    self.samples.append(
                        StepTiming(
                            requests * (1 + drafts), requests, float(requests * context), script.began - began, None,
                            script.rows, float(requests * context), script.draft_seconds,
                        )
                    )  # fmt: skip

    @contextmanager
    def _decoding(self, requests: int, context: int) -> Iterator[Callable[[Sequence[int]], None]]:
        """So many requests, until the end of the block; what is yielded runs a step that verifies so many drafts of each."""
        names = [f"dspark-profile-{self.names + index}" for index in range(requests)]
        self.names += requests
        computed = dict.fromkeys(names, context)
        sampled = self._step(self._joining(names, context))

        def step(drafts: Sequence[int]) -> None:
            nonlocal sampled
            for name, tokens in sampled.items():
                computed[name] += len(tokens)
            sampled = self._step(self._going_on(computed, drafts))

        try:
            yield step
        finally:
            gone = SchedulerOutput.make_empty()
            gone.finished_req_ids = set(names)
            self.runner.execute_model(gone)

    def _step(self, scheduled: SchedulerOutput) -> dict[str, list[int]]:
        """One step of the runner; the tokens each request sampled."""
        self.runner.execute_model(scheduled)
        output = self.runner.sample_tokens(None)
        self.runner.take_draft_token_ids()
        return dict(zip(output.req_ids, output.sampled_token_ids, strict=True))

    def _joining(self, names: list[str], context: int) -> SchedulerOutput:
        scheduled = SchedulerOutput.make_empty()
        parameters = SamplingParams(temperature=0.0, max_tokens=self._room() * 8, ignore_eos=True)
        block = 1
        for name in names:
            blocks = []
            for size in self.groups:
                count = -(-(context + self._room()) // size)
                blocks.append(list(range(block, block + count)))
                block += count
            scheduled.scheduled_new_reqs.append(
                NewRequestData(name, [1] * (context + 1), [], parameters, None, tuple(blocks), context, None)
            )
        scheduled.num_scheduled_tokens = dict.fromkeys(names, 1)
        scheduled.total_num_scheduled_tokens = len(names)
        scheduled.num_spec_tokens_to_schedule = self.width
        return scheduled

    def _going_on(self, computed: dict[str, int], drafts: Sequence[int]) -> SchedulerOutput:
        scheduled = SchedulerOutput.make_empty()
        names = list(computed)
        outputs = [len(self.runner.requests[name].output_token_ids) for name in names]
        scheduled.scheduled_cached_reqs = CachedRequestData(
            names, set(), [], {}, [None] * len(names), list(computed.values()), outputs
        )
        wanted = dict(zip(names, drafts, strict=True))
        scheduled.num_scheduled_tokens = {name: 1 + count for name, count in wanted.items()}
        scheduled.total_num_scheduled_tokens = len(names) + sum(drafts)
        scheduled.scheduled_spec_decode_tokens = {name: [1] * count for name, count in wanted.items() if count}
        scheduled.num_spec_tokens_to_schedule = self.width
        return scheduled

    def _upkeep(self) -> float:
        """Seconds per token of writing context K/V late; the slots are of blocks that hold nothing yet."""
        count = min(UPKEEP_TOKENS, self.blocks * self.groups[0])
        slots = torch.arange(self.groups[0], self.groups[0] + count, device=self.proposer.device)
        states = torch.zeros(
            count, self.proposer.model.model.fc.input_size, dtype=self.proposer.dtype, device=self.proposer.device
        )
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self.proposer.write_context(states, torch.arange(count, device=self.proposer.device), slots)
            times.append(time.perf_counter() - began)
        return min(times) / count
