"""The engine accepts as many drafts, position by position, as a plain loop over the reference: every head, both layouts."""

import json
from pathlib import Path

import pytest
import torch
from reference_loop import Acceptance, ReferenceLoop
from safetensors.torch import load_file, save_file

from vllm_dspark import demo
from vllm_dspark.engine.session import Run

from .conftest import COMMON, TOKENS, Engines, speculative

pytestmark = pytest.mark.e2e
TOLERANCE = 0.02


def plain_loop(loop: ReferenceLoop, prompts: list[str], expected: Run) -> Acceptance:
    total = Acceptance(loop.slots)
    for prompt, continuation in zip(prompts, expected.token_ids, strict=True):
        loop.run(prompt, continuation, TOKENS, total)
    return total


def assert_same_rates(run: Run, total: Acceptance) -> None:
    assert total.rounds > 200
    rates = [count / run.drafts for count in run.accepted_at]
    print("engine", [f"{rate:.3f}" for rate in rates], "plain loop", [f"{rate:.3f}" for rate in total.rates()])
    assert rates == pytest.approx(total.rates(), abs=TOLERANCE)


@pytest.mark.parametrize("head", demo.HEADS)
def test_per_position_acceptance_is_the_plain_loops(engines: Engines, expected: Run, prompts: list[str], head: str) -> None:
    engine = engines.get(**COMMON, enable_prefix_caching=True, speculative_config=speculative(demo.drafter(head)))
    run = engine.generate(prompts, max_tokens=TOKENS, concurrency=16)
    assert_same_rates(run, plain_loop(ReferenceLoop(demo.TARGET, demo.drafter(head)), prompts, expected))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_fewer_drafts_are_the_first_of_the_trained_block(engines: Engines, expected: Run, prompts: list[str], k: int) -> None:
    """The whole block is drafted whatever k is; a block cut short before the forward would be accepted less often."""
    some, wanted = prompts[::4], Run(expected.token_ids[::4], expected.texts[::4], 1.0)
    engine = engines.get(**COMMON, speculative_config=speculative(demo.drafter("vanilla"), k=k))
    run = engine.generate(some, max_tokens=TOKENS, concurrency=8)
    assert len(run.accepted_at) == k
    assert_same_rates(run, plain_loop(ReferenceLoop(demo.TARGET, demo.drafter("vanilla"), k=k), some, wanted))


def as_speculators(folder: Path, head: str, sample_from_anchor: bool, kept: torch.Tensor | None) -> Path:
    """The bundled drafter rewritten in the speculators layout, on ``kept`` ids if given."""
    source = demo.drafter(head)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    ours = ("block_size", "mask_token_id", "markov_rank", "markov_head_type", "enable_confidence_head",
            "confidence_head_with_markov")  # fmt: skip
    skip = {*ours, "architectures", "target_layer_ids", "num_target_layers"}
    drafts = config["block_size"] - (0 if sample_from_anchor else 1)
    vocabulary = config["vocab_size"] if kept is None else len(kept)
    if kept is not None:
        tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][kept].contiguous()
        tensors["lm_head.weight"] = load_file(demo.TARGET / "model.safetensors")["model.embed_tokens.weight"][kept].contiguous()
        tensors["d2t"] = kept - torch.arange(len(kept))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    written = {
        **{name: config[name] for name in ours},
        "architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark",
        "speculators_config": {
            "algorithm": "dspark", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafts}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "target"},
        },
        "transformer_layer_config": {name: value for name, value in config.items() if name not in skip},
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config["target_layer_ids"]],
        "draft_vocab_size": vocabulary, "sample_from_anchor": sample_from_anchor, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_the_speculators_layout_drafts_the_same(engines: Engines, expected: Run, prompts: list[str], tmp_path: Path) -> None:
    folder = as_speculators(tmp_path / "drafter", "vanilla", sample_from_anchor=True, kept=None)
    run = engines.get(**COMMON, speculative_config=speculative(folder)).generate(prompts, max_tokens=TOKENS, concurrency=16)
    assert_same_rates(run, plain_loop(ReferenceLoop(demo.TARGET, demo.drafter("vanilla")), prompts, expected))


def test_fill_in_slots_and_a_reduced_vocabulary(engines: Engines, expected: Run, prompts: list[str], tmp_path: Path) -> None:
    """Slot 0 predicts nothing and only 700 of the ids can be drafted: d2t maps them back."""
    kept = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:700].sort().values
    folder = as_speculators(tmp_path / "drafter", "gated", sample_from_anchor=False, kept=kept)
    engine = engines.get(**COMMON, speculative_config=speculative(folder, k=6))
    run = engine.generate(prompts, max_tokens=TOKENS, concurrency=16)
    loop = ReferenceLoop(demo.TARGET, demo.drafter("gated"), sample_from_anchor=False, kept=kept)
    assert_same_rates(run, plain_loop(loop, prompts, expected))
    drafted = set(kept.tolist())
    assert any(token not in drafted for ids in run.token_ids for token in ids)  # output is not limited to them
