"""A drafter in a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_dspark.checkpoint.errors import CheckpointNotFoundError, ConfigError, MissingShardError, NoWeightsError
from vllm_dspark.checkpoint.headers import read_header, read_index, read_json
from vllm_dspark.checkpoint.spec import TensorInfo

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(\.safetensors)")


class FolderSource:
    """Reads config, tensor headers and tokenizer path from a folder."""

    revision: str | None = None
    commit: str | None = None

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointNotFoundError` when `folder` is no folder or has nothing in it."""
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise CheckpointNotFoundError(
                f"{folder} {found}; wanted a folder with {CONFIG} and safetensors weights, or a Hub id 'owner/name'."
            )
        if not any(folder.iterdir()):
            raise CheckpointNotFoundError(f"{folder} is empty; wanted {CONFIG} and safetensors weights in it.")
        self.folder = folder

    def config(self) -> dict[str, Any]:
        """The parsed config.json; raises `ConfigError`."""
        path = self.folder / CONFIG
        if not path.is_file():
            raise ConfigError(f"{self.folder} has no {CONFIG}; wanted the one published with the drafter beside its weights.")
        return read_json(path, "a drafter's config", ConfigError)

    def tensors(self) -> dict[str, TensorInfo]:
        """All stored tensors; raises `NoWeightsError`, `MissingShardError` or `CorruptWeightsError`."""
        tensors: dict[str, TensorInfo] = {}
        for path in self._weight_files():
            tensors.update(read_header(path))
        return tensors

    def tokenizer(self) -> str | None:
        """Path of the drafter's tokenizer.json, if it has one."""
        path = self.folder / TOKENIZER
        return str(path) if path.is_file() else None

    def _weight_files(self) -> list[Path]:
        # The same choice as vLLM's loader: the index when there is one, otherwise every safetensors file.
        index = self.folder / INDEX
        if index.is_file():
            shards = read_index(index)
            self._require(shards, f"named in {INDEX}")
            return [self.folder / shard for shard in shards]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in self.folder.glob(pattern))
            found = f"found {', '.join(others[:3])}, which must be converted first" if others else "found no weights at all"
            raise NoWeightsError(
                f"{self.folder} has no safetensors files ({found}); wanted {SINGLE} or {INDEX} and its shards."
            )
        self._require(_numbered_siblings(files), "promised by the numbering of the others")
        return files

    def _require(self, names: tuple[str, ...], why: str) -> None:
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise MissingShardError(
                f"{self.folder} lacks {len(missing)} of {len(names)} shards {why}: {', '.join(missing[:5])}. "
                "Download the missing files."
            )


def _numbered_siblings(files: list[Path]) -> tuple[str, ...]:
    """All names of the series that `model-00001-of-00003.safetensors` and its like belong to."""
    names: set[str] = set()
    for match in filter(None, (_NUMBERED.fullmatch(path.name) for path in files)):
        stem, number, total, suffix = match.groups()
        names.update(f"{stem}{i:0{len(number)}d}-of-{total}{suffix}" for i in range(1, int(total) + 1))
    return tuple(sorted(names))
