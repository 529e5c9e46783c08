"""What a user writes: the plan, version 1, as frozen pydantic models. Valid or not without any model at hand."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

DEFAULT_FORMAT = "compressed-tensors"
DEFAULT_SHARD_SIZE = 5_000_000_000
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def _name_or_options(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, dict) and value):
        return value
    raise PydanticCustomError("choice", "expected a name or an object of options")


def _names(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list) and listed and all(isinstance(v, str) and v for v in listed):
        return listed
    raise PydanticCustomError("choice", "expected a pattern or a list of patterns")


def parse_size(value: Any) -> int:
    """Bytes of `5GB`, `512MiB` or a plain number of bytes. Raises a pydantic error."""
    if type(value) is int and value > 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip()) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise PydanticCustomError("size", "expected a size such as 5GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Choice = Annotated[str | dict[str, Any], BeforeValidator(_name_or_options)]
Patterns = Annotated[list[str], BeforeValidator(_names)]
Size = Annotated[int, BeforeValidator(parse_size)]


class PlanModel(BaseModel):
    """Strict and frozen: unknown keys are errors, `true` is no number, nothing is rewritten."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Rule(PlanModel):
    """What a module is given. A field that is absent leaves what an earlier rule said."""

    wq: Choice | None = None
    """weights: a scheme name, or an object with `scheme` and its options; null keeps them"""
    aq: Choice | None = None
    """activations: likewise; null leaves them unquantized"""
    group_size: PositiveInt | None = None
    """short for `wq.group_size`"""
    algorithm: Choice | None = None
    """how weights are fitted: a name, or an object with `name` and its options"""
    keep: bool | None = None
    """true: short for `wq: null` and `aq: null`; false: lifts the built-in rule that keeps embeddings, heads and routers"""


class Override(Rule):
    """A rule for the modules that `pattern` matches."""

    pattern: Patterns
    """shell globs over module names (`*` crosses dots), or `re:` and a full-match regular expression; a list means any"""
    optional: bool = False
    """true: the override may match nothing, or be hidden by later ones"""
    expect: NonNegativeInt | None = None
    """exactly how many modules it must match"""


class Output(PlanModel):
    """What is written."""

    format: str = DEFAULT_FORMAT
    """layout on disk"""
    shard_size: Size = DEFAULT_SHARD_SIZE
    """largest size of one file"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """dtype of what stays in floating point; the source's own by default"""


class Plan(PlanModel):
    """A quantization plan."""

    schema_: str | None = Field(default=None, alias="$schema")
    """for editors"""
    version: Literal[1] = 1
    """version of the plan's language"""
    default: Rule = Rule()
    """what every module starts from; `defaults` is accepted too"""
    overrides: list[Override] = []
    """top to bottom; a later field wins"""
    transforms: list[Choice] = []
    """equivalent rewrites before quantization"""
    kv_cache: Choice | None = None
    """scheme of the key-value cache"""
    calibration: str | dict[str, Any] | None = None
    """text to calibrate with"""
    output: Output = Output()
    """what is written"""
    engines: list[str] | None = None
    """engines that must be able to run the result; by default those the output format is for"""
