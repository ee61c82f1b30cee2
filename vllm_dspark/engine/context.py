"""Context K/V, written late: a drafter that is not drafting should cost next to nothing.

Each step's hidden states are only kept. They become K/V in one go before anything is drafted, or when enough have
gathered. Until then nothing reads those cache slots: only draft layers do, and they run after a write. So blocks shared through
prefix caching are complete whenever a draft sees them, whichever request computed them and whether or not it still runs. Blocks
that a request has left without filling them are never shared: what has not been written of them by then never is.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from vllm_dspark.verification.cost import next_size

NO_SLOT = -1
"""The slot of a token for which there is nothing to write; vLLM's kernels pass over it."""
Write = Callable[[Tensor, Tensor, Tensor], None]
States = Tensor | Sequence[Tensor]
"""A step's hidden states: concatenated, ``[T, m*d]``, or per layer, m of ``[T, d]``."""
Part = tuple[States, Tensor, Tensor]
"""Hidden states, positions and cache slots of some tokens."""


class DeferredContext:
    """Hidden states on their way to the draft layers' cache."""

    def __init__(self, write: Write, limit: int, together: int | None = None) -> None:
        """Begin empty.

        Args:
            write: takes concatenated target states ``[T, m*d]``, positions ``[T]`` and cache slots ``[T]``; some slots may be
                ``NO_SLOT``.
            limit: fewer tokens than this wait; 0 writes every step at once (needed where another process reads the cache).
            together: most tokens of one write, at most ``limit``; None: that.
        """
        self._write, self._limit, self._together = write, limit, min(together or limit, limit)
        self._parts: list[Part] = []
        self.tokens = 0
        self._before_last = self._added = 0  # tokens that ever were added, without those of the last step and with them
        self._block_size, self._forgotten = 1, np.zeros(1, dtype=np.int64)  # by block: before which token nothing is wanted

    def add(self, states: States, positions: Tensor, slots: Tensor) -> None:
        """Keep a step's tokens. ``states`` must be the caller's to give; the other two may be views that change later."""
        self._parts.append((states, positions.clone(), slots.clone()))
        self._before_last = self._added
        self._added += positions.shape[0]
        self.tokens += positions.shape[0]
        if not self._limit:
            self.write()
        while self._limit and self.tokens >= self._limit:
            self._write_oldest(self._together)

    def forget(self, blocks: Sequence[int], size: int) -> None:
        """These cache blocks, ``size`` slots each, were left by a request that has ended, and nobody will read them.

        The last step's tokens are still written: a block may have been given to another request by then. CPU only: the slots
        are looked at.
        """
        if not blocks:
            return
        missing = max(blocks) + 2 - self._forgotten.size  # the last is nobody's
        if missing > 0:
            self._forgotten = np.concatenate([self._forgotten, np.zeros(max(missing, self._forgotten.size), dtype=np.int64)])
        self._block_size = size
        self._forgotten[list(blocks)] = self._before_last

    def write(self) -> None:
        """Write what is kept."""
        while self.tokens:
            self._write_oldest(min(self.tokens, self._together or self.tokens))

    def _write_oldest(self, count: int) -> None:
        """Write so many tokens, oldest first; of two for one slot the later one counts."""
        first = self._added - self.tokens
        parts = self._take(count)
        states = _joined([states for states, _, _ in parts])
        positions, slots = torch.cat([positions for _, positions, _ in parts]), torch.cat([slots for *_, slots in parts])
        if first < int(self._forgotten.max()):
            rows = torch.from_numpy(self._wanted(slots.numpy(), first))
            states, positions, slots = states[rows], positions[rows], slots[rows]
            count = rows.shape[0]
            if not count:
                return
        if len(parts) > 1:
            slots[_overtaken(slots)] = NO_SLOT
        if slots.device.type == "cpu":
            more = int(next_size(np.int64(count))) - count
            states, positions, slots = _padded(states, more), _padded(positions, more), pad(slots, (0, more), value=NO_SLOT)
        self._write(states, positions, slots)

    def _wanted(self, slots: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """Places of those of these tokens, the ``first`` and later ones, that have not been forgotten."""
        blocks = np.minimum(slots // self._block_size, self._forgotten.size - 1)
        wanted: NDArray[np.int64] = (first + np.arange(slots.size) >= self._forgotten[blocks]).nonzero()[0]
        return wanted

    def _take(self, count: int) -> list[Part]:
        """Remove so many tokens from the front."""
        taken: list[Part] = []
        self.tokens -= count
        while count:
            states, positions, slots = part = self._parts.pop(0)
            size = positions.shape[0]
            if size > count:
                self._parts.insert(0, (_rows(states, count, size), positions[count:], slots[count:]))
                part, size = (_rows(states, 0, count), positions[:count], slots[:count]), count
            taken.append(part)
            count -= size
        return taken


def _rows(states: States, begin: int, end: int) -> States:
    return states[begin:end] if isinstance(states, Tensor) else [layer[begin:end] for layer in states]


def _joined(states: Sequence[States]) -> Tensor:
    """All steps' states, concatenated: ``[T, m*d]``."""
    if len(states) == 1 and isinstance(states[0], Tensor):
        return states[0]
    layers = max(1 if isinstance(step, Tensor) else len(step) for step in states)
    by_step = (_by_layer(step, layers) for step in states)
    return torch.cat([torch.cat(layer) for layer in zip(*by_step, strict=True)], dim=-1)


def _by_layer(states: States, layers: int) -> Sequence[Tensor]:
    return states.chunk(layers, dim=-1) if isinstance(states, Tensor) else states


def _overtaken(slots: Tensor) -> Tensor:
    """Places whose slot occurs again further on, where a block was freed and given to another request.

    The kernels write in no particular order.
    """
    ordered, places = torch.sort(slots, stable=True)
    return places[:-1][ordered[1:] == ordered[:-1]]


def _padded(rows: Tensor, more: int) -> Tensor:
    """The same, the last row repeated, so that matrix products come in few sizes (see :func:`next_size`)."""
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more else rows
