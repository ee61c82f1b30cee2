"""Reads what a safetensors file holds without reading the weights.

A file is an 8-byte little-endian length n, n bytes of JSON (name → dtype, shape, data_offsets), then the data. That
is enough to tell a truncated download from a whole one, so it is checked here, before anything expensive starts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vllm_dspark.checkpoint.errors import ConfigError, CorruptWeightsError
from vllm_dspark.checkpoint.spec import TensorInfo

# The safetensors library refuses longer headers, so a longer one is garbage and not worth reading.
MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


def read_json(path: Path, wanted: str, error: type[ConfigError] | type[CorruptWeightsError]) -> dict[str, Any]:
    """The JSON object in `path`; `wanted` says what the file should be, `error` is raised when it is not that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise error(f"{path} is not valid JSON ({fault}); wanted {wanted}. Download or copy the file again.") from fault
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; wanted {wanted}, a JSON object.")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name → `TensorInfo` of the tensors in one safetensors file; raises `CorruptWeightsError`.

    Reads the header only, and compares its promises with the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix.startswith(b"version "):
            raise CorruptWeightsError(
                f"{path} is a Git LFS pointer of {size} bytes, not the weights. Run `git lfs pull` in the clone."
            )
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            raise CorruptWeightsError(
                f"{path} has {size} bytes but its first 8 announce a header of {length} bytes: the file is truncated "
                "or not safetensors. Download it again."
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors, end = _read_entries(entries)
    except (UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise CorruptWeightsError(f"{path} has an unreadable safetensors header ({fault}). Download it again.") from fault
    if 8 + length + end != size:
        raise CorruptWeightsError(
            f"{path} has {size} bytes but its tensors end at byte {8 + length + end}: the download is "
            f"{'truncated' if size < 8 + length + end else 'damaged'}. Download it again."
        )
    return tensors


def _read_entries(entries: dict[str, Any]) -> tuple[dict[str, TensorInfo], int]:
    """The tensors a header lists and where its data ends; raises ValueError, TypeError or KeyError."""
    tensors, end = {}, 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape, dtype = tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
        start, stop = (int(n) for n in entry["data_offsets"])
        expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else stop - start
        if stop - start != expected:
            raise ValueError(f"{name} of shape {list(shape)} and dtype {dtype} takes {expected} bytes, not {stop - start}")
        tensors[name] = TensorInfo(shape, dtype)
        end = max(end, stop)
    return tensors, end


def read_index(path: Path) -> tuple[str, ...]:
    """The shard file names in a model.safetensors.index.json; raises `CorruptWeightsError`."""
    index = read_json(path, "a safetensors index", CorruptWeightsError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptWeightsError(
            f"{path} has no usable 'weight_map' (found {type(weight_map).__name__}; wanted tensor name → file name). "
            "Download it again."
        )
    return tuple(sorted(set(weight_map.values())))
