"""What the kernels keep between launches, allocated once for the largest batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_dspark.heads.kernels.launch import MAX_PARTS
from vllm_dspark.heads.weights import HeadWeights

Arguments = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # of a launch: grid, arguments, options


@dataclass(frozen=True)
class Buffers:
    """Scratch of one stage; contents mean something within a round only, but for ``broken``.

    Attributes:
        partials: packed maxima of the even and the odd slots, ``[2, B * MAX_PARTS]`` int64.
        codes: ``[B, r]`` float32. states: of an rnn head, before and after a step, ``[2, B, r]`` float32.
        projected: the hidden-state part of gated and rnn heads, ``[B, K, r or 3r]`` float32.
        hidden_confidences: w_h h + b, ``[B, K]`` float32. previous: x_{k-1}, ``[B]`` int64.
        broken: ``[B]`` int32.
    """

    partials: Tensor
    codes: Tensor | None
    states: Tensor | tuple[None, None]
    projected: Tensor | None
    hidden_confidences: Tensor
    previous: Tensor
    broken: Tensor


def allocate(weights: HeadWeights, max_batch: int, slots: int, device: torch.device) -> Buffers:
    """Buffers for up to ``max_batch`` requests of ``slots`` slots."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Buffers(
        partials=empty(2, max_batch * MAX_PARTS, dtype=torch.int64),
        codes=empty(max_batch, weights.rank) if weights.rank else None,
        states=empty(2, max_batch, weights.rank) if weights.kind == "rnn" else (None, None),
        projected=None if weights.outer is None else empty(max_batch, slots, weights.outer.shape[0]),
        hidden_confidences=empty(max_batch, slots),
        previous=empty(max_batch, dtype=torch.int64),
        broken=empty(max_batch, dtype=torch.int32),
    )


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides of all dimensions but the last of a tensor, two for an absent or a small one."""
    if tensor is None:
        return (0, 0)
    return (tensor.stride() if tensor.dim() < 3 else tensor.stride()[:-1])[:2]
