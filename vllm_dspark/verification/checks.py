"""When a round is run only to learn what it takes: without drafts while drafting pays, with drafts while it does not."""

import math

_BETWEEN = 8  # rounds between two, where it is known what a step of this size takes without drafts
_SOON = 3  # rounds until the first at a new size, and between two where steps turn out shorter than expected
_AGAIN = 64  # rounds until the next if nothing could be measured
_LASTS = 2  # times in a row before that the size must have been the same: where requests come and go, the next step is another
_LAPSE = 1000  # rounds for which what was measured holds
_AS_EXPECTED = 0.87  # of the time expected: a shorter step has to be measured again
_TRIAL, _LONGEST = 4, 512  # rounds until the next trial: after the first, and at most
_GROWTH, _GROWTH_ALONE = 1.6, 2.0  # times so many each time: of several, and of a lone token (chosen in simulation)
_NEWS, _FORGET = 1.5, 0.95  # times the deviation of the last trial: it is worth another; what is left of that with every trial


class Checks:
    """Counts rounds, never time."""

    def __init__(self) -> None:
        self._last, self._done = -_BETWEEN, 0
        self._next: dict[int, int] = {}  # by size: the round in which a step without drafts is to be measured
        self._asked: int | None = None  # size when it was asked last
        self._lasted = 0  # how often in a row before it was the same

    def due(self, tokens: int | None, doubtful: bool, now: int) -> bool:
        """Whether round ``now``, in which drafting seems to pay, is to go without; if so it counts as done.

        Args:
            tokens: of the step without drafts; None: it has some in any case. doubtful: little speaks for drafting.
        """
        size = None if tokens is None else _size(tokens)
        self._lasted = self._lasted + 1 if size == self._asked else 0
        self._asked = size
        unknown = size is not None and self._next.setdefault(size, now + _SOON) <= now and self._lasted >= _LASTS
        wait = _SOON if unknown else min(_BETWEEN, 2 + self._done)
        if not (unknown or doubtful) or now - self._last < wait:
            return False
        self._last, self._done = now, self._done + 1
        if size is not None:
            self._next[size] = max(self._next[size], now + _AGAIN)
        return True

    def measured(self, tokens: int, seconds: float, expected: float, now: int) -> None:
        """A step without drafts took so many ``seconds``, where so many were ``expected``; ``now``: the round."""
        self._next[_size(tokens)] = now + (_LAPSE if seconds > _AS_EXPECTED * expected else _SOON)


class Trials:
    """Rounds that draft though it may not pay, ever more rarely: noise alone can keep step times from becoming known well."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}  # by size: the round from which it may be tried again
        self._interval: dict[int, float] = {}
        self._deviation: dict[int, float] = {}

    def due(self, tokens: int, deviation: float, now: int) -> bool:
        """Whether round ``now`` may be one.

        Args:
            tokens: of the step without drafts. deviation: of log(best / off), see :class:`choice.Choice`.
        """
        size = _size(tokens)
        return now >= self._next.get(size, 0) or deviation > _NEWS * self._deviation[size]

    def tried(self, tokens: int, deviation: float, now: int) -> None:
        """Round ``now`` is one."""
        size = _size(tokens)
        news = deviation > _NEWS * self._deviation.get(size, math.inf)
        growth = _GROWTH if tokens > 1 else _GROWTH_ALONE
        wait = _TRIAL if news else min(growth * self._interval.get(size, _TRIAL / growth), _LONGEST)
        self._interval[size], self._next[size] = wait, now + round(wait)
        self._deviation[size] = max(deviation, _FORGET * self._deviation.get(size, 0.0))  # few may draft now, and many again


def _size(tokens: int) -> int:
    """Half octaves: steps of about as many tokens."""
    return round(2 * math.log2(max(tokens, 1)))
