"""What a user writes: the plan, version 1, as frozen pydantic models. Valid or not without any model at hand."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

DEFAULT_FORMAT = "compressed-tensors"
DEFAULT_SHARD_SIZE = 5_000_000_000
SELF = "self"  # the calibration source that is the model itself
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


def _source_alone(value: Any) -> Any:
    if isinstance(value, str):
        return {"source": value}
    if isinstance(value, dict):
        return value
    raise PydanticCustomError("calibration", "expected a source or an object of settings")


Choice = Annotated[str | dict[str, Any], BeforeValidator(_name_or_options)]
Patterns = Annotated[list[str], BeforeValidator(_names)]
Size = Annotated[int, BeforeValidator(parse_size)]
NonEmpty = Annotated[str, Field(min_length=1)]


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


class Calibration(PlanModel):
    """Which tokens are run through the model to see its activations. The same settings give the same tokens."""

    source: NonEmpty = SELF
    """text (.txt, .text, .raw, .md), .jsonl, .json or .parquet, a folder of those, token ids (.safetensors), a `datasets` id or a
    folder that its `save_to_disk` wrote, or `self`: text the model writes; paths are relative to the plan's file"""
    subset: NonEmpty | None = None
    """configuration of a `datasets` id"""
    split: NonEmpty = "train"
    """split of a `datasets` source; slices such as `train[:1%]` too"""
    field: NonEmpty = "text"
    """key or column that holds the text; rows without it may hold a chat in `messages`"""
    samples: PositiveInt = 128
    """how many sequences"""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """tokens in a sequence; where it is not given and the model has fewer positions, that many"""
    seed: NonNegativeInt = 0
    """which sequences are taken, and what the model writes; 0 is a seed like any other"""
    shuffle: bool = True
    """false: the first sequences in their order, whatever the seed"""
    skip_tokens: NonNegativeInt = 0
    """positions at the start of each sequence that statistics leave out, with every begin-of-sequence token; 0: all count"""
    all_experts: bool = False
    """true: every token counts for every expert of a mixture, not only for those the router chose; takes as much longer as there
    are more experts than chosen ones"""

    @model_validator(mode="after")
    def _something_counts(self) -> Calibration:
        if self.skip_tokens >= self.sequence_length:
            raise ValueError(f"skip_tokens: leaves nothing of sequences of {self.sequence_length} tokens")
        return self


def _scheme_alone(value: Any) -> Any:
    if isinstance(value, str):
        return {"scheme": value}
    if isinstance(value, dict):
        return value
    raise PydanticCustomError("kv_cache", "expected a scheme or an object of settings")


class KeyValueCache(PlanModel):
    """How the keys and values are rounded that a model keeps of the tokens before."""

    scheme: Literal["fp8", "int8"]
    """fp8 (e4m3) or symmetric int8"""
    granularity: Literal["tensor", "head"] = "tensor"
    """what shares one scale: all keys of a layer, or those of one head; values likewise"""
    observer: Choice | None = None
    """what finds the ranges: a name, or an object with `name` and its options; minmax if absent"""


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
    kv_cache: Annotated[KeyValueCache, BeforeValidator(_scheme_alone)] | None = None
    """how the key-value cache is quantized: a scheme, or an object of settings"""
    calibration: Annotated[Calibration, BeforeValidator(_source_alone)] | None = None
    """what to calibrate with: a source alone, or an object of settings"""
    output: Output = Output()
    """what is written"""
    engines: list[str] | None = None
    """engines that must be able to run the result; by default those the output format is for"""
