"""Which slot of a draft block makes the first prediction.

Anchor first: slot 0 holds the last verified token and predicts the next one, so γ slots draft γ tokens. Fill-in: slot 0
is context only, so γ slots draft γ−1. Read the wrong way, every slot is off by one position and about 1 % of the drafts
are accepted, silently (vllm#56792), so the choice is explicit here and a guess is always announced.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from vllm_dspark.checkpoint.errors import ConfigError, SlotLayoutWarning
from vllm_dspark.checkpoint.spec import Layout


def slot_layout(
    body: Mapping[str, Any], model: str, layout: Layout, block_size: int, override: bool | None, notes: list[str]
) -> bool:
    """Whether slot 0 predicts.

    In this order: the caller's `override`; the config's `sample_from_anchor`; for DeepSpec, true, the only layout it
    trains. A speculators config without the field predates it (speculators#760) or was edited: the library's writer has
    stored it ever since, and has always stored how many tokens a block drafts, which is γ in one layout and γ−1 in the
    other, so that number decides. When it says neither, the library's own default does: true. vLLM's reader takes false
    for every missing field. Guesses are warned about and added to `notes`.
    """
    if override is not None:
        return override
    declared = body.get("sample_from_anchor")
    if declared is not None:
        if not isinstance(declared, bool):
            raise ConfigError(f"{model}: sample_from_anchor is {declared!r}; wanted true or false.")
        return declared
    if layout == "deepspec":
        return True
    drafts = _promised_tokens(body)
    anchor_first = drafts != block_size - 1
    reason = (
        f"its proposal method drafts {drafts} tokens of block_size {block_size}"
        if drafts in (block_size, block_size - 1)
        else "the speculators library's default"
    )
    note = (
        f"{model}: config.json does not say sample_from_anchor; assuming {str(anchor_first).lower()} ({reason}). If "
        f"almost no drafts are accepted, set the option sample_from_anchor to {str(not anchor_first).lower()}."
    )
    notes.append(note)
    warnings.warn(note, SlotLayoutWarning, stacklevel=4)
    return anchor_first


def _promised_tokens(body: Mapping[str, Any]) -> int | None:
    try:
        tokens = body["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None
    return tokens if isinstance(tokens, int) else None
