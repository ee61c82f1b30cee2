"""Sampled output has the target's own distribution: a chi-square test through vLLM's rejection sampler.

The target is a random model over 12 ids, so that every pair of tokens is frequent and the exact distribution can be
computed. The first token comes from the prefill; the second and third are drafted and verified.
"""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_drafter
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_dspark.engine.session import EngineProcess

pytestmark = pytest.mark.e2e
VOCABULARY, TRIALS, PROMPT = 12, 20_000, [3, 1, 4, 1, 5]
# Standard normal quantile beyond which a statistic is called wrong: one false alarm in 30,000 runs.
LIMIT = 4.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target and a random drafter: acceptance is partial, which is what makes mistakes visible."""
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, max_position_embeddings=512, eos_token_id=None,
        bos_token_id=None, pad_token_id=None, rope_theta=10000.0,
    )  # fmt: skip
    target = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(target.lm_head.weight, std=0.1)
    target.save_pretrained(root / "target")
    drafter = write_drafter(root / "drafter", head="rnn", vocab_size=VOCABULARY, seed=1)
    tensors = load_file(drafter / "model.safetensors")
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        tensors[name] *= 0.4  # or a random drafter is so sure of itself that nothing is ever accepted
    save_file(tensors, drafter / "model.safetensors")
    return root / "target", drafter


@pytest.fixture(scope="module")
def exact(pair: tuple[Path, Path]) -> torch.Tensor:
    """P(second, third token), ``[V, V]`` float64."""
    target = Qwen3ForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    firsts = torch.arange(VOCABULARY)
    seconds = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    prompt = torch.tensor(PROMPT)
    with torch.inference_mode():
        one = target(prompt.unsqueeze(0)).logits[0, -1]
        two = target(torch.cat((prompt.expand(VOCABULARY, -1), firsts.unsqueeze(1)), 1)).logits[:, -1]
        three = target(torch.cat((prompt.expand(len(seconds), -1), seconds), 1)).logits[:, -1]
    p1, p2, p3 = (logits.double().softmax(-1) for logits in (one, two, three))
    joint = p1[:, None, None] * p2[:, :, None] * p3.view(VOCABULARY, VOCABULARY, VOCABULARY)
    return joint.sum(0)


def statistic(tokens: list[list[int]], exact: torch.Tensor) -> float:
    """Chi-square of the observed pairs, as a standard normal variate (Wilson-Hilferty); rare cells are pooled."""
    observed = torch.zeros_like(exact)
    for ids in tokens:
        observed[ids[1], ids[2]] += 1
    wanted = exact * len(tokens)
    common = wanted >= 5
    o = torch.cat((observed[common], observed[~common].sum().view(1)))
    e = torch.cat((wanted[common], wanted[~common].sum().view(1)))
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    chi_square = float(((o - e) ** 2 / e).sum())
    return float(((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5)


def sample(pair: tuple[Path, Path], method: str, prepare: str | None = None) -> tuple[list[list[int]], float]:
    """TRIALS samples of four tokens, and the share of first drafts accepted. Every draft is verified unless mutated."""
    target, drafter = pair
    options = {"model": str(target), "skip_tokenizer_init": True, "max_model_len": 64, "enforce_eager": True,
               "max_num_seqs": 256, "dtype": "float32"}  # fmt: skip
    speculative = {"method": "dspark", "model": str(drafter), "num_speculative_tokens": 3, "draft_sample_method": method,
                   "dspark": {"policy": "fixed"}}  # fmt: skip
    with EngineProcess(**options, prepare=prepare, speculative_config=speculative) as engine:
        run = engine.generate(
            [PROMPT] * TRIALS, max_tokens=4, concurrency=256, temperature=1.0, detokenize=False, logprobs=None
        )
    return run.token_ids, run.accepted_at[0] / run.drafts


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_sampled_output_has_the_targets_distribution(pair: tuple[Path, Path], exact: torch.Tensor, method: str) -> None:
    tokens, accepted = sample(pair, method)
    assert 0.03 < accepted < 0.95
    assert statistic(tokens, exact) < LIMIT


def test_the_test_fails_when_q_is_off_by_one_position(pair: tuple[Path, Path], exact: torch.Tensor) -> None:
    tokens, _ = sample(pair, "probabilistic", prepare="mutations:shift_probabilities")
    assert statistic(tokens, exact) > 2 * LIMIT


def test_lengths_drawn_at_random_change_nothing(pair: tuple[Path, Path], exact: torch.Tensor) -> None:
    """Who drafts and how much of it is verified differs from round to round and request to request."""
    tokens, accepted = sample(pair, "probabilistic", prepare="mutations:erratic_policy")
    assert 0.03 < accepted < 0.95
    assert statistic(tokens, exact) < LIMIT


def test_stopping_early_is_lossless(pair: tuple[Path, Path], exact: torch.Tensor) -> None:
    """Where it differs from searching on in every second round, and the confidences tell what was drafted."""
    tokens, accepted = sample(pair, "probabilistic", prepare="mutations:stop_early")
    assert 0.03 < accepted < 0.95
    assert statistic(tokens, exact) < LIMIT


@pytest.mark.parametrize(
    "mutation", ["search_past_the_stop", pytest.param("decide_with_this_rounds_tokens", marks=pytest.mark.slow)]
)
def test_the_test_fails_when_lengths_depend_on_what_was_drafted(
    pair: tuple[Path, Path], exact: torch.Tensor, mutation: str
) -> None:
    tokens, _ = sample(pair, "probabilistic", prepare=f"mutations:{mutation}")
    assert statistic(tokens, exact) > 2 * LIMIT
