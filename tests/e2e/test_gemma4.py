"""The Gemma 4 draft family on the V1 runner, on random tiny weights: every head loads, drafts, and changes nothing."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_drafter
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from vllm_dspark.engine.session import EngineProcess, Run

from .conftest import speculative
from .ties import unexplained

pytestmark = pytest.mark.e2e
VOCABULARY = 128
PROMPTS = [[(7 * i + j * j) % (VOCABULARY - 2) for j in range(5 + 3 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, global_head_dim=32, num_global_key_value_heads=2, attention_k_eq_v=False,
        layer_types=["full_attention"] * 4, max_position_embeddings=512, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=False, use_double_wide_mlp=False,
        sliding_window=64, final_logit_softcapping=30.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma4") / "target"
    model = Gemma4ForCausalLM(config)
    # Fresh norms scale everything down to near-uniform logits; spread them, so that the output varies.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(folder)
    return folder


def generate(target: Path, **options: object) -> Run:
    common = {"model": str(target), "skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True,
              "dtype": "float32", "logprobs_mode": "raw_logits"}  # fmt: skip
    with EngineProcess(**common, **options) as engine:
        return engine.generate(PROMPTS, max_tokens=40, detokenize=False, logprobs=2)


@pytest.fixture(scope="module")
def plain(target: Path) -> Run:
    return generate(target)


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_gemma4_drafts_and_stays_identical(target: Path, plain: Run, tmp_path: Path, head: str) -> None:
    drafter = write_drafter(tmp_path / "drafter", head=head, family="gemma4", vocab_size=VOCABULARY, block_size=5)
    run = generate(target, speculative_config=speculative(drafter, k=5))
    problems, _ = unexplained(plain, run.token_ids, 40)
    assert not problems, problems
    assert run.drafts > 40
    assert run.drafted == pytest.approx(5 * run.drafts, rel=0.1)
