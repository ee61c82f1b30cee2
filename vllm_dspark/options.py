"""Every knob of the plugin: one model, given as ``"dspark": {...}`` in ``--speculative-config`` or ``--additional-config``."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = "dspark"


class DSparkOptions(BaseModel):
    """What a user may set. Unknown keys are refused by name; every default works without a choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["fixed"] = Field(
        default="fixed",
        description="how many drafts are verified: fixed = always num_speculative_tokens of them",
    )
    sample_from_anchor: bool | None = Field(
        default=None,
        description="whether the anchor's own slot predicts the next token; unset: the checkpoint's config decides",
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> "DSparkOptions":
        """Check a mapping of options.

        Raises:
            ValueError: an unknown key (with the nearest valid one), or a value of the wrong kind (with the one found).
        """
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"dspark options must be a mapping of names to values, found {values!r}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ValueError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    valid = sorted(DSparkOptions.model_fields)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid options: {', '.join(valid)}"
        return f"unknown dspark option {name!r}; {hint}"
    return f"dspark option {name!r}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}"


def merge(speculative: Any, additional: Any) -> dict[str, Any]:
    """Options from the two places they may stand in, as one mapping.

    Raises:
        ValueError: the two places give one option different values, or either is invalid.
    """
    for values in (speculative, additional):
        DSparkOptions.parse(values)
    first, second = dict(speculative or {}), dict(additional or {})
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            raise ValueError(
                f"dspark option {name!r} is {first[name]!r} in speculative_config and {second[name]!r} in "
                "additional_config; give it in one place"
            )
    return {**second, **first}
