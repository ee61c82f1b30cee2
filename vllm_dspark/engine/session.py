"""A vLLM engine in a process of its own, driven from another: how the demo, the benchmarks and the tests compare arms.

Arms in one process would share caches and patches; arms one after the other would meet different machine noise. Each
gets a process, all stay up, and whoever compares them alternates: run by run, or within a run (:func:`side_by_side`).
"""

import contextlib
import importlib
import math
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class EngineFailed(RuntimeError):
    """The engine process reported an error or ended; the message holds the end of its log."""


@dataclass(frozen=True)
class Run:
    """One measured batch of requests.

    Attributes:
        token_ids: generated ids per request. texts: the same, decoded. seconds: wall time of the whole batch.
        drafts: rounds that verified at least one draft. drafted, accepted: draft tokens.
        accepted_at: accepted drafts by position in the block.
        cached: tokens of each prompt that were in the prefix cache.
        top: per request and token, the best ids with their logits or log-probabilities, if ``logprobs`` was asked for.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    top: list[list[dict[int, float]]] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def accepted_length(self) -> float:
        """Tokens a drafting round yields, the bonus token included; 1.0 where nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0


class EngineProcess:
    """``with EngineProcess(model=...) as engine: engine.generate([...])``; the options are those of ``vllm.LLM``.

    ``environment`` is added to the child's; ``prepare`` is "module:function", called there before vLLM is imported.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, prepare: str | None = None, **options: Any) -> None:
        self.log = Path(tempfile.mkstemp(prefix="vllm-dspark-", suffix=".log")[1])
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self.log), dict(environment or {}), prepare, options))
        self._process.start()
        theirs.close()
        self._ready = False

    def wait(self) -> Self:
        """Block until the engine is up; starting several and then waiting overlaps their start-up."""
        if not self._ready:
            self._answer()
            self._ready = True
        return self

    def generate(self, prompts: Sequence[str | list[int]], *arguments: Any, **sampling: Any) -> Run:
        """The finished run of what :meth:`begin` prepares; the arguments are the same."""
        self.begin(prompts, *arguments, **sampling)
        run = self.go_on(math.inf)
        assert isinstance(run, Run)
        return run

    def begin(
        self,
        prompts: Sequence[str | list[int]],
        max_tokens: int = 96,
        concurrency: int | None = None,
        sustained: bool = False,
        **sampling: Any,
    ) -> None:
        """Prepare to generate for all prompts (texts or ids) with at most ``concurrency`` in flight (default: all).

        Greedy unless ``sampling``, which is ``vllm.SamplingParams``', says otherwise. ``max_tokens`` may be changed per
        prompt by a list ``lengths``. ``sustained``: stop as soon as fewer are in flight, and abort those; the run holds what
        was generated until then, of the requests that had begun.
        """
        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        self._ask("begin", list(prompts), concurrency or len(prompts), sampling, sustained)

    def go_on(self, seconds: float) -> "Run | int":
        """Go on for about so long, to the end of a step: the finished run, or how many tokens there are so far.

        In between the process waits, and its ``time.perf_counter`` stands still: nobody takes the pause for a slow step.
        """
        done: Run | int = self._ask("go on", seconds)
        return done

    def refused(self, prompt: str, **sampling: Any) -> str:
        """The error that a request with these parameters meets, as "Type: message"; empty if it is taken."""
        problem: str = self._ask("refused", prompt, sampling)
        return problem

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of these texts."""
        ids: list[list[int]] = self._ask("tokenize", list(prompts))
        return ids

    def explain(self) -> dict[str, Any]:
        """The numbers of the policy's last decision; only where the engine core runs in the engine's own process."""
        numbers: dict[str, Any] = self._ask("explain")
        return numbers

    def call(self, function: str, *arguments: Any) -> Any:
        """What ``function``, a "module:function" given the ``vllm.LLM`` and these arguments, returns over there."""
        return self._ask("call", function, *arguments)

    def _ask(self, what: str, *arguments: Any) -> Any:
        self.wait()
        self._pipe.send((what, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            kind, value = "error", f"the engine process ended with code {self._process.exitcode}"
        if kind == "error":
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise EngineFailed(f"{value}\n--- end of the engine's log ---\n{tail}")
        return value

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(20)
        self._process.kill()  # does nothing if it has ended
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, if that is still there
        self._process.join()
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def side_by_side(engines: Sequence[EngineProcess], seconds: float = 0.1) -> list[Run]:
    """The runs that these engines have begun, in slices of about ``seconds``: whoever has fewest tokens goes on.

    So they generate the same tokens at nearly the same time, and a machine that slows down for a while slows down all of them.
    Each engine's core must run in the engine's own process, as it does unless the environment says otherwise.
    """
    runs: dict[EngineProcess, Run] = {}
    tokens: dict[EngineProcess, int] = dict.fromkeys(engines, 0)
    while tokens:
        behind = min(tokens, key=tokens.__getitem__)
        done = behind.go_on(seconds)
        if isinstance(done, Run):
            runs[behind] = done
            del tokens[behind]
        else:
            tokens[behind] = done
    return [runs[engine] for engine in engines]


def _serve(pipe: Connection, log: str, environment: dict[str, str], prepare: str | None, options: dict[str, Any]) -> None:
    """Child process: build the engine, then answer one batch after the other until None arrives."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.update(environment)
    try:
        if prepare is not None:
            _find(prepare)()
        from vllm import LLM

        engine = LLM(**{"disable_log_stats": False, "seed": 0, **options})
        pipe.send(("ready", None))
        runs = _Runs()
        answers: dict[str, Callable[..., Any]] = {
            "begin": runs.begin, "go on": runs.go_on, "refused": _refused, "tokenize": _tokenize, "explain": _explain,
            "call": _call,
        }  # fmt: skip
        while (question := pipe.recv()) is not None:
            what, arguments = question
            pipe.send((what, answers[what](engine, *arguments)))
        engine.llm_engine.engine_core.shutdown()  # or this process waits for its own for ever
    except EOFError:
        return  # whoever drove this engine is gone
    except Exception:
        pipe.send(("error", traceback.format_exc()))


class _Runs:
    """The run that a process is at, and its clock."""

    def __init__(self) -> None:
        self._run: Generator[int, float, Run] | None = None
        self._clock = time.perf_counter
        self._paused, self._since = 0.0, self._clock()
        time.perf_counter = lambda: self._clock() - self._paused

    def begin(self, engine: Any, *arguments: Any) -> None:
        self._run = _run(engine, *arguments)
        next(self._run)
        self._since = self._clock()

    def go_on(self, engine: Any, seconds: float) -> Run | int:
        assert self._run is not None
        self._paused += self._clock() - self._since
        try:
            return self._run.send(seconds)
        except StopIteration as done:
            run: Run = done.value
            return run
        finally:
            self._since = self._clock()


def _run(
    engine: Any, prompts: list[Any], concurrency: int, sampling: dict[str, Any], sustained: bool = False
) -> Generator[int, float, Run]:
    """Takes the seconds it may go on for, yields the tokens so far, returns the run."""
    from vllm import SamplingParams

    core = engine.llm_engine
    lengths = sampling.pop("lengths", None) or [sampling["max_tokens"]] * len(prompts)
    before = _counters(engine)
    waiting = list(enumerate(prompts))[::-1]
    outputs: dict[str, Any] = {}
    cached: dict[str, int] = {}
    pause = yield 0
    began = time.perf_counter()
    pause += began
    names = [f"{began}-{index}" for index in range(len(prompts))]
    going = set(names)
    while waiting or core.has_unfinished_requests():
        while waiting and core.get_num_unfinished_requests() < concurrency:
            index, prompt = waiting.pop()
            given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            parameters = SamplingParams(**{**sampling, "max_tokens": lengths[index]})
            core.add_request(names[index], given, parameters)
        if sustained and core.get_num_unfinished_requests() < concurrency:
            break
        for output in core.step():
            outputs[output.request_id] = output.outputs[0]
            cached[output.request_id] = output.num_cached_tokens or 0
            if output.finished:
                going.discard(output.request_id)
        if time.perf_counter() >= pause:
            seconds = yield sum(len(output.token_ids) for output in outputs.values())
            pause = time.perf_counter() + seconds
    seconds = time.perf_counter() - began
    core.abort_request(list(going))
    seen = [name for name in names if name in outputs]
    ordered = [outputs[name] for name in seen]
    change = _difference(before, _counters(engine))
    return Run(
        [list(output.token_ids) for output in ordered],
        [output.text for output in ordered],
        seconds,
        drafts=change.get("num_drafts", (0,))[0],
        drafted=change.get("num_draft_tokens", (0,))[0],
        accepted=change.get("num_accepted_tokens", (0,))[0],
        accepted_at=change.get("num_accepted_tokens_per_pos", ()),
        cached=tuple(cached[name] for name in seen),
        top=[_top(output) for output in ordered] if sampling.get("logprobs") else None,
    )


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _call(engine: Any, function: str, *arguments: Any) -> Any:
    return _find(function)(engine, *arguments)


def _refused(engine: Any, prompt: str, sampling: dict[str, Any]) -> str:
    from vllm import SamplingParams

    try:
        engine.llm_engine.add_request("refused", prompt, SamplingParams(max_tokens=1, **sampling))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    engine.llm_engine.abort_request(["refused"])
    return ""


def _tokenize(engine: Any, prompts: list[str]) -> list[list[int]]:
    tokenizer = engine.get_tokenizer()
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def _explain(engine: Any) -> dict[str, Any]:
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    drafter = getattr(runner, "drafter", None) or runner.speculator
    explained: dict[str, Any] = drafter.rounds.policy.explain()
    return explained


def _top(output: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in at.items()} for at in output.logprobs]


def _difference(before: dict[str, tuple[float, ...]], after: dict[str, tuple[float, ...]]) -> dict[str, tuple[int, ...]]:
    change = {}
    for name, values in after.items():
        earlier = before.get(name, (0,) * len(values))
        change[name] = tuple(int(b - a) for a, b in zip(earlier, values, strict=True))
    return change


def _counters(engine: Any) -> dict[str, tuple[float, ...]]:
    """vLLM's speculative-decoding counters by short name."""
    prefix = "vllm:spec_decode_"
    found = {}
    for metric in engine.get_metrics():
        if metric.name.startswith(prefix):
            values = getattr(metric, "values", None)
            found[metric.name.removeprefix(prefix)] = tuple(values) if values is not None else (metric.value,)
    return found
