"""Runs in an engine's process: acceptance and confidences set from outside, decoding timed, steps taken apart.

``install`` comes before vLLM builds anything; the other functions are for ``EngineProcess.call``. Requests start with their
context in place (vLLM's ``DecodeBenchConnector``), so only decoding is measured.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM = 4  # steps of every request before anything is measured
POLICY = ("get_num_tokens", "compact_batch", "reallocate_drafts", "record_confidences")


class Span:
    """Time spent in a function: the GPU's where there is one, events recorded in its graphs included; else the host's."""

    def __init__(self, device: torch.device, captured: bool = False) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            more = {"external": True} if captured else {}
            self._events = torch.cuda.Event(enable_timing=True, **more), torch.cuda.Event(enable_timing=True, **more)
        self._seconds, self._captured, self._called = 0.0, captured, captured

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            if self._events:
                self._events[0].record()
            try:
                return function(*args, **kwargs)
            finally:
                if self._events:
                    self._events[1].record()
                self._seconds += time.perf_counter() - began
                self._called = True

        return timed

    def take(self) -> float:
        """Milliseconds since this was last asked, of a GPU those of the last call; the device is idle.

        Nobody sees a graph run: ask for what is captured in one only after it ran.
        """
        seconds, called = self._seconds, self._called
        self._seconds, self._called = 0.0, self._captured
        if self._events is None or not called:
            return 1e3 * seconds
        try:
            return self._events[0].elapsed_time(self._events[1])
        except RuntimeError:  # the graph has not run yet
            return 0.0


def install() -> None:
    """Make vLLM's speculators claim the confidences they are told, and time their sequential stage."""
    from vllm_dspark.plugin import register

    register()
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.v1.worker.gpu import spec_decode

    _after(spec_decode, "init_speculator", lambda speculator, *_: _watch(speculator))
    _after(DummyModelLoader, "load_weights", lambda _, loader, model, *__: _fuse(model))


def _after(owner: Any, name: str, then: Callable[..., None]) -> None:
    """Call ``then`` with the result and the arguments of each call."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result, *args, *kwargs.values())
        return result

    setattr(owner, name, wrapper)


def install_interpreted() -> None:
    """The same where Triton's kernels are interpreted."""
    import interpreted

    interpreted.install()
    install()


def _fuse(model: Any) -> None:
    """What drafters make of their weights as they load them; later is too late where a CPU has packed the weights."""
    for module in model.modules():
        if hasattr(module, "_build_fused_kv_buffers"):
            module._build_fused_kv_buffers()


def _watch(speculator: Any) -> None:
    claimed = torch.ones_like(speculator.draft_token_confidence_probs[0])
    span = Span(speculator.device, captured=True)
    sample = span.wrap(speculator._sample_sequential)

    def sample_sequential(num_reqs: int, head_hidden: torch.Tensor) -> None:
        sample(num_reqs, head_hidden)
        speculator.draft_token_confidence_probs[:num_reqs] = claimed

    speculator._sample_sequential = sample_sequential
    speculator.serving = (claimed, span)


def _runner(engine: Any) -> Any:
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner


def capacity(engine: Any) -> int:
    """Tokens of context that fit the K/V cache."""
    config = engine.llm_engine.vllm_config.cache_config
    return int(config.num_gpu_blocks * config.block_size)


def accept(engine: Any, rates: list[float]) -> None:
    """From now on the first 1, 2, … drafts are accepted with these probabilities, and confidences say so."""
    runner = _runner(engine)
    if runner.speculator is None:
        return
    conditional = torch.tensor([rate / before for rate, before in zip(rates, [1.0, *rates], strict=False)])
    runner.rejection_sampler.synthetic_conditional_rates.copy_(conditional)
    runner.speculator.serving[0].copy_(conditional)


def decode(engine: Any, load: int, context: int, tokens: int) -> dict[str, float]:
    """Decode ``tokens`` per request on average, ``load`` requests at once: tokens, seconds, steps."""
    with _requests(engine, load, context) as step:
        _synchronize()
        began, done, steps = time.perf_counter(), 0, 0
        while done < load * tokens:
            done += step()
            steps += 1
        _synchronize()
        return {"tokens": done, "seconds": time.perf_counter() - began, "steps": steps}


def split(engine: Any, load: int, context: int, steps: int) -> dict[str, float]:
    """Median milliseconds of one step's parts, each step run by itself: no step overlaps the host's work for the next.

    ``target``: the target's forward, decisions included. ``draft``: block forward and sequential stage. ``sequential``: of
    that, the sequential stage. ``policy``: of all, host time of adaptive verification. ``rest``: verification, scheduling.
    """
    runner = _runner(engine)
    spans = {"target": (Span(runner.device), runner, ("execute_model",))}
    if runner.speculator is not None:
        spans["draft"] = (Span(runner.device), runner.speculator, ("propose",))
    if getattr(runner, "adaptive_verification", None) is not None:
        spans["policy"] = (Span(torch.device("cpu")), runner.adaptive_verification, POLICY)
    rows: list[dict[str, float]] = []
    with _requests(engine, load, context) as step, _wrapped(spans):
        for _ in range(steps):
            began = time.perf_counter()
            step()
            _synchronize()
            row = {"step": 1e3 * (time.perf_counter() - began)}
            row |= {name: span.take() for name, (span, _, _) in spans.items()}
            if row.get("draft"):
                row["sequential"] = min(runner.speculator.serving[1].take(), row["draft"])
            rows.append(row | {"rest": row["step"] - row["target"] - row.get("draft", 0.0)})
    return {
        name: statistics.median(row.get(name, 0.0) for row in rows)
        for name in ("step", "target", "draft", "sequential", "policy", "rest")
    }


@contextmanager
def _wrapped(spans: dict[str, tuple[Span, Any, tuple[str, ...]]]) -> Iterator[None]:
    for span, owner, names in spans.values():
        for name in names:
            setattr(owner, name, span.wrap(getattr(owner, name)))
    try:
        yield
    finally:
        for _, owner, names in spans.values():
            for name in names:
                setattr(owner, name, getattr(owner, name).__wrapped__)


@contextmanager
def _requests(engine: Any, load: int, context: int) -> Iterator[Callable[[], int]]:
    """A function that runs one step and returns the tokens it yielded; ``load`` requests decode the whole time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm_engine
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1 << 20, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    names = [f"{time.perf_counter()}-{index}" for index in range(load)]
    for name in names:
        core.add_request(name, {"prompt_token_ids": [7] * context}, sampling)
    steps = dict.fromkeys(names, 0)

    def step() -> int:
        yielded = 0
        for output in core.step():
            if output.finished:
                raise RuntimeError(f"a request ended after {context} tokens of context: max_model_len is too short")
            yielded += len(output.outputs[0].token_ids)
            steps[output.request_id] += 1
        return yielded

    try:
        while min(steps.values()) < WARM:
            step()
        yield step
    finally:
        core.abort_request(names)
        while core.has_unfinished_requests():
            core.step()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
