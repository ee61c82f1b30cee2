"""The stage in torch with an engine's sampler: the reference's blocks, and nothing that a graph could not hold.

What it draws by itself is held to the specification beside the kernels, in ``kernels/test_parity.py``.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vllm_dspark.heads import reference
from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.heads.stage import EagerStage, Round, Sampler
from vllm_dspark.heads.weights import prepare

VOCABULARY, DRAFTED, RANK, HIDDEN, SLOTS, REQUESTS = 97, 61, 6, 16, 5, 8
CPU = torch.device("cpu")
TARGET_IDS = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(9))[:DRAFTED].sort().values
KINDS = pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
Inputs = tuple[Tensor, Tensor, Tensor]


def built(kind: HeadKind, with_markov: bool = True, candidates: int | None = None) -> tuple[EagerStage, dict[str, Tensor]]:
    torch.manual_seed(1)
    markov = None if kind == "none" else MarkovHead(kind, VOCABULARY, DRAFTED, RANK, HIDDEN).requires_grad_(False)
    confidence = ConfidenceHead(HIDDEN, RANK, with_markov and markov is not None).requires_grad_(False)
    tensors = {f"confidence_head.{name}": value for name, value in confidence.state_dict().items()}
    if markov is not None:
        tensors |= {f"markov_head.{name}": value for name, value in markov.state_dict().items()}
    weights = prepare(markov, confidence, TARGET_IDS)
    return EagerStage(weights, REQUESTS, CPU, None if candidates is None else Candidates(candidates)), tensors


def inputs(requests: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(requests, SLOTS, HIDDEN, generator=generator)
    logits = torch.randn(requests, SLOTS, DRAFTED, generator=generator)
    return hidden, logits, torch.randint(VOCABULARY, (requests,), generator=generator)


def drawn(stage: EagerStage, given: Inputs, sampler: Sampler) -> Tensor:
    tokens = torch.zeros(len(given[0]), SLOTS, dtype=torch.long)
    stage.draft(Round(*given, tokens, sampler=sampler))
    return tokens


def greedy(logits: Tensor, k: int) -> Tensor:
    return TARGET_IDS[logits.argmax(-1)]


@pytest.mark.parametrize("with_markov", [True, False])
@KINDS
def test_blocks_of_any_batch_are_the_references(kind: HeadKind, with_markov: bool) -> None:
    """A smaller batch after a larger one finds nothing of it."""
    stage, tensors = built(kind, with_markov)
    tokens, confidences = torch.zeros(REQUESTS, SLOTS, dtype=torch.long), torch.zeros(REQUESTS, SLOTS)
    for requests in (REQUESTS, 3, 1):
        hidden, logits, anchors = inputs(requests, seed=requests)
        tokens.fill_(-1)
        confidences.fill_(-1)
        stage.draft(Round(hidden, logits, anchors, tokens[:requests], confidences[:requests], sampler=greedy))
        wanted = reference.draft_block(
            tensors, kind, hidden, logits, anchors, torch.zeros(requests), target_ids=TARGET_IDS, vocab_size=VOCABULARY
        )
        assert torch.equal(tokens[:requests], wanted.tokens)
        torch.testing.assert_close(confidences[:requests], wanted.confidences)
        assert (tokens[requests:] == -1).all()
        assert (confidences[requests:] == -1).all()


@KINDS
def test_the_sampler_gets_the_corrected_logits_of_what_was_drawn_before(kind: HeadKind) -> None:
    """Tokens are drawn against the logits' order; each slot's logits are the reference's after those very tokens."""
    stage, tensors = built(kind)
    hidden, logits, anchors = inputs(REQUESTS)
    seen: list[Tensor] = []

    def worst(corrected: Tensor, k: int) -> Tensor:
        assert k == len(seen)
        seen.append(corrected.clone())
        return TARGET_IDS[corrected.argmin(-1)]

    tokens = drawn(stage, (hidden, logits, anchors), worst)
    position = torch.zeros(VOCABULARY, dtype=torch.long).index_copy(0, TARGET_IDS, torch.arange(DRAFTED))
    noise = torch.ones_like(logits).double().scatter_(2, position[tokens].unsqueeze(-1), 1e-300)
    wanted = reference.draft_block(
        tensors, kind, hidden.double(), logits.double(), anchors, torch.ones(REQUESTS), noise, TARGET_IDS, VOCABULARY
    )
    assert torch.equal(tokens, wanted.tokens)
    q = torch.stack(seen, 1).softmax(-1)
    torch.testing.assert_close(q.double(), wanted.probabilities[:, :, TARGET_IDS], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("candidates", [1, 7, DRAFTED])
@KINDS
def test_candidates_are_corrected_and_nothing_else_can_be_drawn(kind: HeadKind, candidates: int) -> None:
    given = inputs(REQUESTS)
    kept = given[1].topk(candidates, -1).indices
    rows: list[list[Tensor]] = [[], []]

    def draw(index: int) -> Callable[[Tensor, int], Tensor]:
        def draw_next(corrected: Tensor, k: int) -> Tensor:
            rows[index].append(corrected.clone())
            return TARGET_IDS[kept[:, k, 0]]  # the same tokens in both runs

        return draw_next

    drawn(built(kind)[0], given, draw(0))
    drawn(built(kind, candidates=candidates)[0], given, draw(1))
    everything, some = torch.stack(rows[0], 1), torch.stack(rows[1], 1)
    torch.testing.assert_close(some.gather(2, kept), everything.gather(2, kept))
    assert torch.isfinite(some).sum() == REQUESTS * SLOTS * candidates


@pytest.mark.parametrize("candidates", [None, 7])
@KINDS
def test_nothing_is_read_back(kind: HeadKind, candidates: int | None) -> None:
    """With tensors that have no values, every read on the host and every shape that depends on one is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, _ = built(kind, candidates=candidates)
        hidden, logits = torch.empty(REQUESTS, SLOTS, HIDDEN), torch.empty(REQUESTS, SLOTS, DRAFTED)
        tokens, confidences = torch.empty(REQUESTS, SLOTS).long(), torch.empty(REQUESTS, SLOTS)
        anchors, index = torch.empty(REQUESTS).long(), torch.empty(REQUESTS).long()
        stage.draft(Round(hidden, logits, anchors, tokens, confidences, index, sampler=greedy))
        with pytest.raises(DataDependentOutputException):
            stage.draft(Round(hidden, logits, anchors, tokens, sampler=lambda z, k: z.argmax(-1) + int(anchors[0])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sampler_gets_numbers_only(bad: float) -> None:
    """Rows whose logits are not finite are told, drafted from what is left, and not trusted."""
    stage, _ = built("vanilla")
    hidden, logits, anchors = inputs(4)
    logits[1, 2, 5], logits[2, 0] = bad, bad
    tokens, confidences = torch.zeros(4, SLOTS, dtype=torch.long), torch.zeros(4, SLOTS)

    def checked(z: Tensor, k: int) -> Tensor:
        assert bool(z.isfinite().all())
        return greedy(z, k)

    stage.draft(Round(hidden, logits, anchors, tokens, confidences, sampler=checked))
    assert stage.broken.tolist() == [0, 1, 1, 0, *[0] * (REQUESTS - 4)]
    assert (confidences > 0).all(1).tolist() == [True, False, False, True]
    assert not confidences[1:3].any()
