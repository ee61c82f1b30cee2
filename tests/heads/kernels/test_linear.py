"""The product with weights in any format, against float64 on the values the format keeps."""

import itertools

import pytest
import torch
from parity import DEVICE

from vllm_dspark.heads.formats import WEIGHT_FORMATS, Stored, store
from vllm_dspark.heads.kernels.confidence import hidden_confidences
from vllm_dspark.heads.kernels.linear import halved, linear
from vllm_dspark.heads.lm_head import QuantisedHead


def close(found: torch.Tensor, expected: torch.Tensor, error: float = 1e-6) -> None:
    assert bool(found.isfinite().all())
    assert (found.double() - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_float32_out_is_exact_up_to_sums(dtype, format, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 150).to(dtype), torch.randn(37, 150).to(dtype)
    bias = torch.randn(37).to(dtype)
    stored = store(weight.to(DEVICE), format)
    out = torch.full((rows + 2, 37), float("nan"), device=DEVICE)
    linear(x.to(DEVICE), stored, out[:rows], bias.to(DEVICE))
    assert bool(out[rows:].isnan().all())
    kept = stored.dequantise().double().cpu()
    close(out[:rows].cpu(), x.double() @ kept.T + bias.double())
    if format != "native":
        assert (kept - weight.double()).norm() > 1e-3 * weight.double().norm(), "the format changed nothing"


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_quantised_lm_head_caps_and_scales(format):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    head = QuantisedHead(weight.to(DEVICE), torch.bfloat16, format, soft_cap=6.0, scale=0.5)
    raw = hidden.double() @ store(weight, format).dequantise().double().T
    assert raw.abs().max() > 12
    close(head(hidden.to(DEVICE)).cpu(), torch.tanh(raw / 6) * 6 * 0.5, 6e-3)  # Triton's interpreter truncates to bfloat16


def test_activations_of_any_magnitude_fit_halves():
    """Products of halves and units are those of the bfloat16 values; a row that is no number stays none."""
    torch.manual_seed(0)
    x = (torch.randn(9, 150) * torch.logspace(-20, 20, 9)[:, None]).bfloat16()
    x[2], x[4, 7] = 0.0, float("nan")
    stored = store(torch.randn(37, 150).bfloat16().to(DEVICE), "fp8")
    half, unit = halved(x.to(DEVICE))
    out = torch.full((9, 37), float("nan"), device=DEVICE)
    linear(half, stored, out, unit=unit)
    found, expected = out.cpu().double(), x.double() @ stored.dequantise().double().cpu().T
    assert bool((found[2] == 0).all())
    assert bool(found[4].isnan().all())
    for row in (0, 1, 3, 5, 6, 7, 8):
        close(found[row], expected[row])


@pytest.mark.parametrize("converted", [False, True], ids=["from bits", "by the device"])
def test_every_byte_of_e4m3_is_multiplied_as_the_number_it_is(converted):
    """All 254 finite values, subnormals and zeros among them, each times one."""
    bytes_ = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    values = bytes_.view(torch.float8_e4m3fn) if converted else bytes_
    scale = torch.full((254,), 1.0 if converted else 256.0, device=DEVICE)
    stored = Stored(values[:, None].to(DEVICE), scale, "fp8")
    assert torch.equal(stored.dequantise()[:, 0].cpu(), bytes_.view(torch.float8_e4m3fn).float())
    out = torch.full((1, 254), float("nan"), device=DEVICE)
    linear(torch.ones(1, 1, device=DEVICE), stored, out)
    assert torch.equal(out[0].cpu(), bytes_.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("batch", "slots", "size"), [*itertools.product([1, 3], [1, 4], [5, 1100])])
def test_hidden_parts_of_the_confidences(batch, slots, size):
    torch.manual_seed(0)
    hidden = torch.randn(batch, slots + 1, size).bfloat16()[:, 1:]  # strided, as fill-in slots are
    weight, bias = torch.randn(size), torch.randn(1)
    out = torch.full((batch, slots), float("nan"), device=DEVICE)
    hidden_confidences(hidden.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), out)
    close(out.cpu(), hidden.double() @ weight.double() + bias.double())
