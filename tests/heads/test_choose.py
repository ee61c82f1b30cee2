"""Which implementation is built, and that the log says which and why in one line."""

import logging
import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from vllm_dspark.heads import choose
from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.modules import ConfidenceHead, MarkovHead
from vllm_dspark.heads.stage import Draws, EagerStage, Round
from vllm_dspark.heads.weights import prepare

CPU = torch.device("cpu")


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return prepare(MarkovHead("vanilla", 31, 31, 4, 8).requires_grad_(False), None, w2_format="int8")


@pytest.fixture
def said(caplog):
    """The lines logged so far."""
    caplog.set_level(logging.INFO, logger="vllm.dspark")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_cpu_gets_the_eager_stage_and_one_line_with_the_reason(weights, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    stage = choose.build_stage(weights, 4, 3, CPU)
    assert isinstance(stage, EagerStage)
    assert said() == [
        "sequential stage: eager torch, because there is no Triton target for cpu tensors; vanilla head of rank 4, W2 int8"
    ]


def test_candidates_are_in_the_line(weights, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose.build_stage(weights, 4, 3, CPU, Candidates(8))
    assert said()[0].endswith("W2 int8, 8 + 0 candidates")


def test_without_triton_it_says_so(weights, monkeypatch):
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert choose.why_no_kernels(CPU) == "Triton is not installed"


def test_what_cannot_run_is_refused_when_it_is_asked_for(weights, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run: there is no Triton target for cpu tensors"):
        choose.build_stage(weights, 4, 3, CPU, implementation="fused")
    with pytest.raises(ValueError, match="'fast'; expected one of auto, fused, compiled, eager"):
        choose.build_stage(weights, 4, 3, CPU, implementation="fast")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler here")
def test_the_compiled_stage_drafts_what_the_eager_one_does(said):
    """For any batch, without compiling once a slot or a size; greedy and sampled rows."""
    torch.manual_seed(0)
    weights = prepare(MarkovHead("rnn", 31, 31, 4, 8).requires_grad_(False), ConfidenceHead(8, 4, True).requires_grad_(False))
    torch._dynamo.reset()
    counters.clear()
    rounds: list[list[torch.Tensor]] = [[], []]
    for found, implementation in zip(rounds, ("eager", "compiled"), strict=True):
        stage = choose.build_stage(weights, 8, 3, CPU, implementation=implementation)
        for batch in (2, 5, 7, 1):
            random = partial(torch.randn, generator=torch.Generator().manual_seed(batch))
            tokens, confidences = torch.full((batch, 3), -1), torch.zeros(batch, 3)
            draws = Draws((torch.arange(batch) % 2).float(), torch.arange(batch), torch.arange(batch * 3).view(batch, 3) + 1)
            hidden, logits = random(batch, 3, 8), random(batch, 3, 31)
            stage.draft(Round(hidden, logits, torch.arange(batch), tokens, confidences, draws=draws))
            found += [tokens, confidences]
    assert said()[1].startswith("sequential stage: torch.compile, because sequential_stage='compiled'; rnn head of rank 4")
    for eager, compiled in zip(*rounds, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "one graph for any batch, one for a batch of one"


def test_a_rank_beyond_the_kernels_is_a_reason():
    assert choose.why_no_kernels(CPU, 600) == "the head's rank is 600; the kernels go to 512"


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_what_is_built_drafts(weights, implementation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    stage = choose.build_stage(weights, 2, 3, CPU, implementation=implementation)
    tokens = torch.full((2, 3), -1)
    draws = Draws(torch.tensor([0.0, 1.0]), torch.tensor([1, 2]), torch.arange(6).view(2, 3) + 1)
    stage.draft(Round(None, torch.randn(2, 3, 31), torch.tensor([3, 4]), tokens, draws=draws))
    assert bool(((tokens >= 0) & (tokens < 31)).all())
