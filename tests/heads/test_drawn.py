"""The stage on fixed buffers: the reference's blocks, at the same addresses every time, and nothing a graph could not hold."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vllm_dspark.heads import reference
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.heads.drawn import Stage

VOCABULARY, DRAFTED, RANK, HIDDEN, SLOTS, REQUESTS = 97, 61, 6, 16, 5, 8
TARGET_IDS = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(9))[:DRAFTED].sort().values


def heads(kind: HeadKind, with_markov: bool = True) -> tuple[MarkovHead | None, ConfidenceHead, dict[str, Tensor]]:
    torch.manual_seed(1)
    markov = None if kind == "none" else MarkovHead(kind, VOCABULARY, DRAFTED, RANK, HIDDEN).double().requires_grad_(False)
    confidence = ConfidenceHead(HIDDEN, RANK, with_markov and markov is not None).double().requires_grad_(False)
    tensors = {f"confidence_head.{name}": value for name, value in confidence.state_dict().items()}
    if markov is not None:
        tensors |= {f"markov_head.{name}": value for name, value in markov.state_dict().items()}
    return markov, confidence, tensors


def inputs(requests: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(requests, SLOTS, HIDDEN, generator=generator, dtype=torch.float64)
    logits = torch.randn(requests, SLOTS, DRAFTED, generator=generator, dtype=torch.float64)
    return hidden, logits, torch.randint(VOCABULARY, (requests,), generator=generator)


def greedy(logits: Tensor, k: int) -> Tensor:
    return TARGET_IDS[logits.argmax(-1)]


def block(kind: str, tensors: dict[str, Tensor], hidden: Tensor, logits: Tensor, anchors: Tensor) -> reference.Block:
    zeros = torch.zeros(len(anchors))
    return reference.draft_block(tensors, kind, hidden, logits, anchors, zeros, target_ids=TARGET_IDS, vocab_size=VOCABULARY)


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_blocks_of_any_batch_are_the_references(kind: HeadKind, with_markov: bool) -> None:
    """A smaller batch after a larger one finds nothing of it: no state, no embedding."""
    markov, confidence, tensors = heads(kind, with_markov)
    stage = Stage(markov, confidence, REQUESTS, SLOTS)
    tokens, confidences = torch.zeros(REQUESTS, SLOTS, dtype=torch.long), torch.zeros(REQUESTS, SLOTS, dtype=torch.float64)
    for requests in (REQUESTS, 3, 1):
        given = inputs(requests, seed=requests)
        tokens.fill_(-1)
        confidences.fill_(-1)
        stage.run(*given, greedy, tokens[:requests], confidences[:requests])
        wanted = block(kind, tensors, *given)
        assert torch.equal(tokens[:requests], wanted.tokens)
        torch.testing.assert_close(confidences[:requests], wanted.confidences)
        assert (tokens[requests:] == -1).all()
        assert (confidences[requests:] == -1).all()


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_the_sampler_gets_the_corrected_logits_of_what_was_drawn_before(kind: HeadKind) -> None:
    """Tokens are drawn against the logits' order; each slot's logits are the reference's after those very tokens."""
    markov, confidence, tensors = heads(kind)
    hidden, logits, anchors = inputs(REQUESTS)
    seen: list[Tensor] = []

    def worst(corrected: Tensor, k: int) -> Tensor:
        assert k == len(seen)
        seen.append(corrected.clone())
        return TARGET_IDS[corrected.argmin(-1)]

    tokens = torch.zeros(REQUESTS, SLOTS, dtype=torch.long)
    Stage(markov, confidence, REQUESTS, SLOTS).run(hidden, logits, anchors, worst, tokens)
    position = torch.zeros(VOCABULARY, dtype=torch.long).index_copy(0, TARGET_IDS, torch.arange(DRAFTED))
    noise = torch.ones_like(logits).scatter_(2, position[tokens].unsqueeze(-1), 1e-300)
    wanted = reference.draft_block(tensors, kind, hidden, logits, anchors, torch.ones(REQUESTS), noise, TARGET_IDS, VOCABULARY)
    assert torch.equal(tokens, wanted.tokens)
    q = torch.stack(seen, 1).softmax(-1)
    torch.testing.assert_close(q, wanted.probabilities[:, :, TARGET_IDS])


@pytest.mark.parametrize("candidates", [1, 7, DRAFTED])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_candidates_are_corrected_and_nothing_else_can_be_drawn(kind: HeadKind, candidates: int) -> None:
    markov, confidence, _ = heads(kind)
    hidden, logits, anchors = inputs(REQUESTS)
    dense, few = (torch.zeros(REQUESTS, SLOTS, dtype=torch.long) for _ in range(2))
    kept = logits.topk(candidates, -1).indices
    rows: list[list[Tensor]] = [[], []]

    def draw(index: int, choices: Tensor) -> Callable[[Tensor, int], Tensor]:
        def draw_next(corrected: Tensor, k: int) -> Tensor:
            rows[index].append(corrected.clone())
            return TARGET_IDS[choices[:, k]]  # the same tokens in both runs

        return draw_next

    best = kept[:, :, 0]
    stage = Stage(markov, confidence, REQUESTS, SLOTS)
    stage.run(hidden, logits.clone(), anchors, draw(0, best), dense)
    stage.run(hidden, logits.clone(), anchors, draw(1, best), few, candidates=candidates)
    everything, some = torch.stack(rows[0], 1), torch.stack(rows[1], 1)
    torch.testing.assert_close(some.gather(2, kept), everything.gather(2, kept))
    assert torch.isfinite(some).sum() == REQUESTS * SLOTS * candidates


@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_nothing_is_read_back(kind: HeadKind, candidates: int | None) -> None:
    """With tensors that have no values, every read on the host and every shape that depends on one is an error."""
    markov, confidence, _ = heads(kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, logits = torch.empty(REQUESTS, SLOTS, HIDDEN).double(), torch.empty(REQUESTS, SLOTS, DRAFTED).double()
        tokens, confidences = torch.empty(REQUESTS, SLOTS).long(), torch.empty(REQUESTS, SLOTS).double()
        stage = Stage(markov, confidence, REQUESTS, SLOTS)
        anchors = torch.empty(REQUESTS).long()
        stage.run(hidden, logits, anchors, lambda corrected, k: corrected.argmax(-1), tokens, confidences, candidates)
        with pytest.raises(DataDependentOutputException):
            stage.run(hidden, logits, anchors, lambda corrected, k: corrected.argmax(-1) + int(anchors[0]), tokens)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_what_is_kept_stays_where_it_is(kind: HeadKind) -> None:
    markov, confidence, _ = heads(kind)
    stage = Stage(markov, confidence, REQUESTS, SLOTS)
    tokens, confidences = torch.zeros(REQUESTS, SLOTS, dtype=torch.long), torch.zeros(REQUESTS, SLOTS, dtype=torch.float64)
    assert stage.embeddings is not None
    places = [kept.data_ptr() for kept in (stage.embeddings, tokens, confidences)]
    for requests in (2, REQUESTS):
        stage.run(*inputs(requests), greedy, tokens[:requests], confidences[:requests])
    assert [kept.data_ptr() for kept in (stage.embeddings, tokens, confidences)] == places
    assert tokens.bool().any(1).all()
