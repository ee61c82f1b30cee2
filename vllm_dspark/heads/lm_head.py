"""The draft LM head in eight bits, opt-in: the largest single read of a draft pass, at half its bytes.

U = cap(h W^T) * scale with W as e4m3 or int8 rows and one scale each; activations stay as they are. Only the draft's logits
change, and verification is told the distribution made from them, so generation is not affected.
"""

import logging

import torch
from torch import Tensor

from vllm_dspark.heads.choose import why_no_kernels
from vllm_dspark.heads.formats import report, store
from vllm_dspark.kinds import WeightFormat

logger = logging.getLogger("vllm.dspark")


def why_not(weight: Tensor, vocab: int) -> str | None:
    """Why the LM head ``[rows, d]`` of a vocabulary of ``vocab`` ids cannot be quantised here, or None."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weights are {weight.dtype} already"
    if weight.shape[0] < vocab:
        return "its rows are spread over several devices"
    return why_no_kernels(weight.device)


class QuantisedHead:
    """Base logits of a draft pass.

    Args:
        weight: the LM head, ``[V_draft, d]``; not kept.
        dtype: of the logits. soft_cap, scale: as vLLM's LogitsProcessor applies them.

    Raises:
        ValueError: the format is unknown, or the weights are not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        format: WeightFormat = "fp8",
        soft_cap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        self.stored = store(weight, format)
        self.soft_cap, self.scale = soft_cap or 0.0, scale
        self.dtype = dtype
        logger.info(report("draft LM head", weight, self.stored))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[M, V_draft]`` of ``hidden`` ``[M, d]``."""
        from vllm_dspark.heads.kernels.linear import halved, linear

        unit = None
        if self.stored.format == "fp8" and hidden.dtype == torch.bfloat16:
            hidden, unit = halved(hidden)
        out = hidden.new_empty(hidden.shape[0], len(self.stored.values), dtype=self.dtype)
        linear(hidden, self.stored, out, None, self.soft_cap, self.scale, unit)
        return out
