"""What became of the drafts, counted where steps run and shown where metrics are asked for: two processes, one mapped file.

Several API servers show what Prometheus' client merges from files of its own format (``PROMETHEUS_MULTIPROC_DIR``, which vLLM
sets for them); then the counts are written there.
"""

import atexit
import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger("vllm.dspark")

DRAFTS = ("accepted", "rejected", "trimmed", "undrafted")
STEPS = ("drafted", "skipped")
_NAMES = (*DRAFTS, *STEPS)
_TOLD = {
    "dspark_draft_tokens": (
        "outcome", DRAFTS,
        "Scheduled drafts: accepted or rejected by the target, trimmed (made, not verified), undrafted (not made).",
    ),
    "dspark_steps": ("drafting", STEPS, "Steps by whether the drafter ran."),
}  # fmt: skip
_MERGED = "PROMETHEUS_MULTIPROC_DIR"


class Counters(Protocol):
    """Where one engine's drafts are counted."""

    def add(self, verified: int, accepted: int, trimmed: int, undrafted: int, skipped: bool) -> None:
        """One step's drafts: judged by the target, right among those, made but not verified, not made; and whether the
        round after it skipped the block forward."""


class Board:
    """Counters of some engines in a file that several processes map; one process writes each engine's."""

    def __init__(self, path: str | Path, engine: int = 0) -> None:
        """Map an existing file.

        Raises:
            OSError, IndexError: there is no such file here (another machine's, say), or it has no room for that engine.
        """
        self._counts = np.memmap(path, dtype=np.int64, mode="r+").reshape(-1, len(_NAMES))
        self._mine = self._counts[engine]

    @staticmethod
    def create(engines: int) -> str:
        """A new file with room for so many engines; it goes with this process. Its path, empty if it cannot be made."""
        _sweep()
        try:
            handle, path = tempfile.mkstemp(prefix=f"vllm-dspark-{os.getpid()}-", suffix=".counters")
            with os.fdopen(handle, "wb") as file:
                file.write(bytes(8 * len(_NAMES) * engines))
        except OSError as error:
            logger.debug("drafts are not counted: %s", error)
            return ""
        atexit.register(_remove, path, os.getpid())
        return path

    def add(self, verified: int, accepted: int, trimmed: int, undrafted: int, skipped: bool) -> None:
        """See :class:`Counters`."""
        self._mine += (accepted, verified - accepted, trimmed, undrafted, not skipped, skipped)

    def engines(self) -> Iterator[dict[str, int]]:
        """Totals of every engine, by name."""
        for row in self._counts:
            yield dict(zip(_NAMES, row.tolist(), strict=True))


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # children inherit the registration
        with contextlib.suppress(OSError):
            os.unlink(path)


def _sweep() -> None:
    """Remove the files of processes that were killed before they could do it."""
    for path in Path(tempfile.gettempdir()).glob("vllm-dspark-*.counters"):
        owner = re.match(r"vllm-dspark-(\d+)-", path.name)
        try:
            if owner is not None:
                os.kill(int(owner[1]), 0)
        except ProcessLookupError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            continue  # another user's


class Merged:
    """Counters of one engine in the files that :class:`prometheus_client.multiprocess.MultiProcessCollector` merges."""

    def __init__(self, engine: int = 0) -> None:
        from prometheus_client import values

        # A file of its own: the client's, if this process has one, is written elsewhere.
        value = values.MultiProcessValue(lambda: f"dspark-{os.getpid()}")  # type: ignore[no-untyped-call]
        self._values = [
            value("counter", metric, f"{metric}_total", ("engine", label), (str(engine), name), told)
            for metric, (label, names, told) in _TOLD.items()
            for name in names
        ]

    def add(self, verified: int, accepted: int, trimmed: int, undrafted: int, skipped: bool) -> None:
        """See :class:`Counters`."""
        counts = (accepted, verified - accepted, trimmed, undrafted, not skipped, skipped)
        for value, count in zip(self._values, counts, strict=True):
            if count:
                value.inc(count)


class Collector:
    """Shows boards to Prometheus: ``dspark_draft_tokens_total{outcome}`` and ``dspark_steps_total{drafting}``."""

    def __init__(self) -> None:
        self.boards: list[Board] = []

    def describe(self) -> list[Any]:
        """Nothing: engines, and with them numbers, come later."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        engines = [totals for board in self.boards for totals in board.engines()]
        for metric, (label, names, told) in _TOLD.items():
            family = CounterMetricFamily(metric, told, labels=("engine", label))
            for engine, totals in enumerate(engines):
                for name in names:
                    family.add_metric((str(engine), name), totals[name])
            yield family


_collector = Collector()


def publish(engines: int) -> str:
    """Make a board and show it in this process's default registry; its path, empty where there is none to show it in."""
    path = "" if _MERGED in os.environ else Board.create(engines)
    if path:
        from prometheus_client import REGISTRY

        if not _collector.boards:
            REGISTRY.register(_collector)
        _collector.boards.append(Board(path))
    return path


def open_board(path: str, engine: int) -> Counters | None:
    """Where this engine counts: on the board of the process that reads the options, or in files to be merged; None: nowhere."""
    try:
        if _MERGED in os.environ:
            return Merged(engine)
        return Board(path, engine) if path else None
    except (OSError, IndexError, ValueError) as error:
        logger.debug("drafts are not counted: %s", error)
        return None
