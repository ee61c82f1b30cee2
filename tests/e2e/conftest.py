"""Engines shared by the end-to-end tests: each starts once, when the first test asks for it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

TOKENS = 96
PROMPTS_PER_DOMAIN = 16
SPARE = 8  # tokens past the measured ones, so that a plain loop can finish its last round

# Blocks of 32, not the CPU's default of 128: prompts are shorter than that, and caching shares whole blocks only.
COMMON: dict[str, Any] = {
    "model": str(demo.TARGET),
    "max_model_len": 1024,
    "enforce_eager": True,
    "max_num_seqs": 32,
    "block_size": 32,
}


def speculative(model: Path | str, k: int = 7, **more: Any) -> dict[str, Any]:
    """Every draft is verified unless ``dspark=`` says otherwise, so that counts can be compared."""
    return {"method": "dspark", "model": str(model), "num_speculative_tokens": k, "dspark": {"policy": "fixed"}, **more}


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Sixteen held-out prompts of every domain."""
    return [text for domain in demo.DOMAINS for text in demo.prompts(domain)[:PROMPTS_PER_DOMAIN]]


@pytest.fixture(scope="session")
def plain() -> Iterator[EngineProcess]:
    """vLLM without speculation; its log-probabilities are raw logits, so that ties can be told."""
    with EngineProcess(**COMMON, logprobs_mode="raw_logits") as engine:
        yield engine


@pytest.fixture(scope="session")
def expected(plain: EngineProcess, prompts: list[str]) -> Run:
    """What vLLM generates without speculation, one request at a time, with the two best logits of every token."""
    return plain.generate(prompts, max_tokens=TOKENS + SPARE, concurrency=1, logprobs=5)


class Engines:
    """DSpark engines by their options; the last one stays up until another is asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._key: str | None = None
        self._engine: EngineProcess | None = None

    def get(self, **options: Any) -> EngineProcess:
        key = repr(sorted(options.items()))
        if key != self._key or self._engine is None:
            self.close()
            self._engine = self._stack.enter_context(EngineProcess(**options))
            self._key = key
        return self._engine

    def close(self) -> None:
        self._stack.close()
        self._key = self._engine = None


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    shelf = Engines()
    yield shelf
    shelf.close()
