"""The policy on the real engine: it changes what is drafted, never what is generated, and it can be told off."""

from pathlib import Path

import pytest

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

from .conftest import COMMON, TOKENS, Engines, speculative
from .ties import unexplained

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these engines keep measured step times: nothing from earlier runs is in it."""
    return tmp_path_factory.mktemp("step-times")


def adaptive(cache: Path, **more: object) -> dict[str, object]:
    return speculative(demo.drafter("gated"), dspark={"cache_dir": str(cache), **more})


def some(expected: Run, requests: slice) -> Run:
    assert expected.top is not None
    return Run(expected.token_ids[requests], expected.texts[requests], 1.0, top=expected.top[requests])


def test_step_times_are_measured_once_and_greedy_output_is_identical(
    engines: Engines, expected: Run, prompts: list[str], cache: Path
) -> None:
    options = {**COMMON, "prepare": "mutations:quiet_machine", "speculative_config": adaptive(cache)}
    engine = engines.get(**options)
    for concurrency in (1, 16):
        run = engine.generate(prompts, max_tokens=TOKENS, concurrency=concurrency)
        problems, _ = unexplained(expected, run.token_ids, TOKENS)
        assert not problems, problems
        assert run.accepted > 0
    log = engine.log.read_text(errors="replace")
    assert "step times: measuring" in log
    assert log.index("huge pages") < log.index("step times: measuring"), "measured on the memory that is served from"
    (kept,) = cache.iterdir()
    kept.write_text("{}")
    engines.close()
    log = engines.get(**options).wait().log.read_text(errors="replace")
    assert log.count(f"ignoring {kept}") == 1
    assert "step times: measuring" in log
    engines.close()
    log = engines.get(**options).wait().log.read_text(errors="replace")
    assert f"step times: from {kept}" in log
    assert "step times: measuring" not in log


def test_a_request_has_its_own_policy(engines: Engines, expected: Run, prompts: list[str], cache: Path) -> None:
    engine = engines.get(**COMMON, speculative_config=adaptive(cache))
    texts = demo.prompts("records")[:8]
    first = prompts.index(texts[0])
    wanted = some(expected, slice(first, first + 8))

    def generate(**own: object) -> Run:
        run = engine.generate(texts, max_tokens=64, concurrency=4, extra_args=own)
        problems, _ = unexplained(wanted, run.token_ids, 64)
        assert not problems, problems
        return run

    everything = generate(dspark_policy="fixed")
    assert everything.drafts > 0
    assert 6 < everything.drafted / everything.drafts <= 7  # less where a request ends within the block
    for silent in (generate(dspark_policy="off"), generate(dspark_max_draft_tokens=0)):
        assert silent.drafts == silent.drafted == 0
    two = generate(dspark_policy="fixed", dspark_max_draft_tokens=2)
    assert len(two.accepted_at) == 7
    assert two.accepted_at[1] > 0 == sum(two.accepted_at[2:])
    assert generate(dspark_max_draft_tokens=3).drafted > 0
    for wrong, found in (({"dspark_policy": "often"}, "often"), ({"dspark_max_draft_tokens": -2}, "-2")):
        problem = engine.refused(texts[0], extra_args=wrong)
        assert problem.startswith("BadRequestOption: dspark option")
        assert found in problem
    assert generate(dspark_policy="off").drafted == 0


@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_greedy_output_is_identical_whoever_drafts_how_much(
    engines: Engines, expected: Run, prompts: list[str], concurrency: int
) -> None:
    engine = engines.get(**COMMON, prepare="mutations:erratic_policy", speculative_config=speculative(demo.drafter("rnn")))
    run = engine.generate(prompts, max_tokens=TOKENS, concurrency=concurrency)
    problems, _ = unexplained(expected, run.token_ids, TOKENS)
    assert not problems, problems
    assert 1 < run.drafted / run.drafts < 6  # lengths from 0 to 7
    assert len(run.accepted_at) == 7
    assert run.accepted_at[6] > 0


def test_drafting_resumes_undiminished_after_200_tokens_off(engines: Engines) -> None:
    """The drafter's context was kept up all the while: drafts are those it makes with a context written by prefill."""
    options = {**COMMON, "enable_prefix_caching": False, "speculative_config": speculative(demo.drafter("gated"))}
    engine = engines.get(**options, prepare="mutations:off_for_200_tokens")
    prompts = [text for domain in ("arithmetic", "records") for text in demo.prompts(domain)[:12]]
    late = engine.generate(prompts, max_tokens=296, concurrency=6)
    assert late.drafts > 100
    ids = engine.tokenize(prompts)
    starts = [prompt + output[:200] for prompt, output in zip(ids, late.token_ids, strict=True)]
    again = engines.get(**options).generate(starts, max_tokens=96, concurrency=6)
    same = [got == want[200:] for got, want in zip(again.token_ids, late.token_ids, strict=True)]
    assert sum(same) >= 0.8 * len(same)  # the others met a tie
    rates = [[count / run.drafts for count in run.accepted_at] for run in (late, again)]
    assert rates[0] == pytest.approx(rates[1], abs=0.04)


def test_blocks_shared_through_the_cache_are_complete_though_their_owner_never_drafted(engines: Engines, cache: Path) -> None:
    """The owners have ended, each with a full block and part of another, before any of their context is written."""
    engine = engines.get(**COMMON, enable_prefix_caching=True, speculative_config=adaptive(cache))
    texts = demo.prompts("records")[24:40]
    owners = engine.generate(texts, max_tokens=96, concurrency=4, extra_args={"dspark_policy": "off"})
    prompts = [prompt + output for prompt, output in zip(engine.tokenize(texts), owners.token_ids, strict=True)]
    shared = engine.generate(prompts, max_tokens=48, concurrency=4, extra_args={"dspark_policy": "fixed"})
    assert min(shared.cached) >= 128
    own = engines.get(**COMMON, enable_prefix_caching=False, speculative_config=speculative(demo.drafter("gated")))
    alone = own.generate(prompts, max_tokens=48, concurrency=4)
    assert shared.token_ids == alone.token_ids
    assert shared.accepted_at == pytest.approx(alone.accepted_at, abs=0.02 * alone.drafts)


def test_a_policy_that_breaks_is_off_with_one_warning(expected: Run, prompts: list[str], cache: Path) -> None:
    with EngineProcess(**COMMON, prepare="mutations:policy_that_raises", speculative_config=adaptive(cache)) as engine:
        run = engine.generate(prompts[:16], max_tokens=TOKENS, concurrency=8)
        problems, _ = unexplained(some(expected, slice(16)), run.token_ids, TOKENS)
        assert not problems, problems
        silent = engine.generate(prompts[16:20], max_tokens=32)
        assert silent.drafted == 0
        assert engine.log.read_text(errors="replace").count("ZeroDivisionError: planted") == 1
