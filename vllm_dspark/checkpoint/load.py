"""`load_spec`: a Hub id or a folder → `DrafterSpec`."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_dspark.checkpoint.errors import CheckpointNotFoundError
from vllm_dspark.checkpoint.folder import FolderSource
from vllm_dspark.checkpoint.hub import HubSource
from vllm_dspark.checkpoint.layouts import build_spec, recognise
from vllm_dspark.checkpoint.spec import DrafterSpec


def load_spec(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    sample_from_anchor: bool | None = None,
) -> DrafterSpec:
    """Describe the drafter at `model`, a folder or a Hub id, from its config and tensor headers.

    No weights are read, and none are downloaded. `revision`, `cache_dir` and `token` are huggingface_hub's and matter
    for Hub ids only. `sample_from_anchor` overrides the slot layout the checkpoint declares, or fails to declare.

    Raises a `CheckpointError` subclass when there is no such checkpoint, it cannot be read, or it is no DSpark
    drafter; warns with `SlotLayoutWarning` when the slot layout had to be guessed. Whether it fits a target is
    `check_pair`'s question.
    """
    name = os.fspath(model)
    source = _open(name, revision, None if cache_dir is None else os.fspath(cache_dir), token)
    config = source.config()
    # A checkpoint of another kind is recognised by its config; only a drafter's headers are worth a request.
    kind = recognise(config, name)
    return build_spec(
        kind,
        source.tensors(),
        model=name,
        revision=source.revision,
        commit=source.commit,
        tokenizer=source.tokenizer(),
        sample_from_anchor=sample_from_anchor,
    )


def _open(name: str, revision: str | None, cache_dir: str | None, token: str | bool | None) -> FolderSource | HubSource:
    if not name:
        raise CheckpointNotFoundError("The drafter's model name is empty; wanted a folder or a Hub id 'owner/name'.")
    path = Path(name).expanduser()
    # Names that can only be paths get a path's error message instead of a question to the Hub.
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        return FolderSource(path)
    return HubSource(name, revision=revision, cache_dir=cache_dir, token=token)
