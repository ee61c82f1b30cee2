"""The proposer under what a server does to it: chunks, preemption, joining and leaving, full contexts, compilation."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess, Run

from .conftest import COMMON, TOKENS, Engines, speculative
from .ties import unexplained

pytestmark = pytest.mark.e2e


def test_chunks_preemption_and_a_full_context(engines: Engines, plain: EngineProcess, prompts: list[str]) -> None:
    """Prompts in chunks of 48 tokens, a cache too small for the batch, and output up to the model's last position."""
    tight = {
        **COMMON, "max_model_len": 160, "max_num_seqs": 12, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 9,
        "block_size": 32, "enable_chunked_prefill": True,
    }  # fmt: skip
    texts = prompts[::4]
    engine = engines.get(**tight, speculative_config=speculative(demo.drafter("rnn")))
    run = engine.generate(texts, max_tokens=1000)
    reference = plain.generate(texts, max_tokens=160, concurrency=1, logprobs=5)
    for request, ids in enumerate(run.token_ids):
        assert 30 < len(ids) < 160, f"request {request} should fill the context, not stop after {len(ids)} tokens"
        reference.token_ids[request] = reference.token_ids[request][: len(ids)]
    problems, _ = unexplained(reference, run.token_ids, 160)
    assert not problems, problems
    assert run.accepted > 0
    assert "preempt" in engine.log.read_text().lower() or run.drafts > 0


def test_requests_join_and_leave(engines: Engines, expected: Run, prompts: list[str]) -> None:
    engine = engines.get(**COMMON, enable_prefix_caching=False, speculative_config=speculative(demo.drafter("gated")))
    lengths = [5 + (7 * i) % (TOKENS - 5) for i in range(len(prompts))]
    run = engine.generate(prompts, concurrency=16, lengths=lengths)
    for request, (ids, length) in enumerate(zip(run.token_ids, lengths, strict=True)):
        one = Run([expected.token_ids[request]], [""], 1.0, top=[expected.top[request]])
        problems, _ = unexplained(one, [ids], length)
        assert not problems, problems


def test_as_a_user_gets_it(engines: Engines, expected: Run, prompts: list[str]) -> None:
    """Compiled, the engine core and the worker in processes of their own, which the options reach."""
    options = {**COMMON, "enforce_eager": False, "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}}
    chosen = {"policy": "fixed", "sample_from_anchor": True}
    engine = engines.get(**options, speculative_config=speculative(demo.drafter("vanilla"), dspark=chosen))
    run = engine.generate(prompts, max_tokens=TOKENS, concurrency=4)
    agree = sum(got == want[:TOKENS] for got, want in zip(run.token_ids, expected.token_ids, strict=True))
    # Compiled kernels round differently from eager ones, so ties fall elsewhere; most requests have none.
    assert agree >= 0.6 * len(prompts)
    assert run.accepted > run.drafts
    assert f"options {chosen}" in engine.log.read_text(errors="replace")


def test_a_drafter_that_is_not_finite_drafts_nothing(
    engines: Engines, expected: Run, prompts: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo.drafter("vanilla"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    engine = engines.get(**COMMON, speculative_config=speculative(broken))
    run = engine.generate(prompts[:8], max_tokens=TOKENS, concurrency=4)
    some = Run(expected.token_ids[:8], expected.texts[:8], 1.0, top=expected.top[:8])
    problems, _ = unexplained(some, run.token_ids, TOKENS)
    assert not problems, problems
    assert run.drafted == 0
    assert engine.log.read_text(errors="replace").count("logits are not finite") == 1


def test_a_wrong_pair_is_refused_before_weights_load(tmp_path: Path) -> None:
    options = {**COMMON, "speculative_config": speculative(demo.drafter("vanilla"), k=9)}
    with EngineProcess(**options) as engine, pytest.raises(RuntimeError) as caught:
        engine.wait()
    assert "num_speculative_tokens" in str(caught.value)
    assert "9" in str(caught.value)
    assert "7" in str(caught.value)
    assert "Loading safetensors" not in str(caught.value)
