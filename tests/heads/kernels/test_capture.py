"""A round can be captured in a CUDA graph: fixed buffers, no allocation, no synchronisation, no look at device data."""

import pytest
import torch
from parity import DEVICE, KernelCase, build, check, run
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.kernels import advance, candidates, confidence, linear, step, top
from vllm_dspark.heads.kernels.stage import FusedStage
from vllm_dspark.heads.stage import Draws, Round

VIEWS = {"select", "slice", "view", "_unsafe_view", "as_strided", "unsqueeze", "detach", "alias", "t", "transpose"}
IN_PLACE = {"zero_"}
KERNELS = (
    (step, "step_kernel"), (advance, "advance_kernel"), (candidates, "candidate_kernel"), (candidates, "wipe_kernel"),
    (confidence, "_confidence_kernel"), (linear, "linear_kernel"), (top, "pool_kernel"), (top, "choose_kernel"),
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """The torch operations of a block, and launches of kernels, in place of which nothing happens."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str):
        recorder = self

        class Launch:
            def __getitem__(self, grid):
                return lambda *args, **options: recorder.launches.append(name)

        return Launch()


def a_round(case: KernelCase, processed: bool = True) -> Round:
    b, k, v = case.logits.shape
    draws = Draws(
        torch.ones(b, device=DEVICE), torch.zeros(b, dtype=torch.long, device=DEVICE),
        torch.ones(b, k, dtype=torch.long, device=DEVICE), None,
        torch.full((b, k, v), -torch.inf, device=DEVICE) if processed else None,
    )  # fmt: skip
    tokens = torch.zeros(b, k, dtype=torch.long, device=DEVICE)
    return Round(
        case.hidden.to(DEVICE), case.logits.to(DEVICE), case.anchors.to(DEVICE), tokens, torch.zeros(b, k, device=DEVICE),
        torch.arange(b, device=DEVICE), draws,
    )  # fmt: skip


@pytest.mark.parametrize("few", [False, True], ids=["all ids", "candidates"])
@pytest.mark.parametrize(
    ("kind", "batch", "launches"), [("vanilla", 3, 4), ("vanilla", 20, 7), ("gated", 1, 7), ("rnn", 20, 7)]
)
def test_a_round_only_launches(kind, batch, launches, few, monkeypatch):
    """No torch operation but views and in-place ones; as many launches as promised."""
    case = KernelCase(kind, batch=batch, slots=3, vocab=64, rank=16)
    stage = FusedStage(case.weights, batch, 3, DEVICE, Candidates(16) if few else None)
    round = a_round(case)
    recorder = Recorder()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recorder.kernel(name))
    with recorder:
        stage.draft(round)
    assert recorder.operations <= VIEWS | IN_PLACE, recorder.operations
    in_loop = [name for name in recorder.launches if name in ("step_kernel", "advance_kernel", "candidate_kernel")]
    assert len(in_loop) == (4 if few and kind == "vanilla" else launches)
    before = ["_confidence_kernel"] + ["linear_kernel"] * (kind != "vanilla")
    before += ["wipe_kernel", "pool_kernel", "choose_kernel"] * few
    assert sorted(name for name in recorder.launches if name not in in_loop) == sorted(before)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_captured_round_drafts_what_an_eager_one_does(kind):
    case = KernelCase(kind, torch.bfloat16, 7, slots=3, vocab=1024, rank=64)
    stage = build(case)
    check(case, run(case, stage), tie=1e-2, error=1e-3)
    round = a_round(case)
    stage.draft(round)
    expected = round.tokens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stage.draft(round)
    round.tokens.fill_(-1)
    graph.replay()
    assert torch.equal(round.tokens, expected)
