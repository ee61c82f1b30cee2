"""The bundled pair: a tiny Qwen3-architecture target, its DSpark drafters and held-out prompts. Nothing to download."""

import json
from pathlib import Path

PAIR = Path(__file__).parent / "pair"
TARGET = PAIR / "target"
DOMAINS = ("arithmetic", "records", "code", "prose")
HEADS = ("vanilla", "gated", "rnn")


def drafter(head: str) -> Path:
    """Folder of the drafter with this correction head.

    Raises:
        ValueError: no bundled drafter has it.
    """
    if head not in HEADS:
        raise ValueError(f"no bundled drafter has head {head!r}; there are {', '.join(HEADS)}")
    return PAIR / f"dspark-{head}"


def prompts(domain: str) -> list[str]:
    """Held-out prompts of one domain: text that neither the target nor a drafter was trained on.

    Raises:
        ValueError: there is no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}; there are {', '.join(DOMAINS)}")
    texts: list[str] = json.loads((PAIR / "prompts.json").read_text())[domain]
    return texts
