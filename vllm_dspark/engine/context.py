"""Context K/V, written late: a drafter that is not drafting should cost next to nothing.

Each step's hidden states are only kept. They become K/V in one go before anything is drafted, or when enough have
gathered. Until then nothing reads those cache slots: only draft layers do, and they run after a write. So blocks shared through
prefix caching are complete whenever a draft sees them, whichever request computed them and whether or not it still runs. Blocks
that a request has left without filling them are never shared: what has not been written of them by then never is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_dspark.verification.cost import next_size
from vllm_dspark.verification.records import Rows

NO_SLOT = -1
"""The slot of a token for which there is nothing to write; vLLM's kernels pass over it."""
Write = Callable[[Tensor, Tensor, Tensor], None]
States = Tensor | Sequence[Tensor]
"""A step's hidden states: concatenated, ``[T, m*d]``, or per layer, m of ``[T, d]``."""
NOTHING: Rows = np.zeros(0, dtype=np.int64)

_TOGETHER = 512  # tokens written at once, if nobody says how many
_LOOK = 4  # times as many are looked at: some may be forgotten


class DeferredContext:
    """Hidden states on their way to the draft layers' cache, in a ring of rows. Tokens are numbered as they are added."""

    def __init__(self, write: Write, limit: int, together: int | None = None) -> None:
        """Begin empty.

        Args:
            write: takes concatenated target states ``[T, m*d]``, positions ``[T]`` and cache slots ``[T]``; some slots may be
                ``NO_SLOT``.
            limit: fewer tokens than this wait; 0 writes every step at once (needed where another process reads the cache).
            together: most tokens of one write, at most ``limit`` unless that is 0; None: that, or a size that suits products.
        """
        self._write, self._limit = write, max(limit, 1)
        self._together = min(together or limit or _TOGETHER, limit or _TOGETHER)
        self._size = self._limit + self._together
        self._ring: tuple[Tensor, Tensor, Tensor] | None = None  # states, positions, slots
        self._waits = np.zeros(self._size, dtype=bool)
        self._first = self._added = 0  # numbers of the first token that may wait, and of the next one
        self._last_step = 0  # that of the last step's first
        self._forgotten = np.zeros(1, dtype=np.int64)  # by block: before which token nothing is wanted
        self._forgotten_until, self._block_size = 0, 1
        self.written = 0
        """Tokens that ever were written."""

    @property
    def tokens(self) -> int:
        """How many wait; some may be forgotten."""
        return int(np.count_nonzero(self._waits))

    @property
    def few(self) -> bool:
        """Whether one write would do for all that waits."""
        return self.tokens <= self._together

    def add(self, states: States, positions: Tensor, slots: Tensor) -> None:
        """Keep a step's tokens T, of which ``states`` may have more rows. Everything is copied."""
        layers: Sequence[Tensor] = (states,) if isinstance(states, Tensor) else states
        count, done = positions.shape[0], 0
        self._last_step = self._added
        while done < count:
            some = min(count - done, self._together, self._size - self._added % self._size)
            if some == count == layers[0].shape[0]:
                self._put(layers, positions, slots)
            else:
                these = slice(done, done + some)
                self._put([layer[these] for layer in layers], positions[these], slots[these])
            done += some

    def _put(self, layers: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        """Keep tokens for which there is room at the ring's current place."""
        row, count = self._added % self._size, positions.shape[0]
        here = slice(row, row + count)
        if self._ring is None:
            empty = layers[0].new_empty(self._size, sum(layer.shape[-1] for layer in layers))
            self._ring = empty, positions.new_empty(self._size), slots.new_empty(self._size)
        kept_states, kept_positions, kept_slots = self._ring
        torch.cat(tuple(layers), dim=-1, out=kept_states[here])
        kept_positions[here] = positions
        kept_slots[here] = slots
        self._waits[here] = True
        self._added += count
        while self._added - self._first >= self._limit:
            self.write_oldest()

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
        self._forgotten[list(blocks)] = self._forgotten_until = self._last_step

    def write_with(self, states: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Write all that waits, and a step's tokens T with their concatenated states ``[≥ T, m*d]``."""
        count = positions.shape[0]
        if self._first < self._added or count > self._together or next_size(np.int64(count)) != count:
            self.add(states, positions, slots)
            self.write()
            return
        self._last_step, self._added = self._added, self._added + count
        self._first = self._added
        self.written += count
        self._write(states[:count], positions, slots)

    def write(self) -> None:
        """Write all that waits."""
        while self._first < self._added:
            self.write_oldest()

    def write_blocks(self, blocks: Sequence[int], size: int) -> None:
        """Write what waits of these cache blocks, ``size`` slots each: all of a block, so that its tokens keep their order.

        CPU only: the slots are looked at.
        """
        start = self._first % self._size
        rows = np.concatenate([self._waits[start:].nonzero()[0] + start, self._waits[:start].nonzero()[0]])
        chosen = np.zeros(max(blocks, default=0) + 2, dtype=bool)  # the last is nobody's
        chosen[list(blocks)] = True
        rows = self._wanted(rows[_of_blocks(chosen, self._slots(rows), size)])
        for begin in range(0, rows.size, self._together):
            self._write_rows(rows[begin : begin + self._together])

    def _slots(self, rows: Rows) -> Rows:
        return NOTHING if self._ring is None else self._ring[2].numpy()[rows]

    def write_oldest(self) -> None:
        """Write the oldest tokens that wait and have not been forgotten, as many as are written at once."""
        end = min(self._first + _LOOK * self._together, self._added)
        rows = np.arange(self._first, end) % self._size
        rows = rows[self._waits[rows]]
        wanted = self._wanted(rows)
        if wanted.size > self._together:
            wanted = wanted[: self._together]
            end = int(self._numbers(wanted[-1:])[0]) + 1
            rows = rows[: np.searchsorted(self._numbers(rows), end)]
        self._waits[rows] = False
        self._first = end
        self._write_rows(wanted)

    def _write_rows(self, rows: Rows) -> None:
        """Write these rows, oldest first, which then wait no longer; of two tokens for one slot the later one counts."""
        count = rows.size
        if self._ring is None or not count:
            return
        self._waits[rows] = False
        self.written += count
        several = self._numbers(rows[:1])[0] < self._last_step
        if self._ring[0].device.type == "cpu":  # the last row again and again, so that matrix products come in few sizes
            rows = np.concatenate([rows, np.full(int(next_size(np.int64(count))) - count, rows[-1])])
        index = torch.from_numpy(rows).to(self._ring[0].device)
        states, positions, slots = (kept.index_select(0, index) for kept in self._ring)
        slots[count:] = NO_SLOT
        if several:
            slots[_overtaken(slots[:count])] = NO_SLOT
        self._write(states, positions, slots)

    def _numbers(self, rows: Rows) -> Rows:
        """Which tokens lie in these rows."""
        return self._added - 1 - (self._added - 1 - rows) % self._size

    def _wanted(self, rows: Rows) -> Rows:
        """Those of these rows that have not been forgotten."""
        numbers = self._numbers(rows)
        if not rows.size or numbers[0] >= self._forgotten_until:
            return rows
        return rows[numbers >= _of_blocks(self._forgotten, self._slots(rows), self._block_size)]


def _of_blocks(values: NDArray[Any], slots: Rows, size: int) -> NDArray[Any]:
    """``values``, by block, of the blocks of these slots; its last is that of every block beyond, and of no slot."""
    found: NDArray[Any] = values[np.minimum(slots // size, values.size - 1)]
    return found


def _overtaken(slots: Tensor) -> Tensor:
    """Places whose slot occurs again further on, where a block was freed and given to another request.

    The kernels write in no particular order.
    """
    ordered, places = torch.sort(slots, stable=True)
    return places[:-1][ordered[1:] == ordered[:-1]]
