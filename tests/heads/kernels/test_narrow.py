"""Codes in the types of eight-bit weights: exact to float32 for rows of any magnitude."""

import pytest
import torch
import triton
import triton.language as tl
from parity import DEVICE

from vllm_dspark.heads.kernels.narrow import digit_product, digits, half_product, halves

ROWS, IDS, RANK = 16, 32, 64


@triton.jit
def _multiply(code, w, out, HALF: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    r = tl.arange(0, R)
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(code + m[:, None] * R + r[None, :])
    tile = tl.load(w + n[:, None] * R + r[None, :])
    if HALF:
        a, b, unit = halves(x)
        found = half_product(a, b, unit, tile, SPLIT)
    else:
        a, b, c, unit = digits(x)
        found = digit_product(a, b, c, unit, tile)
    tl.store(out + m[:, None] * N + n[None, :], found)


def multiplied(code: torch.Tensor, w: torch.Tensor, split: bool) -> torch.Tensor:
    out = torch.full((ROWS, IDS), float("nan"), device=DEVICE)
    half = w.dtype != torch.int8
    _multiply[(1,)](code.to(DEVICE), w.to(DEVICE), out, HALF=half, SPLIT=split, M=ROWS, N=IDS, R=RANK)
    return out.cpu().double()


@pytest.mark.parametrize("w", ["int8", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_products_are_exact_for_rows_of_any_magnitude(dtype, w):
    """Errors are a part of the row's largest value; halves of a bfloat16 code need no second one."""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.logspace(-30, 30, ROWS)[:, None]
    code = (torch.randn(ROWS, RANK, generator=generator) * magnitude).to(dtype)
    code[3] = 0
    code[5, 7] *= 1e4  # one value far above its row
    weights = torch.randint(-127, 128, (IDS, RANK), generator=generator)
    found = multiplied(code, weights.to(torch.int8 if w == "int8" else torch.float16), split=dtype == torch.float32)
    expected = code.double() @ weights.double().T
    size = code.double().abs().amax(1)[:, None] * weights.double().abs().sum(1)
    size[3] = 1
    assert bool((found[3] == 0).all())
    assert ((found - expected).abs() / size).max() < 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("w", [torch.int8, torch.float16])
def test_a_code_that_is_no_number_spoils_its_row_alone(w, value):
    code = torch.randn(ROWS, RANK, generator=torch.Generator().manual_seed(0))
    code[4, 9] = value
    found = multiplied(code, torch.ones(IDS, RANK, dtype=w), split=True)
    assert bool((~found[4].isfinite()).all())
    assert bool(found[torch.arange(ROWS) != 4].isfinite().all())
