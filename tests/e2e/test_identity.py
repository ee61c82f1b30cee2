"""Greedy output with DSpark is vLLM's own, whatever the head, the load and the cache."""

import pytest

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

from .conftest import COMMON, TOKENS, Engines, speculative
from .ties import unexplained

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("head", "caching"),
    [
        ("vanilla", True),
        ("gated", False),
        ("rnn", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("vanilla", False), ("gated", True), ("rnn", False))),
    ],
)
def test_greedy_output_is_identical(engines: Engines, expected: Run, prompts: list[str], head: str, caching: bool) -> None:
    engine = engines.get(**COMMON, enable_prefix_caching=caching, speculative_config=speculative(demo.drafter(head)))
    for concurrency in (1, 16):
        run = engine.generate(prompts, max_tokens=TOKENS, concurrency=concurrency)
        problems, ties = unexplained(expected, run.token_ids, TOKENS)
        print(f"{head}, caching {caching}, c = {concurrency}: {ties} of {len(prompts)} requests left at a tie")
        assert not problems, problems
        assert run.drafts > 0
        assert run.accepted > run.drafts  # an idle or broken drafter would pass the comparison above


def test_a_repeated_prompt_drafts_as_well_from_cached_blocks(engines: Engines) -> None:
    """Blocks shared through prefix caching hold the drafter's context too."""
    engine = engines.get(**COMMON, enable_prefix_caching=True, speculative_config=speculative(demo.drafter("vanilla")))
    texts = demo.prompts("records")[20:36]
    first = engine.generate(texts, max_tokens=64, concurrency=1)
    again = engine.generate(texts, max_tokens=64, concurrency=1)
    assert again.token_ids == first.token_ids
    assert again.accepted_at == pytest.approx(first.accepted_at, abs=0.02 * first.drafts)


def test_cached_blocks_are_used_as_without_speculation(engines: Engines, plain: EngineProcess) -> None:
    """All of them; and where that leaves one token of the prompt, no drafts are made up around it."""
    engine = engines.get(**COMMON, enable_prefix_caching=True, speculative_config=speculative(demo.drafter("vanilla")))
    text = " ".join(demo.prompts("records")[36:40])
    ids = [plain.tokenize([text])[0][:length] for length in (64, 65, 70)]
    assert len(ids[-1]) == 70
    for prompt, whole in zip(ids, (32, 64, 64), strict=True):
        runs = [[each.generate([prompt], max_tokens=32) for each in (plain, engine)] for _ in range(2)]
        assert [run.cached for run in runs[1]] == [(whole,), (whole,)]
        assert runs[1][1].token_ids == runs[0][1].token_ids
        assert runs[1][1].drafts == runs[0][1].drafts
        assert runs[1][1].drafted == runs[0][1].drafted


def test_in_float32_nothing_leaves(engines: Engines, prompts: list[str]) -> None:
    """Where rounding does not tie logits there is no excuse: every token of every request is the same."""
    options = {**COMMON, "dtype": "float32"}
    want = engines.get(**options).generate(prompts, max_tokens=TOKENS, concurrency=1)
    engine = engines.get(**options, speculative_config=speculative(demo.drafter("rnn")))
    for concurrency in (1, 16):
        assert engine.generate(prompts, max_tokens=TOKENS, concurrency=concurrency).token_ids == want.token_ids


def test_ties_break_without_speculation_too(plain: EngineProcess, expected: Run, prompts: list[str]) -> None:
    """vLLM alone leaves its own output at ties when the batch changes: what the tests above allow is not DSpark's doing."""
    alone = plain.generate(prompts, max_tokens=TOKENS, concurrency=16)
    problems, ties = unexplained(expected, alone.token_ids, TOKENS)
    assert alone.drafts == 0
    assert not problems, problems
    print(f"without speculation, c = 16: {ties} of {len(prompts)} requests left at a tie")
