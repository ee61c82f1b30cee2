"""A drafter on the Hugging Face Hub, described without downloading its weights.

config.json (and a shard index, if any) go through huggingface_hub's cache; tensor shapes come from the weight files'
headers, read from the cache when the files are there and with HTTP range requests otherwise. HF_ENDPOINT, HF_TOKEN,
HF_HOME and HF_HUB_OFFLINE act as everywhere else, because huggingface_hub does the talking.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vllm_dspark.checkpoint.errors import (
    CheckpointAccessError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptWeightsError,
    HubUnreachableError,
    MissingShardError,
    NoWeightsError,
)
from vllm_dspark.checkpoint.folder import CONFIG, INDEX, SINGLE, TOKENIZER
from vllm_dspark.checkpoint.headers import read_header, read_index, read_json
from vllm_dspark.checkpoint.spec import TensorInfo

_T = TypeVar("_T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# huggingface_hub has used three HTTP libraries; their transport errors share no base class with each other.
_HTTP_LIBRARIES = {"httpx", "httpx2", "requests"}


class HubSource:
    """Reads config, tensor headers and tokenizer path of a Hub repository."""

    def __init__(self, repo: str, *, revision: str | None, cache_dir: str | None, token: str | bool | None) -> None:
        self.repo, self.revision, self.cache_dir, self.token = repo, revision, cache_dir, token
        self.commit: str | None = None

    def config(self) -> dict[str, Any]:
        """The parsed config.json; also fixes `commit`, so that everything read later is of the same version."""
        path = self._download(CONFIG)
        if path is None:
            raise ConfigError(
                f"Hub repository {self._name} has no {CONFIG}; wanted a drafter such as deepseek-ai/dspark_qwen3_8b_block7."
            )
        # The cache keeps a file at …/snapshots/<commit>/<name>.
        self.commit = path.parent.name if _COMMIT.fullmatch(path.parent.name) else None
        return read_json(path, "a drafter's config", ConfigError)

    def tensors(self) -> dict[str, TensorInfo]:
        """Name → `TensorInfo` over all weight files; cached files first, range requests otherwise."""
        # A cached index wins over a remote single file: it is what the cached repository is made of.
        single = None if self._cached(INDEX) and not self._cached(SINGLE) else self._header(SINGLE)
        if single is not None:
            return single
        index = self._download(INDEX)
        if index is None:
            raise NoWeightsError(f"Hub repository {self._name} has neither {SINGLE} nor {INDEX}; wanted safetensors weights.")
        tensors: dict[str, TensorInfo] = {}
        for shard in read_index(index):
            header = self._header(shard)
            if header is None:
                raise MissingShardError(
                    f"Hub repository {self._name} lacks {shard}, which {INDEX} names. Ask its owner to upload it."
                )
            tensors.update(header)
        return tensors

    def tokenizer(self) -> str | None:
        """Path of the drafter's tokenizer.json if the cache already holds it; never downloads."""
        path = self._cached(TOKENIZER)
        return str(path) if path else None

    @property
    def _name(self) -> str:
        return f"{self.repo!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, cache_dir=self.cache_dir, revision=self.commit or self.revision)
        return Path(path) if isinstance(path, str) else None

    def _download(self, name: str) -> Path | None:
        """The cached copy of a small file, fetched if need be; None when the repository has no such file."""
        from huggingface_hub import hf_hub_download

        return self._ask(
            lambda: Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=self.commit or self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                )
            )
        )

    def _header(self, name: str) -> dict[str, TensorInfo] | None:
        """The tensors of one weight file; None when the repository has no such file."""
        cached = self._cached(name)
        if cached is not None:
            return read_header(cached)
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        metadata = self._ask(
            lambda: api.parse_safetensors_file_metadata(self.repo, name, revision=self.commit or self.revision)
        )
        if metadata is None:
            return None
        return {key: TensorInfo(tuple(info.shape), str(info.dtype)) for key, info in metadata.tensors.items()}

    def _ask(self, question: Callable[[], _T]) -> _T | None:
        """The Hub's answer; None when it says there is no such file; other refusals become `CheckpointError`s."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return question()
        except Exception as fault:
            # LocalEntryNotFoundError says nothing about the Hub, only that the cache has no copy.
            if isinstance(fault, EntryNotFoundError) and not isinstance(fault, LocalEntryNotFoundError):
                return None
            error = self._explain(fault)
            if error is None:
                raise
            raise error from fault

    def _explain(self, fault: Exception) -> CheckpointError | None:
        """What a huggingface_hub exception means to the user; None for faults with a clear message of their own."""
        from huggingface_hub import constants, errors

        where = constants.ENDPOINT
        if isinstance(fault, errors.HFValidationError):
            return CheckpointNotFoundError(f"{self.repo!r} is neither an existing folder nor a Hub id 'owner/name' ({fault}).")
        if isinstance(fault, errors.GatedRepoError):
            return CheckpointAccessError(
                f"Hub repository {self._name} is gated. Accept its terms at {where}/{self.repo} and pass a token that "
                "may read it (token=…, HF_TOKEN or `hf auth login`), or point to a local folder."
            )
        if isinstance(fault, errors.RevisionNotFoundError):
            return CheckpointNotFoundError(
                f"Hub repository {self.repo!r} has no revision {self.revision!r}; see {where}/{self.repo}/commits/main."
            )
        if isinstance(fault, errors.RepositoryNotFoundError):
            return CheckpointNotFoundError(
                f"{self.repo!r} is neither an existing folder nor a repository at {where} that this token may see. "
                "Check the spelling; for a private repository pass a token (token=… or HF_TOKEN)."
            )
        if isinstance(fault, errors.SafetensorsParsingError):
            return CorruptWeightsError(f"A weight file of Hub repository {self._name} has an unreadable header ({fault}).")
        if _is_outage(fault):
            return HubUnreachableError(
                f"Could not read Hub repository {self._name} from {where} ({type(fault).__name__}: "
                f"{_first_line(fault)}) and the cache {self.cache_dir or constants.HF_HUB_CACHE} lacks what is needed. "
                "Give a local folder instead of the id, or download it where there is a network and set HF_HOME and "
                "HF_HUB_OFFLINE=1, or check HF_ENDPOINT and HF_TOKEN."
            )
        return None


def _is_outage(fault: BaseException) -> bool:
    from huggingface_hub import errors

    hub = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        ConnectionError,
        TimeoutError,
    )
    return isinstance(fault, hub) or type(fault).__module__.split(".")[0] in _HTTP_LIBRARIES


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip() or "no message").splitlines()[0]
