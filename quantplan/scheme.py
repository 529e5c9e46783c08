"""CONTRACT: a scheme is a number format with options. Its config is torch-free and says what a plan may set and what is
stored; its quantizer is the arithmetic. Members live in `schemes/`, one file each.

A quantizer sees groups only: the last axis of `x` shares one set of parameters. How a matrix falls into groups (whole
tensor, channel, group, 128x128 block, token) is said once, here.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from quantplan.errors import fail
from quantplan.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantplan.observer import Observer, Range
    from quantplan.tensor import QuantizedTensor

Granularity = Literal["tensor", "channel", "group", "block", "token"]
DType = Literal["bfloat16", "float16", "float32"]
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> (safetensors dtype, shape)
Params = dict[str, "Tensor"]

BLOCK = 128  # side of a block: DeepSeek-V3's FP8 blocks, the only size engines compute with
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
NOT_IN_PLANS = frozenset({"dtype", "dynamic"})  # `dynamic` is an option of activations alone: see `activation_options`


class SchemeConfig(BaseModel, ABC):
    """The options of a scheme; its fields are what a plan may write beside `scheme`. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str]
    bits: ClassVar[int]
    granularities: ClassVar[tuple[Granularity, ...]] = ("channel", "tensor", "group", "block", "token")
    default_group_size: ClassVar[int | None] = None  # None: the first of `granularities` is the default
    fixed_group_size: ClassVar[int | None] = None  # the format fixes it (mx, nvfp4)
    fine_steps: ClassVar[bool] = True  # steps are stored finely enough for least squares to choose them
    tensor_params: ClassVar[frozenset[str]] = frozenset()  # parameters that belong to the whole tensor
    # options that say how codes are chosen, not what they mean
    fitting_options: ClassVar[frozenset[str]] = frozenset({"rounding", "seed"})

    granularity: Granularity | None = None
    """what shares one scale: the whole `tensor`, an output `channel`, a `group` of columns, a 128x128 `block`, or a `token`
    (activations); by default `group` where a group size is set, else the scheme's own"""
    group_size: PositiveInt | None = None
    """columns that share one scale"""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """to nearest with ties to even, or up with probability equal to the remainder"""
    seed: int = 0
    """seed of stochastic rounding"""
    dynamic: bool = True
    """(activations) whether ranges are taken from each input as it comes; if not, calibration finds one for the layer"""
    dtype: DType | None = Field(default=None, exclude=True)
    """dtype of dequantized values when the quantizer is used by hand; the input's by default"""

    @model_validator(mode="after")
    def _check_grouping(self) -> SchemeConfig:
        strategy = self.strategy
        if strategy not in self.granularities:
            raise ValueError(f"granularity: {self.name} has no granularity '{strategy}' (it has {', '.join(self.granularities)})")
        if self.group_size is not None and strategy != "group":
            raise ValueError(f"group_size: granularity '{strategy}' takes no group_size")
        if strategy == "group" and self.group is None:
            raise ValueError("granularity: granularity 'group' needs a group_size")
        if self.fixed_group_size and self.group_size not in (None, self.fixed_group_size):
            raise ValueError(f"group_size: {self.name} has groups of {self.fixed_group_size}, always")
        if not self.dynamic and strategy != "tensor" and not self.tensor_params:
            raise ValueError(f"dynamic: a static range is one for the whole tensor, and this is one for every {strategy}")
        return self

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """Option name -> pydantic field, as a plan may set them."""
        return {n: f for n, f in cls.model_fields.items() if n not in NOT_IN_PLANS}

    @classmethod
    def activation_options(cls) -> dict[str, Any]:
        """Option name -> pydantic field, as a plan may set them for activations."""
        return {n: f for n, f in cls.model_fields.items() if n in (*cls.plan_options(), "dynamic")}

    def meaning(self) -> SchemeConfig:
        """The config with the options that do not matter once codes are chosen at their defaults: equal meanings, equal grids."""
        return self.model_copy(update={n: f.default for n, f in type(self).model_fields.items() if n in self.fitting_options})

    @property
    def strategy(self) -> Granularity:
        """The granularity in effect."""
        if self.granularity:
            return self.granularity
        if self.group_size or self.default_group_size or self.fixed_group_size:
            return "group" if self.dynamic or self.group_size or "tensor" not in self.granularities else "tensor"
        return self.granularities[0] if self.dynamic else "tensor"

    @property
    def group(self) -> int | None:
        """The group size in effect; None unless the strategy is `group`."""
        return (self.group_size or self.fixed_group_size or self.default_group_size) if self.strategy == "group" else None

    @property
    def symmetric_grid(self) -> bool:
        """Whether zero is the centre of the grid, so that no zero point is stored."""
        return True

    @property
    def lopsided(self) -> bool:
        """Whether the grid reaches further below zero than above and its step may be negative, which turns it round."""
        return False

    @property
    def splittable(self) -> bool:
        """Whether rows (in multiples of a block's side) can be quantized apart with the same result."""
        return self.strategy != "tensor"

    @property
    def needs_absmax(self) -> bool:
        """Whether `fit` must be told the largest magnitude of the whole tensor (and of those fused with it)."""
        return bool(self.tensor_params)

    def shrink_factors(self, count: int, lowest: float) -> list[float]:
        """Range factors a scale search tries, 1 first: `count` steps from 1 down to `lowest`."""
        return [1 - i * (1 - lowest) / (count - 1) for i in range(count)]

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many groups a `[rows, columns]` matrix has, down and across."""
        strategy = self.strategy
        if strategy == "tensor":
            return 1, 1
        if strategy == "group":
            return rows, columns // (self.group or columns)
        if strategy == "block":
            return -(-rows // BLOCK), -(-columns // BLOCK)
        return rows, 1

    def misfit(self, columns: int) -> tuple[int, list[int]] | None:
        """(group size, sizes that would divide) when groups do not divide `columns`; None when they do."""
        if self.group is None or columns % self.group == 0:
            return None
        return self.group, [s for s in (512, 256, 128, 64, 32, 16, 8) if columns % s == 0]

    @abstractmethod
    def param_layout(self, rows: int, columns: int) -> Layout:
        """Name, dtype and shape of each stored parameter of a `[rows, columns]` matrix."""

    def static_layout(self) -> Layout:
        """Name, dtype and shape of what calibration finds for activations: one value each. Nothing for dynamic ones; where groups
        have scales of their own, these stay dynamic, and only what belongs to the whole tensor is found."""
        if self.dynamic:
            return {}
        params = self.param_layout(1, self.group or 1)
        return {n: (dtype, (1,)) for n, (dtype, _) in params.items() if not self.tensor_params or n in self.tensor_params}

    @abstractmethod
    def quantizer(self, stream: str = "") -> Quantizer:
        """The arithmetic. `stream` (a tensor's name) keeps the random numbers of different tensors apart."""


class Quantizer(ABC):
    """The arithmetic of a scheme. Members implement `fit`, `encode`, `decode` and `with_step` on groups; the rest follows."""

    def __init__(self, config: SchemeConfig, stream: str = "") -> None:
        self.config = config
        self._stream = stream
        self._generator: torch.Generator | None = None
        self._observer: Observer | None = None
        self._range: Range | None = None  # of activations, once calibrated

    @abstractmethod
    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        """Parameters for groups `x`, float32 `[..., size]`; each has a last axis of 1, in its stored dtype.

        `shrink` scales the range the grid covers (what lies outside saturates); `absmax` is the largest magnitude of the
        whole tensor, for schemes with `needs_absmax`. Raises NonFinite when `x` holds NaN or infinity.
        """

    @abstractmethod
    def encode(self, x: Tensor, params: Params) -> Tensor:
        """The nearest codes, uint8, shape of `x`. Values outside the range saturate."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Float32 values of codes, shape of `codes`."""

    def step(self, params: Params) -> Tensor:
        """What one unit of the grid is worth, float32, shape of the parameters: values are `step` times a level that only the
        codes (and a zero point) decide."""
        return params["scale"].float()

    @abstractmethod
    def with_step(self, params: Params, step: Tensor) -> Params:
        """The parameters with the storable step nearest to `step`, float32 with a last axis of 1."""

    def with_zero_point(self, params: Params, zero_point: Tensor) -> Params:
        """The parameters with the storable zero point nearest to `zero_point`, float32; only schemes that store one."""
        raise NotImplementedError

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        """The grid's values nearest to `x`, float32, shape of `x`."""
        return self.decode(self.encode(x, params), params)

    def reach(self, params: Params) -> tuple[Tensor | float, Tensor | float]:
        """The ends of the grid in steps, each with half of its last gap: from the low end up to but not including the high one,
        a value is rounded; beyond, it is clamped, and has no gradient (torch.ao's rule, which looks at the rounded level)."""
        levels = self.levels(params)
        return levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2

    def levels(self, params: Params) -> list[float]:
        """The values of the first group's grid in steps, ascending."""
        import torch

        first = {n: p.reshape(-1)[:1] for n, p in params.items()}
        codes = torch.arange(2**self.config.bits, device=first["scale"].device).to(torch.uint8)
        levels = (self.decode(codes, first) / self.step(first)).double().unique()
        found: list[float] = levels[torch.isfinite(levels)].tolist()
        return found

    @property
    def generator(self) -> torch.Generator | None:
        """The random numbers of stochastic rounding; None when rounding to nearest."""
        if self.config.rounding == "stochastic" and self._generator is None:
            import torch

            # torch's generator takes 32 bits of its seed and drops the rest
            self._generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {self._stream}".encode()))
        return self._generator

    def fit_range(self, known: Range) -> Params:
        """Parameters for values known to lie in a range, one for the tensor or one for each channel (static activations).

        They are what `fit` gives a group of the range's two ends, and so what it gives any group with these extremes, exactly:
        no scheme asks more of a group. Shapes are those of `known.low` with a last axis of 1. Raises NonFinite.
        """
        import torch

        ends = torch.stack([known.low, known.high], -1)
        return self.fit(ends, absmax=ends.abs().amax() if self.config.needs_absmax else None)

    def fit_static(self, known: Range) -> Params:
        """What `static_layout` lists, for inputs known to lie in a range, one for the tensor. Raises NonFinite."""
        return {n: p.reshape(1) for n, p in self.fit_range(known).items() if n in self.config.static_layout()}

    def static_params(self, groups: Tensor, found: Params) -> Params:
        """The parameters of groups `[rows, across, size]` of activations on the grid that `fit_static` found. Schemes whose
        groups stay dynamic fit them here."""
        return {n: p.reshape(1, 1, 1) for n, p in found.items()}

    def round_static(self, x: Tensor, found: Params) -> Tensor:
        """Activations `[..., features]` on the grid that `fit_static` found, in their own dtype; what lies outside saturates."""
        if x.numel() == 0:
            return x
        matrix = x.reshape(-1, x.shape[-1]).float()
        groups = self.groups(matrix)
        rounded = self.nearest(groups, self.static_params(groups, found))
        return self.ungroup(rounded, *matrix.shape).view(x.shape).to(x.dtype)

    def groups(self, x: Tensor) -> Tensor:
        """A matrix `[rows, columns]` as groups `[down, across, size]`; blocks at the edges are padded with zeros."""
        import torch

        rows, columns = x.shape
        strategy = self.config.strategy
        if strategy == "tensor":
            return x.reshape(1, 1, -1)
        if strategy == "block":
            x = torch.nn.functional.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
            down, across = x.shape[0] // BLOCK, x.shape[1] // BLOCK
            return x.view(down, BLOCK, across, BLOCK).transpose(1, 2).reshape(down, across, BLOCK * BLOCK)
        return x.reshape(rows, -1, self.config.group or columns)

    def ungroup(self, groups: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `groups`."""
        if self.config.strategy == "block":
            down, across = groups.shape[:2]
            whole = groups.view(down, across, BLOCK, BLOCK).transpose(1, 2).reshape(down * BLOCK, across * BLOCK)
            return whole[:rows, :columns]
        return groups.reshape(rows, columns)

    def spread(self, params: Params, rows: int, columns: int) -> tuple[Params, int]:
        """Parameters, as `fit` makes them for a `[rows, columns]` matrix, for each row: every one `[rows, across, 1]`, and the
        columns that share one of the `across`. Those of the whole tensor stay."""
        down, across = self.config.grid(rows, columns)
        tall, wide = (BLOCK, BLOCK) if self.config.strategy == "block" else (-(-rows // down), columns // across)
        own = self.config.tensor_params
        spread = {n: p if n in own else _tall(p, tall)[:rows].expand(rows, across, 1) for n, p in params.items()}
        return spread, wide

    def quantize_groups(self, groups: Tensor, params: Params, rows: int, columns: int) -> QuantizedTensor:
        """Groups, as `groups` makes them, with chosen parameters, as a quantized matrix."""
        from quantplan.tensor import QuantizedTensor

        codes = self.ungroup(self.encode(groups, params), rows, columns)
        stored = {n: p if n in self.config.tensor_params else p.squeeze(-1) for n, p in params.items()}
        return QuantizedTensor(codes.contiguous(), stored, self.config)

    def quantize(self, x: Tensor, absmax: Tensor | None = None) -> QuantizedTensor:
        """A matrix `[rows, columns]`, any float dtype, rounded with parameters fitted to its range."""
        groups = self.groups(x.float())
        if absmax is None and self.config.needs_absmax:
            absmax = largest_magnitude(groups).amax()
        return self.quantize_groups(groups, self.fit(groups, absmax=absmax), *x.shape)

    def dequantize(self, q: QuantizedTensor) -> Tensor:
        """The matrix the codes stand for, float32 `[rows, columns]`."""
        params = {n: p if n in self.config.tensor_params else p.unsqueeze(-1) for n, p in q.params.items()}
        return self.ungroup(self.decode(self.groups(q.codes), params), *q.shape)

    def fake_quantize(self, x: Tensor, absmax: Tensor | None = None) -> Tensor:
        """`x` of any shape (its last axis is the columns) quantized and dequantized, in `config.dtype` or its own."""
        import torch

        dtype = getattr(torch, self.config.dtype) if self.config.dtype else x.dtype
        if x.numel() == 0:
            return x.to(dtype)
        return self.dequantize(self.quantize(x.reshape(-1, x.shape[-1]), absmax)).view(x.shape).to(dtype)

    def quantize_weight(self, weight: Tensor) -> Tensor:
        """Seed 001's word: a weight rounded to the grid, `[out, ...]`, in `config.dtype` or its own dtype."""
        return self.fake_quantize(weight.reshape(weight.shape[0], -1) if weight.dim() > 2 else weight).view(weight.shape)

    def quantize_activation(self, x: Tensor) -> Tensor:
        """Seed 001's word: activations `[..., features]` rounded to the grid, with the range an observer found once
        `calibrate_finish` was called (static), else with ranges taken from `x` itself (dynamic). Raises NonFinite."""
        import torch

        if self._range is None or x.numel() == 0:
            return self.fake_quantize(x)
        known = self._range.to(x.device)
        if self.config.needs_absmax:  # what belongs to the whole tensor is static, its groups stay dynamic
            return self.fake_quantize(x, known.absmax.amax())
        check_finite(torch.stack(torch.aminmax(x)))
        # one parameter, or one for each feature
        params = {name: p.squeeze(-1) for name, p in self.fit_range(known).items()}
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else x.dtype
        return self.decode(self.encode(x.float(), params), params).to(dtype)

    def attach_observer(self, observer: Observer) -> None:
        """Seed 001's word: `calibrate_finish` will take the range of activations from this observer."""
        self._observer = observer

    def calibrate_finish(self) -> None:
        """Seed 001's word: from now on `quantize_activation` uses the range the observer found, unless the observer is one
        that leaves activations dynamic. Raises QuantplanError QP603 without an observer, or when it has seen nothing."""
        if self._observer is None:
            raise fail("QP603", "no observer is attached to the quantizer", "call attach_observer first")
        self._range = None if self._observer.config.dynamic else self._observer.result(self)


def _tall(param: Tensor, rows: int) -> Tensor:
    """Each row of a parameter `rows` times; of its bytes, as float8 cannot be repeated."""
    import torch

    if rows == 1:
        return param
    return param.view(torch.uint8).repeat_interleave(rows, 0).view(param.dtype)


class NonFinite(ValueError):
    """NaN or infinity where numbers were expected; whoever knows the tensor's name says it."""


def largest_magnitude(x: Tensor) -> Tensor:
    """`max |x|` over the last axis, kept as an axis of 1. Raises NonFinite."""
    absmax = x.abs().amax(-1, keepdim=True)
    check_finite(absmax)
    return absmax


def stored_step(step: Tensor, dtype: DType | None, before: Tensor) -> Tensor:
    """`step` in the dtype scales are stored in; what is zero or not finite there stays as `before`."""
    import torch

    from quantplan.numerics import round_through

    stored = round_through(step.abs(), getattr(torch, dtype or "bfloat16"))
    stored = torch.where(step < 0, -stored, stored)
    return torch.where((step == 0) | ~torch.isfinite(stored), before, stored)


def check_finite(statistic: Tensor) -> None:
    """Raises NonFinite unless every element is finite: a maximum carries NaN and infinity along, and is small to check."""
    if statistic.numel() and not math.isfinite(statistic.abs().amax().item()):
        raise NonFinite("NaN or infinity in the input")


SCHEMES: Registry[SchemeConfig] = Registry("scheme", "schemes")
