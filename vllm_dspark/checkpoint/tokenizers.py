"""Compares the tokenizers of a pair, where both are on this machine."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from vllm_dspark.checkpoint.errors import TokenizerMismatchWarning


def warn_if_tokenizers_differ(drafter: str | None, target: str | None, drafter_model: str, target_model: str) -> None:
    """`TokenizerMismatchWarning` when two tokenizer.json (or folders with one) give an id different tokens.

    Silent when either is absent or in a format this cannot read: token ids are all that drafting exchanges, so this is
    a hint about a mixed-up pair, not a condition.
    """
    ours, theirs = _tokens(drafter), _tokens(target)
    if ours is None or theirs is None:
        return
    differing = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    if not differing and len(ours) == len(theirs):
        return
    example = f", e.g. id {differing[0]} is {ours[differing[0]]!r} and {theirs[differing[0]]!r}" if differing else ""
    warnings.warn(
        f"The tokenizers of {drafter_model} ({len(ours)} tokens) and {target_model} ({len(theirs)} tokens) differ in "
        f"{len(differing)} shared ids{example}. Drafts will be rejected wherever ids mean other tokens; wanted the "
        "tokenizer the drafter was trained with. Check that the pair belongs together.",
        TokenizerMismatchWarning,
        stacklevel=3,
    )


def _tokens(path: str | None) -> dict[int, str] | None:
    """Id → token of a tokenizer.json, added tokens included; None when there is nothing readable."""
    if path is None:
        return None
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        # BPE and WordPiece map token to id; Unigram lists [token, score] in order of id.
        pairs = (
            [(i, t) for t, i in vocab.items()] if isinstance(vocab, dict) else [(i, entry[0]) for i, entry in enumerate(vocab)]
        )
        pairs += [(added["id"], added["content"]) for added in content.get("added_tokens") or ()]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return {int(i): str(token) for i, token in pairs}
