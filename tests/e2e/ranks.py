"""What every tensor-parallel rank drafts: ``worker_extension_cls="e2e.ranks.Ranks"`` adds this to vLLM's workers."""

import functools
from typing import Any


class Ranks:
    """Methods for ``LLM.collective_rpc``, on either runner."""

    model_runner: Any

    def watch_drafts(self) -> None:
        """Write down the drafts of every round from now on."""
        runner = self.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        propose = drafter.propose
        self.drafts: list[list[list[int]]] = []

        @functools.wraps(propose)
        def watched(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            self.drafts.append(drafts if isinstance(drafts, list) else drafts.tolist())
            return drafts

        drafter.propose = watched

    def watched_drafts(self) -> list[list[list[int]]]:
        """By round and request, ``[]`` for those that did not draft."""
        return self.drafts


def watch(engine: Any) -> None:
    """For :meth:`EngineProcess.call`."""
    engine.collective_rpc("watch_drafts")


def drafts(engine: Any) -> list[list[list[list[int]]]]:
    """Of every rank, by round and request."""
    found: list[list[list[list[int]]]] = engine.collective_rpc("watched_drafts")
    return found
