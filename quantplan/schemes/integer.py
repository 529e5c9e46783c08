"""int2 to int8: uniform grids of `2 ** bits` levels, symmetric or with a zero point.

Codes are unsigned. Symmetric: `w = (code - 2 ** (bits - 1)) * scale`, signed levels `[-2 ** (bits - 1), 2 ** (bits - 1) - 1]`.
Asymmetric: `w = (code - zero_point) * scale`, levels `[0, 2 ** bits - 1]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from quantplan.scheme import (
    SAFETENSORS_DTYPES,
    SCHEMES,
    DType,
    Layout,
    Params,
    Quantizer,
    SchemeConfig,
    check_finite,
    largest_magnitude,
    stored_step,
)

if TYPE_CHECKING:
    from torch import Tensor


class IntegerConfig(SchemeConfig):
    """Options of the integer schemes."""

    fitting_options: ClassVar[frozenset[str]] = frozenset({"rounding", "seed", "scale_rule", "quotient_dtype"})

    symmetric: bool = True
    """whether zero is the middle of the grid; if not, a zero point is stored with every scale"""
    scale_rule: Literal["qmax", "midpoint", "qmin"] = "qmax"
    """what the largest magnitude of a symmetric group is divided by: `qmax` 2^(b-1)-1 (7 in int4), `midpoint` (2^b-1)/2
    (7.5: compressed-tensors), `qmin` 2^(b-1) (8: GPTQ, llama.cpp)"""
    scale_dtype: DType | None = None
    """dtype scales are stored in, and rounded to before codes are chosen; by default that of the weight (bfloat16 for
    float32 weights)"""
    quotient_dtype: DType = "float32"
    """dtype that weight / scale is rounded to before it is rounded to a level; float32 finds the nearest level, `bfloat16` is
    what llm-compressor does with bfloat16 models"""

    @property
    def symmetric_grid(self) -> bool:
        return self.symmetric

    @property
    def lopsided(self) -> bool:
        return self.symmetric

    @property
    def divisor(self) -> float:
        """What `scale_rule` divides by."""
        half = 2 ** (self.bits - 1)
        return {"qmax": float(half - 1), "midpoint": half - 0.5, "qmin": float(half)}[self.scale_rule]

    def param_layout(self, rows: int, columns: int) -> Layout:
        grid = self.grid(rows, columns)
        layout = {"scale": (SAFETENSORS_DTYPES[self.scale_dtype or "bfloat16"], grid)}
        return layout if self.symmetric else layout | {"zero_point": ("U8" if self.bits <= 8 else "I32", grid)}

    def quantizer(self, stream: str = "") -> IntegerQuantizer:
        return IntegerQuantizer(self, stream)


class IntegerQuantizer(Quantizer):
    """Affine arithmetic (seed 001's formulas; Jacob et al. 2018, arXiv 1712.05877)."""

    config: IntegerConfig

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        from quantplan.numerics import round_through

        dtype = getattr(torch, self.config.scale_dtype or "bfloat16")
        if self.config.symmetric:
            top = largest_magnitude(x)
            scale = round_through(top.mul(shrink / self.config.divisor), dtype)
            return {"scale": torch.where(top == 0, 1, scale)}
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        check_finite(low)
        check_finite(high)
        # the range always holds zero, so that zero is exact
        low, high = low.clamp_(max=0).mul_(shrink), high.clamp_(min=0).mul_(shrink)
        levels = 2**self.config.bits - 1
        scale = torch.where(low == high, 1, round_through((high - low) / levels, dtype))
        zero = (-low / scale.float()).round_().clamp_(0, levels)
        return {"scale": scale, "zero_point": zero.to(torch.uint8 if self.config.bits <= 8 else torch.int32)}

    def encode(self, x: Tensor, params: Params) -> Tensor:
        import torch

        from quantplan.numerics import round_to_integers

        levels = 2**self.config.bits - 1
        zero = 2 ** (self.config.bits - 1) if self.config.symmetric else params["zero_point"].float()
        units = x / params["scale"].float()
        if self.config.quotient_dtype != "float32":
            units = units.to(getattr(torch, self.config.quotient_dtype)).float()
        units = round_to_integers(units, self.generator)
        return units.add_(zero).clamp_(0, levels).to(torch.uint8 if self.config.bits <= 8 else torch.int32)

    def with_step(self, params: Params, step: Tensor) -> Params:
        return params | {"scale": stored_step(step, self.config.scale_dtype, params["scale"])}

    def with_zero_point(self, params: Params, zero_point: Tensor) -> Params:
        zero = zero_point.round().clamp(0, 2**self.config.bits - 1)
        return params | {"zero_point": zero.to(params["zero_point"].dtype)}

    def reach(self, params: Params) -> tuple[Tensor | float, Tensor | float]:
        zero = 2 ** (self.config.bits - 1) if self.config.symmetric else params["zero_point"].float()
        return -0.5 - zero, 2**self.config.bits - 0.5 - zero

    def nearest(self, x: Tensor, params: Params) -> Tensor:
        if self.generator is not None or self.config.quotient_dtype != "float32":
            return super().nearest(x, params)
        step, half = params["scale"].float(), 2 ** (self.config.bits - 1)
        units = (x / step).round_()
        if self.config.symmetric:
            return units.clamp_(-half, half - 1).add_(0.0).mul_(step)  # codes have one zero: -0.0 becomes 0.0
        zero = params["zero_point"].float()
        return units.add_(zero).clamp_(0, 2 * half - 1).sub_(zero).mul_(step)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        zero = 2 ** (self.config.bits - 1) if self.config.symmetric else params["zero_point"].float()
        return codes.float().sub_(zero).mul_(params["scale"].float())


@SCHEMES.register("int2")
class INT2Config(IntegerConfig):
    """2-bit integers: [-2, 1], or [0, 3] with a zero point."""

    bits: ClassVar[int] = 2
    default_group_size: ClassVar[int | None] = 32


@SCHEMES.register("int3")
class INT3Config(IntegerConfig):
    """3-bit integers: [-4, 3], or [0, 7] with a zero point."""

    bits: ClassVar[int] = 3
    default_group_size: ClassVar[int | None] = 32


@SCHEMES.register("int4")
class INT4Config(IntegerConfig):
    """4-bit integers: [-8, 7], or [0, 15] with a zero point."""

    bits: ClassVar[int] = 4
    default_group_size: ClassVar[int | None] = 32


@SCHEMES.register("int5")
class INT5Config(IntegerConfig):
    """5-bit integers: [-16, 15], or [0, 31] with a zero point."""

    bits: ClassVar[int] = 5


@SCHEMES.register("int6")
class INT6Config(IntegerConfig):
    """6-bit integers: [-32, 31], or [0, 63] with a zero point."""

    bits: ClassVar[int] = 6


@SCHEMES.register("int7")
class INT7Config(IntegerConfig):
    """7-bit integers: [-64, 63], or [0, 127] with a zero point."""

    bits: ClassVar[int] = 7


@SCHEMES.register("int8")
class INT8Config(IntegerConfig):
    """8-bit integers: [-128, 127], or [0, 255] with a zero point."""

    bits: ClassVar[int] = 8


class INT16Config(IntegerConfig):
    """16-bit integers: [-32768, 32767], or [0, 65535] with a zero point; codes are int32. Not in the registry: float16 takes as
    many bits, and checkpoints and kernels hold codes of a byte. For `RealQuantize` and its like (seed 002)."""

    name: ClassVar[str] = "int16"
    bits: ClassVar[int] = 16


# seed 001 names a quantizer for each width; the arithmetic is one
INT2Quantizer = INT3Quantizer = INT4Quantizer = INT5Quantizer = IntegerQuantizer
INT6Quantizer = INT7Quantizer = INT8Quantizer = IntegerQuantizer
