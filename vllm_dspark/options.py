"""Every knob of the plugin: one model, given as ``"dspark": {...}`` in ``--speculative-config`` or ``--additional-config``.

A request has its own few: ``SamplingParams.extra_args``, or ``vllm_xargs`` in a request to the server.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from vllm_dspark.kinds import Implementation, PolicyKind, WeightFormat

KEY = "dspark"
PREFIX = "dspark_"  # of the keys a request may carry


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> Self:
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
            raise ValueError("; ".join(cls._explain(item) for item in error.errors())) from None

    @classmethod
    def _explain(cls, item: Any) -> str:
        if not item["loc"]:
            return f"dspark options: {item['ctx']['error']}"
        name = ".".join(str(part) for part in item["loc"])
        valid = sorted(cls.model_fields)
        if item["type"] == "extra_forbidden":
            near = [known for known in valid if name in known] or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid options: {', '.join(valid)}"
            return f"unknown dspark option {name!r}; {hint}"
        return f"dspark option {name!r}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}"


class DSparkOptions(_Options):
    """What a user may set. Unknown keys are refused by name; every default works without a choice."""

    policy: PolicyKind = Field(
        default="adaptive",
        description="who drafts and how many drafts are verified: adaptive = whatever promises the most tokens per second, "
        "fixed = always num_speculative_tokens, off = nothing is drafted",
    )
    min_tokens_per_second_per_request: PositiveFloat | None = Field(
        default=None,
        description="speed of every request that verifying more drafts must not break; unset: only throughput counts",
    )
    temperatures: PositiveFloat | list[PositiveFloat] | str | None = Field(
        default=None,
        description="of the confidences: one number, one for each position, or a file of them; "
        "unset: the checkpoint's, or 1. Outcomes refine them in any case",
    )
    profile_seconds: float = Field(
        default=10.0,
        ge=0.0,
        description="longest time, in seconds, that measuring step times may take at start; 0: they are learned while serving",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder for measured step times; unset: 'vllm-dspark' in the user's cache folder",
    )
    sample_from_anchor: bool | None = Field(
        default=None,
        description="whether the anchor's own slot predicts the next token; unset: the checkpoint's config decides",
    )
    sequential_stage: Implementation = Field(
        default="auto",
        description="what corrects and draws the drafts: fused = Triton kernels, compiled = torch.compile, eager = torch, "
        "auto = the first of these that runs on the device (on a CPU eager)",
    )
    w2_format: WeightFormat = Field(
        default="native",
        description="how the correction head's output matrix is kept: as it came, or in eight bits a weight with a scale a row",
    )
    candidates: PositiveInt | None = Field(
        default=None,
        description="ids that compete for each draft: so many with the best base logits; unset: the whole vocabulary",
    )
    listed_candidates: int = Field(
        default=0, ge=0, description="ids that compete besides, those that the token before raises most; needs `candidates`"
    )
    draft_lm_head: WeightFormat = Field(
        default="native",
        description="how the drafter's LM head is kept; an eight-bit copy needs V d more bytes where the target's is shared",
    )

    @model_validator(mode="after")
    def _lists_need_candidates(self) -> Self:
        if self.listed_candidates and self.candidates is None:
            raise ValueError(f"listed_candidates = {self.listed_candidates} needs candidates, which is unset")
        return self


class RequestOptions(_Options):
    """What one request may set for itself."""

    dspark_max_draft_tokens: int | None = Field(
        default=None, ge=0, description="most drafts of this request that are verified in a round; 0: it never drafts"
    )
    dspark_policy: PolicyKind | None = Field(default=None, description="as the option `policy`, for this request alone")

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Self:
        """The options among a request's extra arguments; those of others are none of ours.

        Raises:
            ValueError: as :meth:`parse`.
        """
        if not extra_args:
            return cls()
        return cls.parse({name: value for name, value in extra_args.items() if name.startswith(PREFIX)})


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
