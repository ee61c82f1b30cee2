"""When a round goes without drafts only to learn what that takes: while everything drafts, nothing else would show it."""

import math

_BETWEEN = 8  # rounds between two, where it is known what a step of this size takes without drafts
_UNKNOWN = 3  # and where it is not
_LAPSE = 1000  # rounds for which it is known once it was measured
_AS_EXPECTED = 0.87  # of the time expected: if a step was shorter than that, it is to be measured again


class Checks:
    """Counts rounds, never time."""

    def __init__(self) -> None:
        self._last, self._done = -_BETWEEN, 0
        self._known: dict[int, int] = {}  # by size: until which round

    def due(self, tokens: int | None, doubtful: bool, now: int) -> bool:
        """Whether round ``now``, in which drafting seems to pay, is to go without; if so it counts as done.

        Args:
            tokens: of the step without drafts; None: it has drafts in any case. doubtful: little speaks for drafting.
        """
        known = tokens is None or self._known.setdefault(_size(tokens), now + _UNKNOWN) > now
        wait = min(_BETWEEN, 2 + self._done) if known else _UNKNOWN
        if (known and not doubtful) or now - self._last < wait:
            return False
        self._last, self._done = now, self._done + 1
        return True

    def measured(self, tokens: int, seconds: float, expected: float, now: int) -> None:
        """A step without drafts took this long."""
        if seconds > _AS_EXPECTED * expected:
            self._known[_size(tokens)] = now + _LAPSE


def _size(tokens: int) -> int:
    """Half octaves: steps of about as many tokens."""
    return round(2 * math.log2(max(tokens, 1)))
