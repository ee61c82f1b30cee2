"""Candidate mode: exact over the base top ids and the previous token's list, and nothing outside them."""

import pytest
import torch
from parity import DEVICE, SPARE, KernelCase, check, run

from vllm_dspark.heads.candidates import Candidates, bias_lists, outside
from vllm_dspark.heads.kernels.stage import FusedStage
from vllm_dspark.heads.modules import HEAD_KINDS
from vllm_dspark.heads.stage import EagerStage


def stages(case: KernelCase, candidates: Candidates) -> list[FusedStage | EagerStage]:
    rows = case.batch + SPARE
    return [
        FusedStage(case.weights, rows, case.slots, DEVICE, candidates),
        EagerStage(case.weights, rows, DEVICE, candidates),
    ]


def truncated(case: KernelCase, candidates: Candidates, tokens: torch.Tensor) -> None:
    """Base logits of -30 outside the candidates that the drafted ``tokens`` led to: the reference then truncates too.

    Not -inf, so that nothing is divided by 0; e^-30 shifts no probability that is compared.
    """
    candidates = Candidates(candidates.top, None if candidates.lists is None else candidates.lists.cpu())
    previous = case.anchors
    logits = case.logits.clone()
    for k in range(case.slots):
        excluded = outside(candidates, logits[:, k], previous)
        case.logits[:, k] = logits[:, k].masked_fill(excluded, -30.0)
        previous = torch.where(case.real, tokens[:, k], case.anchors)


@pytest.mark.parametrize("lists", [False, True], ids=["top", "top and lists"])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_drafts_are_the_truncated_specifications(kind, batch, reduced, lists):
    """Tokens, and processed logits over the candidates, of the specification on truncated base logits."""
    if lists and kind == "none":
        pytest.skip("no bias to list")
    temperatures = (0.8,) if batch == 1 else (0.0, 0.8, 1.3)
    case = KernelCase(kind, batch=batch, slots=3, vocab=203, rank=16, reduced=reduced, temperatures=temperatures,
                      padded=(3,) if batch > 3 else ())  # fmt: skip
    candidates = Candidates(20, bias_lists(case.weights, 9) if lists else None)
    base, results = case.logits.clone(), []
    for stage in stages(case, candidates):
        outcome = run(case, stage, fill=float("-inf"))
        results.append(outcome)
        hold_truncated(case, candidates, outcome)
        case.logits = base.clone()
    assert torch.equal(results[0].tokens, results[1].tokens)
    written = results[0].processed.isfinite()
    assert torch.equal(written, results[1].processed.isfinite())
    counts = written.sum(-1)[case.slot_of[case.real & case.sampled]]
    assert bool((counts >= 20).all())
    assert bool((counts <= candidates.most).all())
    assert bool((counts > 20).any()) == lists, "no list added a candidate"
    torch.testing.assert_close(results[0].processed, results[1].processed, rtol=1e-5, atol=1e-5)


def hold_truncated(case: KernelCase, candidates: Candidates, outcome) -> None:
    """Greedy and sampled tokens are the best of their candidates, by the float64 reference led along them."""
    truncated(case, candidates, outcome.tokens)
    ids = case.draft_ids(torch.where(case.real[:, None], outcome.tokens, 0 if case.target_ids is None else case.target_ids[0]))
    led = torch.ones_like(case.noise, dtype=torch.float64).scatter_(-1, ids.unsqueeze(-1), 1e-200)
    z = case.specified(torch.ones(case.batch, dtype=torch.float64), led).probabilities.log()
    outsiders = case.logits == -30.0
    z = z.masked_fill(outsiders, -torch.inf)
    hot = case.sampled[:, None, None]
    scores = torch.where(hot, z / case.temperature.double().clamp_min(1e-9)[:, None, None] - case.noise.double().log(), z)
    short = scores.amax(-1) - scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert bool((short[case.real] < 1e-4).all())
    rows = case.real & case.sampled
    told = outcome.processed[case.slot_of[rows]].double()
    told = told if case.target_ids is None else told[..., case.target_ids]
    assert torch.equal(told.isfinite(), ~outsiders[rows])
    shift = (told - z[rows]).masked_fill(outsiders[rows], 0)
    spread = shift.masked_fill(outsiders[rows], -torch.inf).amax(-1) - shift.masked_fill(outsiders[rows], torch.inf).amin(-1)
    assert bool((spread < 1e-4).all()), "processed logits differ from the reference's by more than a constant"


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_what_the_last_round_wrote_is_wiped(kind):
    """Processed rows hold this round's candidates alone, although they are never cleared as a whole."""
    first = KernelCase(kind, batch=5, slots=3, vocab=203, rank=16, temperatures=(1.0, 0.0))
    second = KernelCase(kind, batch=5, slots=3, vocab=203, rank=16, temperatures=(0.0, 1.0), seed=1, padded=(4,))
    stage = stages(first, Candidates(20))[0]
    processed = torch.full((5 + SPARE, 3, 203), -torch.inf, device=DEVICE)
    shared = run_shared(first, stage, processed)
    assert bool(shared.isfinite().any())
    stage.weights = second.weights
    reused = run_shared(second, stage, processed).clone()
    fresh = run_shared(second, stages(second, Candidates(20))[0], torch.full_like(processed, -torch.inf))
    rows = second.slot_of[second.real]
    assert torch.equal(reused[rows], fresh[rows])
    elsewhere = torch.ones(5 + SPARE, dtype=torch.bool)
    elsewhere[rows] = False
    assert torch.equal(reused[elsewhere], shared[elsewhere]), "rows of requests that were not in the round changed"


def run_shared(case: KernelCase, stage: FusedStage, processed: torch.Tensor) -> torch.Tensor:
    """A round on a caller's processed logits; they come back on the CPU."""
    from vllm_dspark.heads.stage import Draws, Round

    temperature = torch.zeros(case.batch + SPARE)
    temperature[case.slot_of] = case.temperature
    index = torch.where(case.real, case.slot_of, -1).to(DEVICE)
    draws = Draws(temperature.to(DEVICE), case.seeds.to(DEVICE), case.positions.to(DEVICE), None, processed)
    tokens = torch.zeros(case.batch, case.slots, dtype=torch.long, device=DEVICE)
    stage.draft(Round(case.hidden.to(DEVICE), case.logits.to(DEVICE), case.anchors.to(DEVICE), tokens, None, index, draws))
    return processed.cpu().clone()


def test_all_ids_as_candidates_are_no_truncation():
    case = KernelCase("rnn", batch=3, slots=3, vocab=64, rank=16, temperatures=(0.0, 1.0))
    stage = FusedStage(case.weights, case.batch + SPARE, case.slots, DEVICE, Candidates(64))
    check(case, run(case, stage))


def test_lists_hold_the_ids_raised_most():
    case = KernelCase("vanilla", batch=1, vocab=50, rank=8)
    lists = bias_lists(case.weights, 4, rows=7)
    tensors = case.tensors()
    bias = tensors["markov_head.markov_w1.weight"] @ tensors["markov_head.markov_w2.weight"].T
    assert lists.shape == (50, 4)
    assert torch.equal(lists.long().sort(-1).values.cpu(), bias.topk(4).indices.sort(-1).values)


def test_absent_list_entries_add_nothing():
    case = KernelCase("vanilla", batch=2, slots=2, vocab=101, rank=8, temperatures=(1.0,))
    lists = torch.full((101, 3), -1, dtype=torch.int32, device=DEVICE)
    for stage in stages(case, Candidates(10, lists)):
        assert bool((run(case, stage, fill=float("-inf")).processed.isfinite().sum(-1)[case.slot_of] == 10).all())
