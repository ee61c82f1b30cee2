"""W2's eight-bit formats: how far off, and that what is reported is what is kept."""

import pytest
import torch

from vllm_dspark.heads import formats
from vllm_dspark.heads.formats import WEIGHT_FORMATS, report, store

EIGHT_BITS = pytest.mark.parametrize("format", WEIGHT_FORMATS[1:])


def weight(rows: int = 300, columns: int = 32) -> torch.Tensor:
    """Rows of very different magnitude, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-4, 3, rows)[:, None]
    matrix = torch.randn(rows, columns, generator=generator) * scale
    matrix[7] = 0
    return matrix.bfloat16()


def test_native_keeps_the_very_tensor():
    matrix = weight()
    stored = store(matrix, "native")
    assert stored.values.data_ptr() == matrix.data_ptr()
    assert stored.scale is None
    assert torch.equal(stored.dequantise(torch.bfloat16), matrix)


@pytest.mark.parametrize(("format", "step"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_errors_are_within_half_a_step(format, step):
    """int8: half a step of the row's largest weight. fp8: half a unit in the last of four bits, or of the least subnormal."""
    matrix = weight().float()
    error = (store(weight(), format).dequantise() - matrix).abs()
    largest = matrix.abs().amax(1, keepdim=True)
    bound = largest * step if format == "int8" else torch.maximum(matrix.abs() * step, largest / 448 * 2**-10)
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert bool((error > bound * 0.9).any()), "the bound is not tight"


@EIGHT_BITS
def test_a_row_of_zeros_stays_zero(format):
    assert bool((store(weight(), format).dequantise()[7] == 0).all())


@EIGHT_BITS
def test_rows_are_quantised_alone_whatever_the_piece(format, monkeypatch):
    whole = store(weight(), format)
    monkeypatch.setattr(formats, "ROWS", 37)
    pieces = store(weight(), format)
    assert torch.equal(whole.values, pieces.values)
    assert torch.equal(whole.scale, pieces.scale)


@EIGHT_BITS
def test_half_the_bytes_of_bfloat16_and_a_scale_a_row(format):
    matrix = weight()
    assert store(matrix, format).nbytes == matrix.nbytes // 2 + 4 * 300


@EIGHT_BITS
def test_the_report_is_one_line_with_the_measured_error(format):
    matrix = weight()
    stored = store(matrix, format)
    line = report("markov_w2", matrix, stored)
    error = (stored.dequantise() - matrix.float()).norm() / matrix.float().norm()
    assert "\n" not in line
    assert f"markov_w2 as {format}" in line
    assert f"relative error {error:.2%}" in line


@EIGHT_BITS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(format, value):
    matrix = weight()
    matrix[210, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        store(matrix, format)


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'int4'; expected one of native, int8, fp8"):
        store(weight(), "int4")
