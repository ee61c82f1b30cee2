"""How W2 is kept: as it came, or eight bits a weight with one float32 scale a row.

    int8:  scale_v = max_j |w_vj| / 127,  q = round(w / scale)
    fp8:   scale_v = max_j |w_vj| / 448,  q = e4m3(w / scale)

W2 is read once a step, so its bytes are the step's time at small batches. Verification is told the q that was sampled
from, made with these weights: the format can change how many drafts are accepted, never what is generated.

Four bits are not offered. Simulated on the bundled pair (symmetric, a scale for every 32 or 16 columns, 7 % off), accepted
lengths change by -1.0, -0.7, -1.6 % or +0.7, +0.1, +0.4 % (vanilla, gated, rnn): within what 240 rounds resolve, and with the
smaller groups 5 bits a weight. Tensor cores would need them widened, which is what takes the time once bytes do not.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from vllm_dspark.kinds import WeightFormat

WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
FP8_SHIFT = 256.0
ACCEPTED = {
    "vanilla": {"native": 3.204, "int8": 3.204, "fp8": 3.204},
    "gated": {"native": 3.095, "int8": 3.095, "fp8": 3.095},
    "rnn": {"native": 2.781, "int8": 2.781, "fp8": 2.771},
}
"""Accepted length of the bundled pair by head and format of W2, greedy; ``test_format_acceptance.py`` measures it."""
ROWS = 1 << 14  # quantised at a time, so that a large matrix needs little more memory than its result


@dataclass(frozen=True)
class Stored:
    """A matrix ``[rows, columns]`` in a format.

    ``scale`` is ``[rows]`` float32, None for native. fp8 values are e4m3 where the device converts it; elsewhere they are
    its bytes, of which ``kernels.common.dequantise`` makes values times 2^-8, so their scales are times 2^8.
    """

    values: Tensor
    scale: Tensor | None
    format: WeightFormat

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the kernels multiply with."""
        if self.scale is None:
            return self.values.to(dtype)
        if self.values.dtype == torch.uint8:
            return (self.values.view(torch.float8_e4m3fn).float() * (self.scale[:, None] / FP8_SHIFT)).to(dtype)
        return (self.values.float() * self.scale[:, None]).to(dtype)


def store(weight: Tensor, format: WeightFormat) -> Stored:
    """Quantise ``weight`` ``[rows, columns]``.

    Raises:
        ValueError: an unknown format, or weights that are not finite.
    """
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"weight format {format!r}; expected one of {', '.join(WEIGHT_FORMATS)}")
    if format == "native":
        return Stored(weight.contiguous(), None, format)
    shift = 1.0 if format == "int8" or converts_e4m3(weight.device) else FP8_SHIFT
    kept = torch.int8 if format == "int8" else torch.float8_e4m3fn
    values = torch.empty(weight.shape, dtype=kept, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = weight[start : start + ROWS].float()
        largest = rows.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(f"rows {start}..{start + len(rows) - 1} hold values that are not finite and cannot be quantised")
        step = torch.where(largest > 0, largest, 1.0) / _LARGEST[format]
        scaled = rows / step[:, None]
        values[start : start + ROWS] = scaled.round().to(kept) if format == "int8" else scaled.to(kept)
        scale[start : start + ROWS] = step * shift
    return Stored(values if shift == 1.0 else values.view(torch.uint8), scale, format)


def converts_e4m3(device: torch.device) -> bool:
    """Whether the device has instructions for e4m3 as torch and Triton know it: NVIDIA's, from sm_89 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def report(name: str, weight: Tensor, stored: Stored) -> str:
    """One line: the sizes, and the relative error over the matrix and of the worst row."""
    error = torch.zeros(weight.shape[0], dtype=torch.float64)
    norm = torch.zeros_like(error)
    for start in range(0, weight.shape[0], ROWS):
        part = slice(start, start + ROWS)
        scale = None if stored.scale is None else stored.scale[part]
        kept = Stored(stored.values[part], scale, stored.format).dequantise()
        error[part] = (weight[part].float() - kept).double().square().sum(1).cpu()
        norm[part] = weight[part].double().square().sum(1).cpu()
    worst = (error / norm.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().max()
    whole = (error.sum() / norm.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return (
        f"{name} as {stored.format}: {weight.nbytes / 1e6:.1f} MB -> {stored.nbytes / 1e6:.1f} MB, "
        f"relative error {whole:.2%}, worst row {worst:.2%}"
    )


def acceptance(kind: str, format: WeightFormat) -> str:
    """One clause: what W2 in ``format`` did to the accepted length of the bundled pair's head of that kind."""
    lengths = ACCEPTED[kind]
    return (
        f"the bundled pair's {kind} head accepts {lengths[format]:.3f} tokens a round with it, {lengths['native']:.3f} without"
    )
