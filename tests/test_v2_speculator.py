"""Our parts of the V2 speculator, on a stand-in for vLLM's: what they change, what they leave, what a bad drafter does."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_dspark.heads import noise, reference
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead

pytest.importorskip("vllm")
from vllm_dspark.engine import models, v2

VOCABULARY, HIDDEN, RANK, REQUESTS, BLOCK = 41, 8, 4, 6, 5
EVERY, SOME = torch.arange(VOCABULARY), torch.arange(0, VOCABULARY, 2)  # draft vocabularies


class Native:
    """What our parts use of vLLM's DSparkSpeculator: the same names, shapes and start values."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        speculative = vllm_config.speculative_config
        self.num_speculative_steps = speculative.num_speculative_tokens
        if speculative.fails:
            raise RuntimeError("as told")
        self.max_num_reqs, self.device, self._draft_topk = REQUESTS, device, None
        self.enable_adaptive_verification = self.use_acceptance_estimator = speculative.enable_adaptive_verification
        self.use_confidence_head, self.draft_logits = False, None
        steps = self.num_query_per_req = self.num_speculative_steps
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
        if speculative.probabilistic:
            self.draft_logits = torch.zeros(REQUESTS, steps, VOCABULARY)
            self.temperature = torch.tensor([0.0, 0.6, 1.0, 0.0, 1.4, 1.0])
            self.seeds = torch.arange(REQUESTS) * 1234567

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> Any:
        return target_model

    def _sample_sequential(self, num_reqs: int, head_hidden: Tensor) -> None:
        self.calls.append("vLLM's sequential stage")

    def _sample_logits(self, logits: Tensor, idx_map: Tensor, sample_pos: Tensor, step: int) -> Tensor:
        if self.draft_logits is None:
            return self.model.ids[logits.argmax(-1)]
        kept = torch.full((len(logits), VOCABULARY), float("-inf")).index_copy(1, self.model.ids, logits)
        self.draft_logits[idx_map, step] = kept
        heat = self.temperature[idx_map, None]
        # As 0.32's, alike in every slot.
        noisy = kept / heat.where(heat > 0, 1) + noise.gumbel(
            self.seeds[idx_map, None], sample_pos[:, None] - 1, torch.arange(VOCABULARY), 0
        )
        return torch.where(heat > 0, noisy, kept).argmax(-1)

    def propose(self, input_batch: Any, **more: Any) -> Tensor:
        if self.fails:
            raise RuntimeError("as told")
        self.ran.append(("context", self.query_cudagraph_manager, self._build_uniform_attn_metadata()))
        self._generate_draft()
        return self.draft_tokens[: input_batch.num_reqs]

    def _generate_draft(self) -> None:
        self.ran[-1] = ("block", *self.ran[-1][1:])

    def _num_graph_context_tokens(self, num_reqs: int) -> int:
        return num_reqs * (1 + self.num_speculative_steps)

    def _build_uniform_attn_metadata(self) -> str:
        return "metadata"

    def _prepare_graph_forward(self, num_reqs: int, attn_metadata: str | None) -> None:
        self.captured.append((self.query_cudagraph_manager, attn_metadata, self._num_graph_context_tokens(num_reqs)))

    def init_cudagraph_manager(self, mode: Any) -> None:
        self.query_cudagraph_manager = SimpleNamespace(queries=self.num_query_per_req, dispatch=lambda *args, **_: args)

    def capture(self) -> None:
        self._prepare_graph_forward(2, "metadata")


class Backbone(nn.Module):
    def compute_draft_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)


class Draft(models.DraftHeads, Backbone):
    """A draft model with heads and no backbone to speak of; ``ids`` are the target ids that it drafts."""

    def __init__(self, kind: HeadKind, confident: bool = True, ids: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.ids = torch.arange(VOCABULARY) if ids is None else ids
        drafted = len(self.ids)
        self.draft_id_to_target_id = None if drafted == VOCABULARY else self.ids - torch.arange(drafted)
        self.lm_head = nn.Linear(HIDDEN, drafted, bias=False)
        self.markov_head = None if kind == "none" else MarkovHead(kind, VOCABULARY, drafted, RANK, HIDDEN)
        self.confidence_head = ConfidenceHead(HIDDEN, RANK, self.markov_head is not None) if confident else None
        self.logits_processor = SimpleNamespace(org_vocab_size=drafted, soft_cap=None, scale=1.0)
        self.requires_grad_(False)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    monkeypatch.setattr(models, "register", lambda: calls.append(True))
    return calls


def made(
    k: int = BLOCK, adaptive: bool = False, architecture: str = "Qwen3DSparkModel", fails: bool = False,
    probabilistic: bool = False, **options: Any,
) -> Any:  # fmt: skip
    hf_config = SimpleNamespace(block_size=BLOCK, sample_from_anchor=True, architectures=[architecture])
    speculative = SimpleNamespace(
        num_speculative_tokens=k, draft_model_config=SimpleNamespace(hf_config=hf_config), fails=fails,
        enable_adaptive_verification=adaptive, probabilistic=probabilistic,
    )  # fmt: skip
    scheduler = SimpleNamespace(max_num_seqs=REQUESTS, max_num_batched_tokens=512)
    additional = {"dspark": options}
    return SimpleNamespace(speculative_config=speculative, scheduler_config=scheduler, additional_config=additional)


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
        ours = speculator(Draft("rnn"), candidates=candidates)
        ours._sample_sequential(3, torch.empty(REQUESTS * BLOCK, HIDDEN))
    assert ours.calls == []


class Asked:
    """The rounds' answers, in order, and what they were told."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.told = list(answers), [0, 0]

    def begin(self, batch: Any, most: int | None) -> bool:
        self.most = most
        return self.answers.pop(0)

    def end(self, confidences: Tensor | None) -> None:
        self.told[confidences is not None] += 1


def batch(grammar: bool = False) -> Any:
    return SimpleNamespace(num_reqs=3, num_tokens=3, has_structured_output_reqs=grammar)


def test_a_round_without_drafts_only_writes_context() -> None:
    ours = speculator(Draft("gated"), k=2)
    ours.init_cudagraph_manager(None)
    ours.capture()
    assert (ours.query_cudagraph_manager.queries, ours.context_cudagraph_manager.queries) == (ours.num_query_per_req, 1)
    assert ours.query_cudagraph_manager.dispatch(5, 5 * BLOCK, BLOCK) == (5, 5 * BLOCK, BLOCK)
    assert ours.context_cudagraph_manager.dispatch(5, 5 * BLOCK, BLOCK, max_query_len=None) == (5, 5, 1)
    block, context = ours.captured
    assert block == (ours.query_cudagraph_manager, "metadata", 2 * (1 + BLOCK))
    assert context == (ours.context_cudagraph_manager, None, 2)  # one row of each request, no padding to k drafts
    ours.rounds = Asked(False, True, False)
    ours.draft_tokens[:] = 7
    query = ours.query_cudagraph_manager
    assert ours.propose(batch()).tolist() == [[-1, -1]] * 3
    assert ours.ran == [("context", ours.context_cudagraph_manager, None)]
    assert ours.propose(batch()).tolist() == [[7, 7]] * 3
    assert ours.ran[1:] == [("block", query, "metadata")]
    assert ours.propose(batch(grammar=True), num_speculative_tokens=1).tolist() == [[7, 7]] * 3
    assert ours.rounds.most == 1
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


# -- which stage drafts --


def drafted(kind: HeadKind, ids: Tensor, hidden: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    ours = speculator(Draft(kind, ids=ids), **options)
    ours.sample_idx_mapping[:] = torch.tensor([4, 1, 0, 2, -1, -1]).repeat_interleave(BLOCK)
    if options.get("sequential_stage") == "eager":
        ours.sample_idx_mapping[-2 * BLOCK :] = 5  # our stand-in for vLLM's sampler knows no padding
    ours._sample_sequential(REQUESTS, rows(hidden))
    q = None if ours.draft_logits is None else (ours.draft_logits / ours.temperature.clamp_min(1e-5)[:, None, None]).softmax(-1)
    return ours.draft_tokens[:4], ours.draft_token_confidence_probs[:4], q


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under heads/test_kernels.py, interpreted")
@pytest.mark.parametrize(
    ("ids", "probabilistic", "candidates"),
    [(EVERY, False, None), (SOME, True, None), (SOME, False, 9), (EVERY, True, 9)],
    ids=["full greedy", "reduced sampled", "reduced greedy candidates", "full sampled candidates"],
)
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_the_fused_stage_drafts_what_the_torch_stage_drafts(kind, ids, probabilistic, candidates) -> None:
    """Token for token, with the same q told to verification; padded rows are left alone."""
    hidden = torch.randn(REQUESTS, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(4)) * 3
    eager, fused = (
        drafted(kind, ids, hidden, sequential_stage=stage, probabilistic=probabilistic, candidates=candidates)
        for stage in ("eager", "fused")
    )
    assert torch.equal(fused[0], eager[0])
    assert fused[0].unique().numel() > 3
    torch.testing.assert_close(fused[1], eager[1], atol=1e-6, rtol=1e-5)
    if probabilistic:
        assert fused[2] is not None
        assert eager[2] is not None
        hot = [4, 1, 2]  # request slots in the batch that are not greedy
        torch.testing.assert_close(fused[2][hot], eager[2][hot], atol=1e-6, rtol=1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under heads/test_kernels.py, interpreted")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_fused_stage_keeps_a_bad_request_to_itself(bad: float) -> None:
    hidden = torch.randn(REQUESTS, BLOCK, HIDDEN, generator=torch.Generator().manual_seed(4))
    options = {"sequential_stage": "fused", "probabilistic": True}
    good = drafted("rnn", SOME, hidden, **options)
    hidden[2, 3, 1] = bad
    found = drafted("rnn", SOME, hidden, **options)
    assert torch.equal(found[0][[0, 1, 3]], good[0][[0, 1, 3]])
    assert set(found[0].flatten().tolist()) <= set(SOME.tolist())
    assert (found[1] > 0).all(1).tolist() == [True, True, False, True]
    assert not found[1][2].any()
    assert found[2] is not None
    assert bool(found[2][[4, 1, 2]].isfinite().all())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_acceptance_estimator": True}, "acceptance estimator"),
        ({"draft_watermarker": object()}, "watermarking"),
        ({"use_fp64_gumbel": True}, "use_fp64_gumbel"),
    ],
)
def test_what_only_vllms_sampler_does_is_an_obstacle(more: dict[str, Any], reason: str) -> None:
    ours = speculator(Draft("vanilla"))
    assert ours._why_vllm_draws() is None
    vars(ours).update(more)
    found = ours._why_vllm_draws()
    assert found is not None
    assert reason in found


def test_the_options_reach_the_stage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vllm.dspark")
    ours = speculator(Draft("gated", ids=SOME), w2_format="int8", candidates=9, listed_candidates=4, probabilistic=True)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sequential stage")]
    assert line == (
        "sequential stage: eager torch, because there is no Triton target for cpu tensors; "
        "gated head of rank 4, W2 int8, 9 + 4 candidates"
    )
    assert any("the bundled pair's gated head accepts" in record.getMessage() for record in caplog.records)
    assert bool(ours.draft_logits.isneginf().all())


def test_an_lm_head_stays_where_the_kernels_do_not_run(caplog: pytest.LogCaptureFixture) -> None:
    draft = Draft("vanilla")
    speculator(draft, draft_lm_head="fp8")
    assert draft.quantised_head is None
    assert "the draft LM head stays as it is, because there is no Triton target for cpu tensors" in caplog.text
