"""One entry of the ledger; see hooks.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SUPPORTED = "0.32 to 0.33"


@dataclass(frozen=True)
class Hook:
    """One symbol of vLLM.

    Attributes:
        module: where it is looked up. symbol: its dotted name there.
        purpose: why it is needed. loses: what the user loses without it. removal: when the hook can go.
        versions: those of vLLM in which the symbol was checked to be as described here.
        parameters: names its signature must have.
        mentions: names and strings that its code must contain: the attributes of its object that we share with it.
        when: the module whose import makes it needed; default ``module``. also: another one, for what is only used.
        replace: makes the replacement from the original; None where the symbol is only used.
    """

    module: str
    symbol: str
    purpose: str
    loses: str
    removal: str
    parameters: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    when: str | None = None
    replace: Callable[[Any], Any] | None = None
    versions: str = SUPPORTED
    also: str | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """The modules whose import makes it needed."""
        first = self.when or self.module
        return (first,) if self.also is None else (first, self.also)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.symbol}"
