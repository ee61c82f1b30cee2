"""What became of the drafts, counted where steps run and shown where metrics are asked for: two processes, one mapped file."""

import atexit
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("vllm.dspark")

DRAFTS = ("accepted", "rejected", "trimmed", "undrafted")
STEPS = ("drafted", "skipped")
_NAMES = (*DRAFTS, *STEPS)


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
        try:
            handle, path = tempfile.mkstemp(prefix="vllm-dspark-", suffix=".counters")
            with os.fdopen(handle, "wb") as file:
                file.write(bytes(8 * len(_NAMES) * engines))
        except OSError as error:
            logger.debug("drafts are not counted: %s", error)
            return ""
        atexit.register(_remove, path, os.getpid())
        return path

    def add(self, verified: int, accepted: int, trimmed: int, undrafted: int, skipped: bool) -> None:
        """One step's drafts: judged by the target, right among those, made but not verified, not made; and whether the
        round after it skipped the block forward."""
        self._mine += (accepted, verified - accepted, trimmed, undrafted, not skipped, skipped)

    def engines(self) -> Iterator[dict[str, int]]:
        """Totals of every engine, by name."""
        for row in self._counts:
            yield dict(zip(_NAMES, row.tolist(), strict=True))


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # children inherit the registration
        with contextlib.suppress(OSError):
            os.unlink(path)


class Collector:
    """Shows boards to Prometheus: ``dspark_draft_tokens_total{outcome}`` and ``dspark_steps_total{drafting}``."""

    def __init__(self) -> None:
        self.boards: list[Board] = []

    def describe(self) -> list[Any]:
        """Nothing: engines, and with them numbers, come later."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        drafts = CounterMetricFamily(
            "dspark_draft_tokens",
            "Scheduled drafts: accepted or rejected by the target, trimmed (made, not verified), undrafted (not made).",
            labels=("engine", "outcome"),
        )
        steps = CounterMetricFamily("dspark_steps", "Steps by whether the drafter ran.", labels=("engine", "drafting"))
        engines = (totals for board in self.boards for totals in board.engines())
        for engine, totals in enumerate(engines):
            for name in DRAFTS:
                drafts.add_metric((str(engine), name), totals[name])
            for name in STEPS:
                steps.add_metric((str(engine), name), totals[name])
        yield drafts
        yield steps


_collector = Collector()


def publish(engines: int) -> str:
    """Make a board and show it in this process's default registry; its path, empty where that does not work."""
    path = Board.create(engines)
    if path:
        from prometheus_client import REGISTRY

        if not _collector.boards:
            REGISTRY.register(_collector)
        _collector.boards.append(Board(path))
    return path


def open_board(path: str, engine: int) -> Board | None:
    """The board of the process that reads the options; None if it is out of reach."""
    try:
        return Board(path, engine) if path else None
    except (OSError, IndexError, ValueError) as error:
        logger.debug("drafts are not counted: %s", error)
        return None
