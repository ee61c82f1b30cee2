"""The requests the policy knows: their limits, and their slots in its arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dspark.verification.records import KINDS, Kind, Rows

_FORGET = 512  # rounds after which a request that was not seen makes room for another


@dataclass
class Request:
    """What is kept of a request beside its statistics.

    Attributes:
        slot: in the arrays. cap: most drafts; None: the engine's. kind: its policy; None: the engine's. seen: last round.
    """

    slot: int
    cap: int | None
    kind: Kind | None
    seen: int

    @property
    def special(self) -> bool:
        """Whether it has limits or a policy of its own."""
        return self.cap is not None or self.kind is not None


class Registry:
    """Requests by id; slots are reused.

    Attributes:
        special: how many have limits or a policy of their own. able: how many may draft.
        tenancies: how many requests have left each slot, ``(slots,)``; a slot whose number has changed is another's.
    """

    def __init__(self, kind: Kind) -> None:
        """Begin with nobody. ``kind``: the engine's policy."""
        self._kind = kind
        self._requests: dict[str, Request] = {}
        self._free: list[int] = []
        self._used = 0
        self.special = self.able = 0
        self.tenancies = np.zeros(64, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, name: str, cap: int | None, kind: Kind | None, now: int) -> int | None:
        """Make known or change; the slot if it is new, None if it was known.

        Raises:
            ValueError: a negative cap or an unknown policy; nothing is changed.
        """
        if cap is not None and cap < 0:
            raise ValueError(f"max_draft_tokens must be 0 or more, found {cap!r}")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"policy must be one of {', '.join(KINDS)}, found {kind!r}")
        known = self._requests.get(name)
        if known is not None:
            self._count(known, -1)
            known.cap, known.kind = cap, kind
            self._count(known, 1)
            return None
        slot = self._free.pop() if self._free else self._used
        self._used = max(self._used, slot + 1)
        if slot >= self.tenancies.size:
            self.tenancies = np.concatenate([self.tenancies, np.zeros_like(self.tenancies)])
        self._requests[name] = Request(slot, cap, kind, now)
        self._count(self._requests[name], 1)
        return slot

    def _count(self, request: Request, change: int) -> None:
        self.special += change * request.special
        self.able += change * self.may_draft(request.cap, request.kind)

    def may_draft(self, cap: int | None, kind: Kind | None) -> bool:
        """Whether a request with these, if it has its own, ever drafts."""
        return cap != 0 and (kind or self._kind) != "off"

    def finish(self, names: Iterable[str]) -> None:
        """Forget these; unknown ones are ignored."""
        for name in names:
            gone = self._requests.pop(name, None)
            if gone is not None:
                self._count(gone, -1)
                self._free.append(gone.slot)
                self.tenancies[gone.slot] += 1

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of them that nobody announced."""
        return [name for name in names if name not in self._requests]

    def rows(self, names: Sequence[str], now: int, most: int) -> tuple[Rows, Rows, list[Kind | None] | None]:
        """Slots, most drafts and policies of these requests, all known, which take part in this round.

        Args:
            most: drafts of a request without a limit of its own. The policies are None if nobody has one of its own.
        """
        found = [self._requests[name] for name in names]
        for request in found:
            request.seen = now
        slots = np.array([request.slot for request in found], dtype=np.int64)
        if not self.special:
            return slots, np.full(slots.size, most, dtype=np.int64), None
        caps = np.array([most if request.cap is None else min(request.cap, most) for request in found], dtype=np.int64)
        return slots, caps, [request.kind for request in found]

    def sweep(self, now: int) -> None:
        """Now and then, forget what nobody finished."""
        if now % _FORGET == 0:
            self.finish([name for name, kept in self._requests.items() if kept.seen < now - _FORGET])
