"""Our parts of the V2 speculator, on a stand-in for vLLM's: what they change, what they leave, what a bad drafter does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_dspark.heads import reference
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead

pytest.importorskip("vllm")
from vllm_dspark.engine import models, v2

VOCABULARY, HIDDEN, RANK, REQUESTS, BLOCK = 41, 8, 4, 6, 5


class Native:
    """What our parts use of vLLM's DSparkSpeculator: the same names, shapes and start values."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        self.num_speculative_steps = speculative.num_speculative_tokens
        if speculative.fails:
            raise RuntimeError("as told")
        self.max_num_reqs, self.device, self._draft_topk = REQUESTS, device, None
        self.enable_adaptive_verification = self.use_acceptance_estimator = speculative.enable_adaptive_verification
        self.use_confidence_head = False
        steps = self.num_speculative_steps
        self.draft_tokens = torch.zeros(REQUESTS, steps, dtype=torch.long)
        self.draft_token_confidence_probs = torch.full((REQUESTS, steps), float("nan"))
        self.sample_indices = torch.arange(REQUESTS * steps)
        self.sample_pos = torch.arange(REQUESTS * steps)
        self.sample_idx_mapping = torch.arange(REQUESTS).repeat_interleave(steps)
        self._anchor_idx = torch.arange(REQUESTS) * steps
        self.input_buffers = SimpleNamespace(input_ids=torch.arange(REQUESTS * steps, dtype=torch.int32) % VOCABULARY)
        self.calls: list[str] = []
        self.ran: list[Any] = []
        self.captured: list[Any] = []
        self.fails = False

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> Any:
        return target_model

    def _sample_sequential(self, num_reqs: int, head_hidden: Tensor) -> None:
        self.calls.append("vLLM's sequential stage")

    def _sample_logits(self, logits: Tensor, idx_map: Tensor, sample_pos: Tensor, step: int) -> Tensor:
        return logits.argmax(-1)

    def propose(self, input_batch: Any, **more: Any) -> Tensor:
        if self.fails:
            raise RuntimeError("as told")
        self.ran.append(("context", self.query_cudagraph_manager, self._build_uniform_attn_metadata()))
        self._generate_draft()
        return self.draft_tokens[: input_batch.num_reqs]

    def _generate_draft(self) -> None:
        self.ran[-1] = ("block", *self.ran[-1][1:])

    def _build_uniform_attn_metadata(self) -> str:
        return "metadata"

    def _prepare_graph_forward(self, num_reqs: int, attn_metadata: str | None) -> None:
        self.captured.append((self.query_cudagraph_manager, attn_metadata))

    def init_cudagraph_manager(self, mode: Any) -> None:
        self.query_cudagraph_manager = object()

    def capture(self) -> None:
        self._prepare_graph_forward(1, "metadata")


class Draft(models.DraftHeads):
    """A draft model with heads and no backbone."""

    def __init__(self, kind: HeadKind, confident: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.markov_head = None if kind == "none" else MarkovHead(kind, VOCABULARY, VOCABULARY, RANK, HIDDEN)
        self.confidence_head = ConfidenceHead(HIDDEN, RANK, self.markov_head is not None) if confident else None
        self.compute_draft_logits = self.lm_head
        self.requires_grad_(False)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    monkeypatch.setattr(models, "register", lambda: calls.append(True))
    return calls


def made(k: int = BLOCK, adaptive: bool = False, architecture: str = "Qwen3DSparkModel", fails: bool = False) -> Any:
    hf_config = SimpleNamespace(block_size=BLOCK, sample_from_anchor=True, architectures=[architecture])
    speculative = SimpleNamespace(
        num_speculative_tokens=k, draft_model_config=SimpleNamespace(hf_config=hf_config), fails=fails,
        enable_adaptive_verification=adaptive,
    )  # fmt: skip
    scheduler = SimpleNamespace(max_num_seqs=REQUESTS, max_num_batched_tokens=512)
    return SimpleNamespace(speculative_config=speculative, scheduler_config=scheduler)


def speculator(model: nn.Module | None = None, **given: Any) -> Any:
    ours = v2.speculator(Native)(made(**given), torch.device("cpu"))
    if model is not None:
        ours.model = ours.load_draft_model(model, set())
    return ours


def test_the_whole_block_is_drafted_and_the_first_k_are_handed_on() -> None:
    config = made(k=2)
    ours = v2.speculator(Native)(config, torch.device("cpu"))
    assert config.speculative_config.num_speculative_tokens == 2
    assert ours.num_speculative_steps == BLOCK
    ours.draft_tokens[:] = torch.arange(BLOCK)
    assert ours.propose(batch(), dummy_run=False).tolist() == [[0, 1]] * 3
    ours.block_confidences[1, 1] = 0.25
    assert ours.draft_token_confidence_probs.shape == (REQUESTS, 2)
    assert ours.draft_token_confidence_probs[1].tolist() == [1.0, 0.25]


def test_a_failure_leaves_the_configuration_as_it_was() -> None:
    config = made(k=2, fails=True)
    with pytest.raises(RuntimeError, match="as told"):
        v2.speculator(Native)(config, torch.device("cpu"))
    assert config.speculative_config.num_speculative_tokens == 2


def test_drafters_of_vllms_own_families_stay_vllms(registered: list[bool]) -> None:
    ours = speculator(nn.Linear(1, 1), k=2, architecture="DeepseekV4DSparkModel", adaptive=True)
    assert ours.num_speculative_steps == 2
    assert (ours.use_confidence_head, ours.use_acceptance_estimator) == (False, True)
    ours._sample_sequential(2, torch.zeros(4, HIDDEN))
    assert ours.calls == ["vLLM's sequential stage"]
    assert registered == [True]  # before the model was built


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("confident", [False, True])
def test_confidences_come_from_the_head_wherever_there_is_one(confident: bool, adaptive: bool) -> None:
    ours = speculator(Draft("gated", confident), adaptive=adaptive)
    assert ours.use_confidence_head == confident
    assert ours.use_acceptance_estimator == (adaptive and not confident)
    ours._sample_sequential(REQUESTS, torch.randn(REQUESTS * BLOCK, HIDDEN))
    assert (ours.draft_token_confidence_probs == 1).all() == (not confident)


def rows(hidden: Tensor) -> Tensor:
    """Hidden states as the backbone returns them, from ``[R, K, d]``."""
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_the_stage_reads_vllms_buffers_and_fills_them(kind: HeadKind) -> None:
    """Hidden states in the order that ``sample_indices`` says, anchors where the block's first query is."""
    draft = Draft(kind)
    ours = speculator(draft)
    hidden = torch.randn(REQUESTS, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(4))
    order = torch.randperm(REQUESTS * BLOCK, generator=torch.Generator().manual_seed(5))
    ours.sample_indices = order
    shuffled = torch.empty(REQUESTS * BLOCK, HIDDEN)
    shuffled[order] = rows(hidden)
    ours._sample_sequential(4, shuffled)
    tensors = {name: value for name, value in draft.state_dict().items() if "_head." in name}
    anchors = ours.input_buffers.input_ids[ours._anchor_idx[:4]]
    wanted = reference.draft_block(tensors, kind, hidden[:4], draft.lm_head(hidden[:4]), anchors, torch.zeros(4))
    assert torch.equal(ours.draft_tokens[:4], wanted.tokens)
    torch.testing.assert_close(ours.draft_token_confidence_probs[:4], wanted.confidences, atol=1e-5, rtol=1e-5)
    assert (ours.draft_tokens[4:] == 0).all()
    assert (ours.draft_token_confidence_probs[4:] == 1).all()
    assert ours.calls == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_request_that_is_not_finite_spoils_only_itself(bad: float) -> None:
    draft = Draft("rnn")
    hidden = torch.randn(REQUESTS, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(4))
    good = speculator(draft)
    good._sample_sequential(REQUESTS, rows(hidden))
    assert int(draft.not_finite) == 0
    hidden[2, 3, 1] = bad
    hidden[5, 0, 0] = bad
    ours = speculator(draft)
    ours.sample_idx_mapping[-BLOCK:] = -1  # the last one only pads the batch
    ours._sample_sequential(REQUESTS, rows(hidden))
    others = [0, 1, 3, 4]
    assert torch.equal(ours.draft_tokens[others], good.draft_tokens[others])
    assert torch.equal(ours.draft_token_confidence_probs[others], good.draft_token_confidence_probs[others])
    assert (ours.draft_token_confidence_probs[2] == 0).all()
    assert ((ours.draft_tokens >= 0) & (ours.draft_tokens < VOCABULARY)).all()
    assert int(draft.not_finite) == 1


@pytest.mark.parametrize("candidates", [None, 3])
def test_a_step_can_be_captured(candidates: int | None) -> None:
    """Nothing in it needs a value on the host: it runs on tensors that have none."""
    with FakeTensorMode():
        draft = Draft("rnn")
        ours = speculator(draft)
        ours._draft_topk = candidates
        ours._sample_sequential(3, torch.empty(REQUESTS * BLOCK, HIDDEN))
    assert ours.calls == []


class Asked:
    """The rounds' answers, in order, and what they were told."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.told = list(answers), [0, 0]

    def begin(self, batch: Any) -> bool:
        return self.answers.pop(0)

    def end(self, confidences: Tensor | None) -> None:
        self.told[confidences is not None] += 1


def batch(grammar: bool = False) -> Any:
    return SimpleNamespace(num_reqs=3, num_tokens=3, has_structured_output_reqs=grammar)


def test_a_round_without_drafts_only_writes_context() -> None:
    ours = speculator(Draft("gated"), k=2)
    ours.init_cudagraph_manager(None)
    ours.capture()
    assert ours.captured == [(ours.query_cudagraph_manager, "metadata"), (ours.context_cudagraph_manager, None)]
    ours.rounds = Asked(False, True, False)
    ours.draft_tokens[:] = 7
    query = ours.query_cudagraph_manager
    assert ours.propose(batch()).tolist() == [[-1, -1]] * 3
    assert ours.ran == [("context", ours.context_cudagraph_manager, None)]
    assert ours.propose(batch()).tolist() == [[7, 7]] * 3
    assert ours.ran[1:] == [("block", query, "metadata")]
    assert ours.propose(batch(grammar=True)).tolist() == [[7, 7]] * 3
    assert [what for what, *_ in ours.ran] == ["context", "block", "context"]
    assert ours.propose(batch(), dummy_run=True).tolist() == [[7, 7]] * 3  # whatever is decided
    assert ours.blocks == 2
    assert ours.rounds.told == [0, 3]
    assert ours.query_cudagraph_manager is query


def test_a_context_only_step_that_fails_leaves_drafting_as_it_was() -> None:
    ours = speculator(Draft("gated"))
    ours.init_cudagraph_manager(None)
    query, ours.rounds = ours.query_cudagraph_manager, Asked(False)
    ours.fails = True
    with pytest.raises(RuntimeError, match="as told"):
        ours.propose(batch())
    assert ours.query_cudagraph_manager is query
    assert not ours.context_only
