"""The fused stage is the specification for every head, type, W2 format, vocabulary and batch; so is its fallback."""

import itertools
from dataclasses import replace

import pytest
import torch
from parity import KernelCase, build, check, run

from vllm_dspark.heads.formats import WEIGHT_FORMATS
from vllm_dspark.heads.kernels import stage as kernels
from vllm_dspark.heads.modules import HEAD_KINDS

GPU = torch.cuda.is_available()
HALF = (torch.bfloat16, torch.float16)
STAGES = pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])


def bounds(case: KernelCase, fused: bool = True) -> dict[str, float]:
    """Fused, heads of any type are exact up to float32 sums; the eager stage rounds its code and bias to the model's type."""
    if case.dtype in HALF and case.kind != "none" and not fused:
        return {"tie": 2e-2, "error": 1e-2}
    return {"tie": 1e-4, "error": 1e-4} if case.kind in ("gated", "rnn") else {}


def hold(case: KernelCase, fused: bool = True, sampled: bool = True) -> None:
    """Parity of one run, with ties no more than one token in fifty."""
    ties = check(case, run(case, build(case, fused), sampled), sampled, **bounds(case, fused))
    assert ties <= max(1, case.batch * case.slots // 50), f"{ties} ties"


@STAGES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "sampled"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, True)],
    ids=str,
)
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_small_batches(kind, dtype, batch, sampled, fused):
    temperatures = (0.7,) if batch == 1 else (0.0, 0.7, 1.6, 1.0)
    hold(KernelCase(kind, dtype, batch, slots=2, rank=20, hidden_size=24, vocab=97, temperatures=temperatures), fused, sampled)


@STAGES
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("w2_format", WEIGHT_FORMATS[1:])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_quantised_w2(kind, w2_format, batch, fused):
    case = KernelCase(kind, torch.bfloat16, batch, slots=2, rank=32, vocab=97, w2_format=w2_format, temperatures=(1.0, 0.0))
    hold(case, fused)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("w2_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("kind", ["vanilla", "rnn"])
def test_row_blocks_as_large_as_gpus_take(kind, w2_format, rows, monkeypatch):
    """Larger than the interpreter's own; int8 goes another way from 64 rows on."""
    usual = kernels.step_launch
    monkeypatch.setattr(kernels, "step_launch", lambda *given: replace(usual(*given), block_rows=rows))
    hold(KernelCase(kind, torch.bfloat16, 70, slots=2, rank=48, vocab=97, w2_format=w2_format, padded=(69,)))


@STAGES
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_reduced_vocabulary_and_padded_rows(kind, fused):
    hold(KernelCase(kind, batch=9, slots=3, vocab=131, rank=16, reduced=True, padded=(0, 4, 8)), fused)


@pytest.mark.parametrize("confidence", ["hidden", "absent"])
@pytest.mark.parametrize("kind", ["vanilla", "rnn"])
def test_other_confidence_heads(kind, confidence):
    hold(KernelCase(kind, batch=3, slots=2, vocab=33, confidence=confidence))


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_batches_beyond_one_launch_a_step(kind):
    """Above 16 rows even vanilla heads reduce the maxima in a launch of their own."""
    hold(KernelCase(kind, torch.bfloat16, 21, slots=3, rank=32, vocab=300, padded=(20,)))


def test_rows_are_their_own_slots_without_an_index():
    hold(KernelCase("vanilla", batch=5, slots=2, indexed=False))


@STAGES
def test_an_empty_batch_writes_nothing(fused):
    case = KernelCase("vanilla", batch=0, slots=2)
    outcome = run(case, build(case, fused, max_batch=4))
    assert bool(outcome.processed.isnan().all())


def test_a_stage_serves_smaller_rounds_than_it_was_built_for():
    """What a larger round left in the buffers does not show."""
    small = KernelCase("rnn", batch=2, slots=3, seed=5)
    large = KernelCase("rnn", batch=7, slots=3)
    stage = build(large)
    check(large, run(large, stage))
    stage.weights = small.weights
    check(small, run(small, stage))


def test_rounds_that_do_not_fit_the_buffers_are_refused():
    case = KernelCase("vanilla", batch=3, slots=2)
    with pytest.raises(ValueError, match="3 rows and 2 slots; the buffers are for up to 2 and 2"):
        run(case, build(case, max_batch=2))
    stage = build(case)
    case.logits, case.noise = case.logits[..., :-1], case.noise[..., :-1].contiguous()
    with pytest.raises(ValueError, match="markov_w2 has 31 rows; the draft vocabulary has 30"):
        run(case, stage)


SMALL, LARGE = (97, 1024), (32003, 151936, 262144)
BATCHES = (0, 1, 2, 7, 64, 257)
MATRIX = [
    case
    for case in itertools.product(HEAD_KINDS, (torch.float32, *HALF), WEIGHT_FORMATS, (*SMALL, *LARGE), BATCHES)
    if case[0] != "none" or case[2] == "native"  # there is no W2 to quantise
]


def pairs(case: tuple) -> set[tuple]:
    """Every two values of a case, with their places."""
    return set(itertools.combinations(enumerate(case), 2))


def covering(cases: list[tuple]) -> list[tuple]:
    """A few of ``cases`` in which every two values that meet anywhere meet: always the one with the most new pairs."""
    missing, found = set().union(*map(pairs, cases)), []
    while missing:
        found.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(found[-1])
    return found


def hold_in_matrix(kind, dtype, w2_format, vocab, batch) -> None:
    if vocab == 262144:
        batch = min(batch, 16)
    rank = 48 if vocab == 97 else 32 if vocab <= 32003 else 256
    slots = 2 if batch > 7 or vocab > 2000 else 5
    padded = (batch - 1,) if batch > 2 else ()
    hold(KernelCase(kind, dtype, batch, slots, hidden_size=64, rank=rank, vocab=vocab, w2_format=w2_format, padded=padded))


@pytest.mark.parametrize(
    ("kind", "dtype", "w2_format", "vocab", "batch"), covering([c for c in MATRIX if c[3] in SMALL]), ids=str
)
def test_every_pair_in_the_matrix(kind, dtype, w2_format, vocab, batch):
    """Of head, type, format, vocabulary and batch, any two values at once; all of them at once are below."""
    hold_in_matrix(kind, dtype, w2_format, vocab, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "w2_format", "vocab", "batch"), MATRIX if GPU else [c for c in MATRIX if c[3] in SMALL], ids=str
)
def test_every_combination(kind, dtype, w2_format, vocab, batch):
    """Large vocabularies on a GPU only: ``make test-gpu``."""
    hold_in_matrix(kind, dtype, w2_format, vocab, batch)


# -- would it notice? --


@pytest.mark.parametrize("mistake", ["token", "processed", "padding", "confidence"])
def test_a_wrong_result_is_noticed(mistake):
    case = KernelCase("gated", batch=4, slots=3, vocab=97, rank=16, padded=(2,), temperatures=(0.0, 1.0))
    outcome = run(case, build(case))
    check(case, outcome)
    if mistake == "token":
        outcome.tokens[1, 1] = (outcome.tokens[1, 1] + 1) % 97
    elif mistake == "processed":
        outcome.processed[case.slot_of[1], 1, 5] += 0.01
    elif mistake == "padding":
        outcome.tokens[2, 0] = 3
    else:
        outcome.confidences[0] = outcome.confidences[0].roll(1)
    with pytest.raises(AssertionError):
        check(case, outcome)
