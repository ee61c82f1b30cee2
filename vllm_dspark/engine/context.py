"""Context K/V, written late: a drafter that is not drafting should cost next to nothing.

Each step's hidden states are only kept. They become K/V in one go before anything is drafted, or when enough have
gathered. Until then nothing reads those cache slots: only draft layers do, and they run after a write. So blocks shared through
prefix caching are complete whenever a draft sees them, whichever request computed them and whether or not it still runs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_dspark.verification.cost import next_size

Write = Callable[[Tensor, Tensor, Tensor], None]
States = Tensor | Sequence[Tensor]
"""A step's hidden states: concatenated, ``[T, m*d]``, or per layer, m of ``[T, d]``."""


class DeferredContext:
    """Hidden states on their way to the draft layers' cache."""

    def __init__(self, write: Write, limit: int) -> None:
        """Begin empty.

        Args:
            write: takes concatenated target states ``[T, m*d]``, positions ``[T]`` and cache slots ``[T]``.
            limit: tokens kept at most; 0 writes every step at once (needed where another process reads the cache).
        """
        self._write, self._limit = write, limit
        self._parts: list[tuple[States, Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, states: States, positions: Tensor, slots: Tensor) -> None:
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
        parts, self._parts, self.tokens = self._parts, [], 0
        if not parts:
            return
        joined = _joined([states for states, _, _ in parts])
        positions, slots = torch.cat([positions for _, positions, _ in parts]), torch.cat([slots for *_, slots in parts])
        if len(parts) > 1 or slots.device.type == "cpu":
            places = _padded(_latest(slots) if len(parts) > 1 else torch.arange(slots.shape[0]))
            joined, positions, slots = joined[places], positions[places], slots[places]
        self._write(joined, positions, slots)


def _joined(states: Sequence[States]) -> Tensor:
    """All steps' states, concatenated: ``[T, m*d]``."""
    if len(states) == 1 and isinstance(states[0], Tensor):
        return states[0]
    layers = max(1 if isinstance(step, Tensor) else len(step) for step in states)
    by_step = (_by_layer(step, layers) for step in states)
    return torch.cat([torch.cat(layer) for layer in zip(*by_step, strict=True)], dim=-1)


def _by_layer(states: States, layers: int) -> Sequence[Tensor]:
    return states.chunk(layers, dim=-1) if isinstance(states, Tensor) else states


def _latest(slots: Tensor) -> Tensor:
    """Places ``[U]`` of the last occurrence of every slot.

    A block that was freed and given to another request is in ``slots`` twice; the kernels write in no particular order.
    """
    ordered, places = torch.sort(slots, stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return places[last]


def _padded(places: Tensor) -> Tensor:
    """The same, the last one repeated so that matrix products come in few sizes (see :func:`next_size`)."""
    count = places.shape[0]
    return torch.cat([places, places[-1:].expand(int(next_size(np.int64(count))) - count)])
