"""The kinds of things that options choose among, for rooms that must do without what options are checked with."""

from typing import Literal

PolicyKind = Literal["adaptive", "fixed", "off"]
WeightFormat = Literal["native", "int8", "fp8"]
Implementation = Literal["auto", "fused", "compiled", "eager"]
