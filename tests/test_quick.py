"""Models on a CPU, with less around their products: they compute the same."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

from vllm_dspark.engine import quick

needs_onednn = pytest.mark.skipif(not quick.has_onednn(), reason="this vLLM has no oneDNN, so the projection stays vLLM's")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rms_norm(size: int, dtype: torch.dtype = torch.float32) -> RMSNorm:
    with set_current_vllm_config(VllmConfig()):
        module = RMSNorm(size, dtype=dtype)
    module.weight.data = torch.rand(size, dtype=dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_vllms(dtype: torch.dtype) -> None:
    """Of heads too, which are views of the product that gave q, k and v."""
    module = rms_norm(32, dtype)
    heads = torch.randn(5, 256, dtype=dtype).split([128, 64, 64], dim=-1)[0].view(5, 4, 32)
    torch.testing.assert_close(quick.norm(module, heads), module.forward_native(heads), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    states, residual = torch.randn(2, 5, 32, dtype=dtype)
    wanted = module.forward_native(states.clone(), residual.clone())
    torch.testing.assert_close(quick.norm(module, states, residual), wanted, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_what_the_kernel_does_not_take_is_left_to_vllm() -> None:
    module, states = rms_norm(32), torch.randn(5, 32, dtype=torch.bfloat16)
    assert torch.equal(quick.norm(module, states), module.forward_native(states))


def backbone(dtype: torch.dtype, bias: bool) -> Any:
    """Of two layers with 3 heads of 4 for K and V."""
    return SimpleNamespace(
        _hidden_norm_weight=torch.rand(16, dtype=dtype), _rms_norm_eps=1e-6, _fused_kv_weight=torch.randn(48, 16, dtype=dtype),
        _fused_kv_bias=torch.randn(48, dtype=dtype) if bias else None,
    )  # fmt: skip


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_context_is_projected_as_by_vllm(dtype: torch.dtype, bias: bool) -> None:
    model = backbone(dtype, bias)
    project = quick.ContextProjection(model)
    for tokens in (1, 7, 64):
        states = torch.randn(tokens, 16, dtype=dtype)
        wanted = DFlashQwen3Model._project_context_kv(model, states, tokens, 2, 3, 4)
        for found, each in zip(project(states, tokens, 2, 3, 4), wanted, strict=True):
            assert found.is_contiguous()
            torch.testing.assert_close(found, each, atol=10 * CLOSE[dtype], rtol=10 * CLOSE[dtype])
    model._fused_kv_weight = torch.zeros(48, 16, dtype=dtype)  # weights are loaded anew
    keys: Tensor = project(torch.randn(2, 16, dtype=dtype), 2, 2, 3, 4)[0]
    assert torch.equal(keys, torch.zeros_like(keys) if not bias else keys[:, :1].expand_as(keys))


@needs_onednn
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_is_left_to_the_compiler(compiled: bool) -> None:
    attention: Any = object.__new__(quick.Attention)
    nn.Module.__init__(attention)
    attention.use_direct_call = False
    target, draft = nn.Module(), nn.Module()
    target.norm, target.attention = rms_norm(8), attention
    draft.model = nn.Module()
    draft.model.norm, draft.model._fused_kv_weight = rms_norm(8), torch.zeros(2, 8)
    before = [model.norm._forward_method for model in (target, draft.model)]
    quick.quicken(target, draft, compiled)
    assert attention.use_direct_call is not compiled
    assert target.norm._forward_method == before[0], "the target's numbers must not change"
    assert (draft.model.norm._forward_method == before[1]) is compiled
    assert isinstance(draft.model._project_context_kv, quick.ContextProjection)


def test_where_onednn_refuses_a_product_torchs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(quick, "create_onednn_mm", refuse)
    model, states = backbone(torch.float32, bias=True), torch.randn(5, 16)
    found = quick.ContextProjection(model)(states, 5, 2, 3, 4)
    wanted = DFlashQwen3Model._project_context_kv(model, states, 5, 2, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
