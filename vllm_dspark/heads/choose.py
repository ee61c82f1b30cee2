"""Which implementation of the sequential stage runs here, and why: one place, one line in the log."""

import importlib.util
import logging
import os
from typing import get_args

import torch

from vllm_dspark.heads.candidates import Candidates
from vllm_dspark.heads.stage import EagerStage, Stage
from vllm_dspark.heads.weights import HeadWeights
from vllm_dspark.kinds import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

logger = logging.getLogger("vllm.dspark")


def why_no_kernels(device: torch.device, rank: int = 0, interpreted: bool = False) -> str | None:
    """The first reason why the Triton kernels cannot run here (in NumPy, if ``interpreted``), or None.

    Args:
        rank: r of the correction head, 0 for none.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from vllm_dspark.heads.kernels.launch import unsupported

    return unsupported(device, rank, interpreted)


def build_stage(
    weights: HeadWeights,
    max_batch: int,
    slots: int,
    device: torch.device,
    candidates: Candidates | None = None,
    implementation: Implementation = "auto",
    obstacle: str | None = None,
) -> Stage:
    """The stage for rounds of up to ``max_batch`` rows (and request slots) of ``slots`` slots, buffers allocated.

    "auto" takes the fused kernels where they run, else torch.compile on a GPU and eager torch on a CPU. Interpreted kernels
    (``TRITON_INTERPRET=1``) are for tests: only "fused" takes them. One line in the log says which it is and why.

    Args:
        obstacle: why the caller cannot do with the fused kernels, or None if it can.

    Raises:
        ValueError: an unknown implementation, or "fused" where it cannot run (with the reason).
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    interpreted = implementation == "fused" and os.environ.get("TRITON_INTERPRET") == "1"
    reason = obstacle or why_no_kernels(device, weights.rank, interpreted)
    if implementation == "fused" and reason is not None:
        raise ValueError(f"the fused sequential stage cannot run: {reason}")
    head = f"{weights.kind} head" + (f" of rank {weights.rank}, W2 {_format(weights)}" if weights.w2 is not None else "")
    if candidates is not None:
        head += f", {candidates.top} + {candidates.listed} candidates"
    if reason is None and implementation in ("auto", "fused"):
        from vllm_dspark.heads.kernels.stage import FusedStage

        stage = FusedStage(weights, max_batch, slots, device, candidates)
        asked = "they run here" if implementation == "auto" else "sequential_stage='fused'"
        logger.info("sequential stage: fused Triton kernels on %s, because %s; %s", stage.device.arch, asked, head)
        return stage
    compiled = implementation == "compiled" or (implementation == "auto" and device.type == "cuda")
    if implementation != "auto":
        reason = f"sequential_stage={implementation!r}"
    log = logger.warning if implementation == "auto" and device.type == "cuda" else logger.info
    log("sequential stage: %s, because %s; %s", "torch.compile" if compiled else "eager torch", reason, head)
    return EagerStage(weights, max_batch, device, candidates, compiled)


def _format(weights: HeadWeights) -> str:
    assert weights.w2 is not None
    return str(weights.dtype).removeprefix("torch.") if weights.w2.format == "native" else weights.w2.format
