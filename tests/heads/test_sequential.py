"""The batched sequential stage is the reference: same tokens, same q, same confidences, given the same noise.

In float32 and float64 the reference runs freely beside it. In bfloat16 a rounded tie may send two correct
implementations down different paths, so the reference is led along the drafted tokens, in float64 on the same
values, and every step is held to the rounding that bfloat16 allows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequential_cases import TEMPERATURES, Case
from torch import Tensor

from vllm_dspark.heads import sequential
from vllm_dspark.heads.modules import HEAD_KINDS, MarkovHead

BF16_STEPS = 4  # roundings on the way from h and U to a corrected logit: projection, code, bias, sum
UNIT_ROUNDOFF = 2**-8  # of bfloat16
KINDS = ("vanilla", "gated", "rnn")


def assert_same(case: Case, drafts: sequential.Drafts) -> None:
    """Float32 or float64: everything equals the reference's."""
    block = case.specified()
    assert drafts.tokens.tolist() == block.tokens.tolist()
    assert_drawn_from_q(case, drafts)
    if drafts.probabilities is not None:
        q, expected = drafts.probabilities[case.sampled], block.probabilities[case.sampled]
        torch.testing.assert_close(q.double(), expected, rtol=2e-5, atol=1e-6)
    if drafts.confidences is None:
        assert case.confidence_head is None
    else:
        torch.testing.assert_close(drafts.confidences.double(), block.confidences, rtol=1e-5, atol=1e-6)


def assert_near(case: Case, drafts: sequential.Drafts) -> None:
    """bfloat16: every step is what float64 makes of the same prefix, up to ``BF16_STEPS`` roundings of the logits."""
    temperature = torch.where(case.sampled, case.temperature, 1.0).double()
    led = torch.ones_like(case.noise, dtype=torch.float64)
    led.scatter_(-1, case.draft_ids(drafts.tokens).unsqueeze(-1), 1e-60)
    block = case.specified(temperature, led)
    assert block.tokens.tolist() == drafts.tokens.tolist(), "the reference could not be led"
    assert_drawn_from_q(case, drafts)
    scores = block.probabilities.log() * temperature[:, None, None]  # corrected logits, up to a constant a slot
    bias = scores - case.logits.double()
    largest = case.logits.double().abs().max() + (bias.amax(-1) - bias.amin(-1)).max()
    slack = 2 * BF16_STEPS * UNIT_ROUNDOFF * largest  # of a difference of two logits
    greedy = ~case.sampled
    chosen = scores.gather(-1, case.draft_ids(drafts.tokens).unsqueeze(-1)).squeeze(-1)
    assert bool(((scores.amax(-1) - chosen)[greedy] <= slack).all())
    if drafts.probabilities is not None:
        off = (drafts.probabilities.double().log() * temperature[:, None, None] - scores).abs()
        likely = (block.probabilities > 1e-3) & case.sampled[:, None, None]
        assert bool((off[likely] <= slack).all())
    if drafts.confidences is not None:
        torch.testing.assert_close(drafts.confidences.double(), block.confidences, rtol=1e-5, atol=1e-6)


def assert_drawn_from_q(case: Case, drafts: sequential.Drafts) -> None:
    """The tokens are those that the returned q and the noise decide, to the bit."""
    if drafts.probabilities is None:
        return
    raced = (drafts.probabilities / case.noise).argmax(-1)
    assert torch.equal(case.draft_ids(drafts.tokens)[case.sampled], raced[case.sampled])


def check_for(dtype: torch.dtype) -> Callable[[Case, sequential.Drafts], None]:
    return assert_near if dtype is torch.bfloat16 else assert_same


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@DTYPES
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_it_is_the_reference_with_temperatures_mixed(kind, dtype, reduced, batch):
    # A batch of one would be greedy with the first of the temperatures, so it takes the second.
    case = Case(kind, dtype, batch, reduced=reduced, temperatures=TEMPERATURES if batch > 1 else TEMPERATURES[1:])
    check_for(dtype)(case, case.draft())


@pytest.mark.parametrize("confidence", ["hidden", "markov", "absent"])
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_reference_with_any_confidence_head(kind, dtype, confidence):
    case = Case(kind, dtype, confidence=confidence)
    check_for(dtype)(case, case.draft())


@pytest.mark.parametrize("batch", [1, 2, 7])
@DTYPES
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_it_is_the_reference_when_all_are_greedy(kind, dtype, batch):
    case = Case(kind, dtype, batch, reduced=True, temperatures=(0.0,))
    drafts = case.draft(temperature=None, noise=None)
    assert drafts.probabilities is None
    check_for(dtype)(case, drafts)
    assert torch.equal(drafts.tokens, case.draft().tokens), "temperature None and temperature 0 differ"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_is_the_reference_in_any_shape(data):
    sizes = {
        name: data.draw(st.integers(low, high), label=name)
        for name, (low, high) in {
            "batch": (1, 7), "slots": (1, 8), "hidden_size": (1, 9), "rank": (1, 6), "vocab": (2, 40), "seed": (0, 10**6),
        }.items()
    }  # fmt: skip
    case = Case(
        data.draw(st.sampled_from(HEAD_KINDS)),
        data.draw(st.sampled_from([torch.float32, torch.float64])),
        reduced=data.draw(st.booleans()),
        temperatures=tuple(data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0, 2.0]), min_size=1, max_size=7))),
        **sizes,
    )
    assert_same(case, case.draft())


# -- would the comparison notice? --


@pytest.mark.parametrize("mistake", ["another anchor", "hidden states of the next slot", "rows of W1 shifted"])
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_input_is_noticed(kind, dtype, mistake):
    case = Case(kind, dtype)
    if mistake == "another anchor":
        drafts = case.draft(anchors=(case.anchors + 1) % case.vocab)
    elif mistake == "hidden states of the next slot":
        drafts = case.draft(hidden=case.hidden.roll(-1, dims=1))
    else:
        weight = case.markov.markov_w1.weight
        weight.copy_(weight.roll(1, dims=0))
        drafts = case.draft()
        weight.copy_(weight.roll(-1, dims=0))
    with pytest.raises(AssertionError):
        check_for(dtype)(case, drafts)
    check_for(dtype)(case, case.draft())


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_id_in_place_of_the_target_id_is_noticed(kind, dtype):
    case = Case(kind, dtype, reduced=True)
    ids, case.target_ids = case.target_ids, None
    drafts = case.draft(vocab_size=len(ids))
    case.target_ids = ids
    with pytest.raises(AssertionError):
        check_for(dtype)(case, drafts._replace(tokens=ids[drafts.tokens]))


SPOILED_RESULTS: dict[str, Callable[[Case, sequential.Drafts], dict[str, Tensor]]] = {
    "q of the next position": lambda case, drafts: {"probabilities": drafts.probabilities.roll(-1, dims=1)},
    "q of the next request": lambda case, drafts: {"probabilities": drafts.probabilities.roll(-1, dims=0)},
    "q at temperature 1": lambda case, drafts: {"probabilities": drafts.probabilities ** case.temperature[:, None, None]},
    "q without the correction": lambda case, drafts: {
        "probabilities": torch.softmax(case.logits.float() / case.temperature.clamp(min=1e-3)[:, None, None], -1)
    },
    "confidences of the next position": lambda case, drafts: {"confidences": drafts.confidences.roll(-1, dims=1)},
    "confidence of the drafted token": lambda case, drafts: {
        "confidences": torch.sigmoid(case.confidence_head(case.hidden, case.markov.embed(drafts.tokens)))
    },
}


@pytest.mark.parametrize("mistake", SPOILED_RESULTS)
@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_result_is_noticed(kind, dtype, mistake):
    case = Case(kind, dtype)
    drafts = case.draft()
    with pytest.raises(AssertionError):
        check_for(dtype)(case, drafts._replace(**SPOILED_RESULTS[mistake](case, drafts)))


def chi_square(case: Case, drafts: sequential.Drafts, q: Tensor) -> tuple[float, int]:
    """Pearson's statistic of the pairs (x_1, x_2) against q_1(x_1) q_2(x_2 | x_1), and its degrees of freedom.

    All rows are the same request, so q_2 given x_1 is that of any row that drew x_1. Pairs expected fewer than five
    times are one cell.
    """
    ids = case.draft_ids(drafts.tokens)
    total, vocab = ids.shape[0], q.shape[-1]
    seen = torch.bincount(ids[:, 0] * vocab + ids[:, 1], minlength=vocab * vocab).double()
    expected = torch.zeros(vocab, vocab, dtype=torch.float64)
    for first in range(vocab):
        rows = (ids[:, 0] == first).nonzero().flatten()
        expected[first] = q[0, 0, first].double() * (q[rows[0], 1].double() if len(rows) else 1 / vocab) * total
    rare = expected.flatten() < 5
    seen = torch.cat((seen[~rare], seen[rare].sum(0, keepdim=True)))
    expected = torch.cat((expected.flatten()[~rare], expected.flatten()[rare].sum(0, keepdim=True))).clamp(min=1e-9)
    return float(((seen - expected) ** 2 / expected).sum()), len(seen) - 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_tokens_are_distributed_as_q(kind, temperature):
    """40,000 blocks of one request. The bound is 6 deviations above the mean: about one false alarm in a million."""
    case = Case(kind, batch=40_000, slots=2, vocab=12, reduced=True, temperatures=(temperature,), seed=3)
    for name in ("hidden", "logits", "anchors"):
        value = getattr(case, name)
        setattr(case, name, value[:1].expand_as(value).contiguous())
    torch.manual_seed(5)
    drafts = case.draft(noise=None)
    statistic, freedom = chi_square(case, drafts, drafts.probabilities)
    assert freedom >= 8
    bound = freedom + 6 * (2 * freedom) ** 0.5
    assert statistic < bound
    shifted, _ = chi_square(case, drafts, drafts.probabilities.roll(1, dims=1))
    assert shifted > 10 * bound, "q off by one position would not be noticed"


# -- noise --


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seeded_row_is_the_same_in_any_batch():
    torch.manual_seed(0)
    small = sequential.exponential_noise(torch.empty(2, 3, 11), {1: seeded(42)})
    large = sequential.exponential_noise(torch.empty(6, 3, 11), {0: seeded(7), 4: seeded(42)})
    assert torch.equal(small[1], large[4])
    assert not torch.equal(small[1], large[0])


def test_unseeded_rows_differ_from_each_other_and_from_call_to_call():
    first, second = (sequential.exponential_noise(torch.empty(3, 2, 11), {2: seeded(1)}) for _ in range(2))
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[:2], second[:2])


def test_a_generator_moves_on_from_round_to_round():
    generator = seeded(1)
    first, second = (sequential.exponential_noise(torch.empty(1, 2, 11), {0: generator}) for _ in range(2))
    assert not torch.equal(first, second)


def test_seeded_requests_draft_the_same_whatever_is_beside_them():
    case = Case("rnn", batch=5, temperatures=(1.0,))
    everyone = case.draft(noise=sequential.exponential_noise(case.logits, {3: seeded(9)}))
    row = slice(3, 4)
    alone = case.draft(
        hidden=case.hidden[row], logits=case.logits[row], anchors=case.anchors[row], temperature=case.temperature[row],
        noise=sequential.exponential_noise(case.logits[row], {0: seeded(9)}),
    )  # fmt: skip
    assert torch.equal(everyone.tokens[row], alone.tokens)


def test_noise_is_exponential():
    torch.manual_seed(1)
    noise = sequential.exponential_noise(torch.empty(100, 50, 20), {0: seeded(1)})
    assert noise.min() > 0
    assert noise.mean().item() == pytest.approx(1, abs=0.02)
    assert (noise > 2).float().mean().item() == pytest.approx(torch.tensor(-2.0).exp().item(), abs=0.005)


# -- modules and results --


def test_results_have_their_documented_shapes_and_types():
    case = Case("gated", torch.bfloat16, reduced=True)
    drafts = case.draft(anchors=case.anchors.int())
    assert (drafts.tokens.shape, drafts.tokens.dtype) == ((7, 5), torch.int64)
    assert (drafts.probabilities.shape, drafts.probabilities.dtype) == ((7, 5, 15), torch.float32)
    assert (drafts.confidences.shape, drafts.confidences.dtype) == ((7, 5), torch.float32)
    assert set(drafts.tokens.flatten().tolist()) <= set(case.target_ids.tolist())


def test_inputs_are_left_as_they_were():
    case = Case("rnn")
    before = [value.clone() for value in (case.hidden, case.logits, case.anchors, case.temperature, case.noise)]
    case.draft()
    for old, new in zip(before, (case.hidden, case.logits, case.anchors, case.temperature, case.noise), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vanilla", {}),
        ("gated", {"gate_proj.weight": (4, 16), "gate_proj.bias": (4,)}),
        ("rnn", {"joint_proj.weight": (12, 20), "joint_proj.bias": (12,)}),
    ],
)
def test_a_heads_parameters_are_the_checkpoints_tensors(kind, more):
    head = MarkovHead(kind, vocab_size=31, draft_vocab_size=15, rank=4, hidden_size=12)
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == {"markov_w1.weight": (31, 4), "markov_w2.weight": (15, 4), **more}


@pytest.mark.parametrize("kind", ["none", "lstm", ""])
def test_a_head_type_without_a_module_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"head type '{kind}' has no module; expected one of vanilla, gated, rnn"):
        MarkovHead(kind, 31, 31, 4, 12)
