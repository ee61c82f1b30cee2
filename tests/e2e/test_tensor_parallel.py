"""Two tensor-parallel ranks on a CPU, on either runner: they draft as one, and the output is that of one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreted
import pytest

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

from .conftest import COMMON, speculative
from .ties import unexplained

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
TOKENS = 48
# float32, so that sums split in two rarely round to another token.
OPTIONS = {**COMMON, "dtype": "float32"}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "worker_extension_cls": "e2e.ranks.Ranks"}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
Rounds = list[list[list[int]]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for domain in demo.DOMAINS for text in demo.prompts(domain)[:2]]


@pytest.fixture(scope="module")
def alone(texts: list[str]) -> Run:
    """One rank, no speculation."""
    with EngineProcess(**OPTIONS, logprobs_mode="raw_logits") as engine:
        return engine.generate(texts, max_tokens=TOKENS, concurrency=1, logprobs=5)


@pytest.fixture
def together(texts: list[str]) -> Callable[..., tuple[list[Run], list[Rounds], str]]:
    """Output of two ranks for each of some requests' own options, the drafts of each rank, and their log."""

    def run(prepare: str | None, *own: dict[str, Any] | None, **dspark: Any) -> tuple[list[Run], list[Rounds], str]:
        drafter = speculative(demo.drafter("gated"), dspark=dspark)
        with EngineProcess(ENVIRONMENT, prepare, **OPTIONS, **TWO, speculative_config=drafter) as engine:
            engine.call("e2e.ranks:watch")
            runs = [engine.generate(texts, max_tokens=TOKENS, extra_args=each) for each in own]
            return runs, engine.call("e2e.ranks:drafts"), engine.log.read_text(errors="replace")

    return run


def same_output(alone: Run, found: Run) -> None:
    problems, ties = unexplained(alone, found.token_ids, TOKENS)
    assert not problems, problems
    assert ties <= 1


def test_ranks_draft_for_the_same_requests(together: Any, alone: Run, tmp_path: Path) -> None:
    """Also where the clock decides: rank 0's. The others need not know how many drafts are verified."""
    fixed = {"dspark_policy": "fixed"}
    (adaptive, always), (first, second), log = together(None, None, fixed, cache_dir=str(tmp_path))
    for found in (adaptive, always):
        same_output(alone, found)
    assert always.accepted > always.drafts > 0
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        for verified, drafted in zip(ours, theirs, strict=True):
            assert drafted[: len(verified)] == verified
    drafting = {bool(drafts) for each in second for drafts in each}
    assert drafting == {False, True}, "the policy never chose not to draft"
    _same_profile(log)
    assert len(list(tmp_path.iterdir())) == 1


def _same_profile(log: str) -> None:
    measured = [line.split("step times: ")[1].split(" sizes in ")[0] for line in log.splitlines() if " sizes in " in line]
    assert len(measured) == 2, "step times were not measured on both ranks"
    assert measured[0] == measured[1]


def test_the_v2_runner_interpreted(together: Any, alone: Run) -> None:
    (found,), (first, second), _ = together(interpreted.PREPARE, None, policy="fixed")
    same_output(alone, found)
    assert found.accepted > found.drafts > 0
    assert first == second
    assert all(first)
