"""Models on a CPU, with less around their products.

A drafter is small, so that what surrounds its products decides what a draft takes. vLLM's DFlash backbone projects the context
with torch's product, which for float32 on some processors takes twice as long as the oneDNN product of all other layers. And
its CPU models normalise with seven torch operations, where nothing compiles them. Its own C kernels and oneDNN do it here; only
drafts change by that, by rounding.

Attention is entered through torch's dispatcher twice in every layer, which is there for the compiler. Without one the same
functions are called at once, the target's as well: no number changes by that.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm._custom_ops import create_onednn_mm, fused_add_rms_norm, onednn_mm, rms_norm
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm

_SIZES = 32  # sizes of a product that are kept prepared


def quicken(target: nn.Module, draft: nn.Module, compiled: bool) -> None:
    """Have loaded models run so; what is compiled is left to the compiler."""
    backbone: Any = draft.model
    if getattr(backbone, "_fused_kv_weight", None) is not None and has_onednn():
        backbone._project_context_kv = ContextProjection(backbone)
    if compiled:
        return
    for module in (*target.modules(), *draft.modules()):
        if isinstance(module, Attention):
            module.use_direct_call = True
    for module in draft.modules():
        if type(module) is RMSNorm and module.pass_weight and module.variance_size_override is None:
            module._forward_method = functools.partial(norm, module)


def has_onednn() -> bool:
    """Whether this vLLM has oneDNN's products."""
    return hasattr(torch.ops._C, "create_onednn_mm_handler")


def norm(module: RMSNorm, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm of ``x`` ``[..., d]``; with a residual, of their sum, which is returned as well. Both are overwritten then."""
    weight = module.weight.data
    if x.dtype != weight.dtype:
        return module.forward_native(x, residual)
    if residual is not None:
        fused_add_rms_norm(x, residual, weight, module.variance_epsilon)
        return x, residual
    x = x.contiguous()
    normed = torch.empty_like(x)
    rms_norm(normed, x, weight, module.variance_epsilon)
    return normed


class ContextProjection:
    """Context states to K and V of all draft layers; in place of ``DFlashQwen3Model._project_context_kv``."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._prepared: tuple[Tensor, Any] | None = None  # the weight, and the product with it

    def __call__(self, states: Tensor, tokens: int, layers: int, heads: int, size: int) -> tuple[Tensor, Tensor]:
        """K and V, ``[layers, tokens, heads, size]`` each, of states ``[tokens, d]``."""
        backbone = self._backbone
        normed = torch.empty_like(states)
        rms_norm(normed, states, backbone._hidden_norm_weight, backbone._rms_norm_eps)
        both = self._product(normed, backbone._fused_kv_weight).view(tokens, layers, 2, heads, size)
        keys, values = both.permute(2, 1, 0, 3, 4).contiguous()
        return keys, values

    def _product(self, states: Tensor, weight: Tensor) -> Tensor:
        bias = self._backbone._fused_kv_bias
        if self._prepared is None or self._prepared[0] is not weight:  # loaded, or loaded anew
            self._prepared = weight, _prepare(weight)
        if self._prepared[1] is None:
            return F.linear(states, weight, bias)
        product: Tensor = onednn_mm(self._prepared[1], states, bias)
        return product


def _prepare(weight: Tensor) -> Any:
    """oneDNN's product with a weight ``[out, in]``; None where it has none, and vLLM's layers do without as well."""
    try:
        return create_onednn_mm(weight.t(), _SIZES)
    except RuntimeError:
        return None
