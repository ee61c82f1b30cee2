"""The heads' tensors as an implementation of the sequential stage wants them: prepared once, at load."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dspark.heads.formats import Stored, acceptance, report, store
from vllm_dspark.heads.modules import ConfidenceHead, HeadKind, MarkovHead
from vllm_dspark.kinds import WeightFormat

logger = logging.getLogger("vllm.dspark")


@dataclass(frozen=True)
class HeadWeights:
    """What the kernels read. V target ids, V_draft draft ids, r rank, d hidden size.

    Attributes:
        kind: "none" for a drafter of rank 0; then w1, w2 are None and the bias is 0.
        w1: ``[V, r]``. w2: ``[V_draft, r]`` in its format, with row scales where it is quantised.
        inner: the part of gate_proj ``[r, r]`` or joint_proj ``[3r, 2r]`` (columns: state, embedding) inside the loop.
        outer: its hidden-state part, ``[r or 3r, d]``, and outer_bias ``[r or 3r]``: one GEMM before the loop.
        confidence: w_h ``[d]`` and b ``[1]``, float32, or None without a confidence head.
        confidence_table: W1 w_e, ``[V]`` float32, or None where the confidence reads hidden states alone.
        target_ids: the target id of each draft id, ``[V_draft]`` int64, or None where they are the same.
        soft_cap (0: none), scale: of the bias, see :class:`MarkovHead`.
    """

    kind: HeadKind
    rank: int
    dtype: torch.dtype
    w1: Tensor | None
    w2: Stored | None
    inner: Tensor | None
    outer: Tensor | None
    outer_bias: Tensor | None
    confidence: tuple[Tensor, Tensor] | None
    confidence_table: Tensor | None
    target_ids: Tensor | None
    soft_cap: float
    scale: float


@torch.no_grad()
def prepare(
    markov: MarkovHead | None,
    confidence: ConfidenceHead | None,
    target_ids: Tensor | None = None,
    w2_format: WeightFormat = "native",
) -> HeadWeights:
    """Split, fold and quantise the modules' parameters; one line in the log says what a quantised W2 is off by.

    Nothing of W1 and W2 is copied in the native format.

    Raises:
        ValueError: the format is unknown, or W2 cannot be quantised.
    """
    kind: HeadKind = "none" if markov is None else markov.kind
    w1 = w2 = inner = outer = outer_bias = table = None
    rank, dtype = 0, torch.float32
    if markov is not None:
        rank, w1 = markov.rank, markov.markov_w1.weight.detach()
        dtype = w1.dtype
        w2 = store(markov.markov_w2.weight.detach(), w2_format)
        if w2_format != "native":
            logger.info("%s; %s", report("markov_w2", markov.markov_w2.weight.detach(), w2), acceptance(markov.kind, w2_format))
    if markov is not None and kind != "vanilla":
        projection, split = (markov.gate_proj, -rank) if kind == "gated" else (markov.joint_proj, 2 * rank)
        first, second = projection.weight.detach().tensor_split([split], dim=1)
        inner, outer = (second, first) if kind == "gated" else (first, second)
        inner, outer, outer_bias = inner.contiguous(), outer.contiguous(), projection.bias.detach()
    head = None
    if confidence is not None:
        weight = confidence.proj.weight.detach().float()[0]
        size = weight.shape[0] - (rank if confidence.with_markov and markov is not None else 0)
        head = (weight[:size].contiguous(), confidence.proj.bias.detach().float())
        if size < weight.shape[0]:
            assert w1 is not None
            table = torch.cat([rows.float() @ weight[size:] for rows in torch.split(w1, 1 << 16)])
    return HeadWeights(
        kind, rank, dtype, w1, w2, inner, outer, outer_bias, head, table,
        None if target_ids is None else target_ids.long().contiguous(),
        0.0 if markov is None else markov.soft_cap, 1.0 if markov is None else markov.scale,
    )  # fmt: skip
