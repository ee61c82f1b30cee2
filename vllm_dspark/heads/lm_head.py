"""The draft LM head in eight bits, opt-in: the largest single read of a draft pass, at half its bytes.

U = cap(h W^T) * scale with W as e4m3 or int8 rows and one scale each; activations stay as they are. Only the draft's logits
change, and verification is told the distribution made from them, so generation is not affected.
"""

import logging

import torch
from torch import Tensor

from vllm_dspark.heads.formats import WeightFormat, report, store

logger = logging.getLogger("vllm.dspark")


class QuantisedHead:
    """Base logits of a draft pass into a buffer of its own.

    Args:
        weight: the LM head, ``[V_draft, d]``; not kept. max_rows: rows of the largest pass, requests times slots.
        dtype: of the logits. soft_cap, scale: as vLLM's LogitsProcessor applies them.

    Raises:
        ValueError: the format is unknown, or the weights are not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        max_rows: int,
        dtype: torch.dtype,
        format: WeightFormat = "fp8",
        soft_cap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        self.stored = store(weight, format)
        self.soft_cap, self.scale = soft_cap or 0.0, scale
        self.logits = torch.zeros(max_rows, weight.shape[0], dtype=dtype, device=weight.device)
        logger.info(report("draft LM head", weight, self.stored))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[M, V_draft]`` of ``hidden`` ``[M, d]``; they are overwritten by the next call."""
        from vllm_dspark.heads.kernels.linear import linear

        out = self.logits[: hidden.shape[0]]
        linear(hidden, self.stored, out, None, self.soft_cap, self.scale)
        return out
