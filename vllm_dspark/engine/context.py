"""Context K/V, written late: a drafter that is not drafting should cost next to nothing.

Each step's hidden states are only kept. They become K/V in one go before anything is drafted, or when enough have
gathered. Until then nothing reads those cache slots: only draft layers do, and they run after a write. So blocks shared through
prefix caching are complete whenever a draft sees them, whichever request computed them and whether or not it still runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Write = Callable[[Tensor, Tensor, Tensor], None]


class DeferredContext:
    """Hidden states on their way to the draft layers' cache."""

    def __init__(self, write: Write, limit: int) -> None:
        """Begin empty.

        Args:
            write: takes concatenated target states ``[T, m*d]``, positions ``[T]`` and cache slots ``[T]``.
            limit: tokens kept at most; 0 writes every step at once (needed where another process reads the cache).
        """
        self._write, self._limit = write, limit
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, states: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Keep a step's tokens. ``states`` must be the caller's to give; the other two may be views that change later."""
        count = positions.shape[0]
        if self._parts and self.tokens + count > self._limit:
            self.write()
        self._parts.append((states, positions.clone(), slots.clone()))
        self.tokens += count
        if self.tokens >= self._limit:
            self.write()

    def write(self) -> None:
        """Write what is kept, oldest first; of two tokens for one slot the later one counts."""
        if not self._parts:
            return
        states, positions, slots = self._parts[0] if len(self._parts) == 1 else map(torch.cat, zip(*self._parts, strict=True))
        several = len(self._parts) > 1
        self._parts.clear()
        self.tokens = 0
        if several and (latest := _latest(slots)) is not None:
            states, positions, slots = states[latest], positions[latest], slots[latest]
        self._write(states, positions, slots)


def _latest(slots: Tensor) -> Tensor | None:
    """Places ``[U]`` of the last occurrence of every slot, or None if none occurs twice.

    A block that was freed and given to another request is in ``slots`` twice; the kernels write in no particular order.
    """
    ordered, places = torch.sort(slots, stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return None if bool(last.all()) else places[last]
