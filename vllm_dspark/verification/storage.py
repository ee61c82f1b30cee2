"""JSON files that are complete or absent, and that are ignored with one warning when they are not what was expected."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.dspark")

SCHEMA = 1


def save(path: str | Path, kind: str, content: Mapping[str, Any], key: Mapping[str, Any] | None = None) -> None:
    """Write ``content`` under a schema version and the key of everything it depends on; readers see old or new, never half.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a number is not finite.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {"kind": kind, "schema": SCHEMA, "key": dict(key or {}), "content": dict(content)}
    text = json.dumps(document, indent=1, allow_nan=False)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: str | Path, kind: str, key: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The content of a file of this kind, schema and key; None, with one warning unless the file is absent, otherwise."""
    source = Path(path)
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("ignoring %s: %s", source, error)
        return None
    problem = _mismatch(document, kind, key)
    if problem:
        logger.warning("ignoring %s: %s", source, problem)
        return None
    content: dict[str, Any] = document["content"]
    return content


def _mismatch(document: Any, kind: str, key: Mapping[str, Any] | None) -> str | None:
    if not isinstance(document, dict) or not isinstance(document.get("content"), dict):
        return f"not a {kind} file"
    if document.get("kind") != kind:
        return f"found kind {document.get('kind')!r}, wanted {kind!r}"
    if document.get("schema") != SCHEMA:
        return f"found schema {document.get('schema')!r}, wanted {SCHEMA}"
    if key is None:
        return None
    stored = document.get("key")
    stored = stored if isinstance(stored, dict) else {}
    wanted = json.loads(json.dumps(dict(key)))
    different = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    return f"it was made for another {', '.join(different)}" if different else None
