"""fp8 and fp4: small floating-point codes times a scale per tensor, channel, group, block or token."""

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
    largest_magnitude,
    stored_step,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.numerics import FloatFormat


class FloatConfig(SchemeConfig):
    """Options of the scaled floating-point schemes."""

    format: str
    scale_dtype: DType | None = None
    """dtype scales are stored in, and rounded to before codes are chosen; by default that of the weight (bfloat16 for
    float32 weights)"""

    def float_format(self) -> FloatFormat:
        """The code's format."""
        from quantplan import numerics

        return {"e4m3": numerics.E4M3, "e5m2": numerics.E5M2, "e2m1": numerics.E2M1}[self.format]

    def param_layout(self, rows: int, columns: int) -> Layout:
        return {"scale": (SAFETENSORS_DTYPES[self.scale_dtype or "bfloat16"], self.grid(rows, columns))}

    def quantizer(self, stream: str = "") -> FloatQuantizer:
        return FloatQuantizer(self, stream)


class FloatQuantizer(Quantizer):
    """`w = value(code) * scale`, `scale = absmax / maximum`; saturating (Micikevicius et al. 2022, arXiv 2209.05433)."""

    config: FloatConfig

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        from quantplan.numerics import round_through

        dtype = getattr(torch, self.config.scale_dtype or "bfloat16")
        top = largest_magnitude(x)
        scale = round_through(top.mul(shrink / self.config.float_format().maximum), dtype)
        return {"scale": torch.where(top == 0, 1, scale)}

    def encode(self, x: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import encode_float

        return encode_float(x / params["scale"].float(), self.config.float_format(), self.generator)

    def with_step(self, params: Params, step: Tensor) -> Params:
        return {"scale": stored_step(step, self.config.scale_dtype, params["scale"])}

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import decode_float

        return decode_float(codes, self.config.float_format()).mul_(params["scale"].float())


@SCHEMES.register("fp8")
class FP8Config(FloatConfig):
    """8-bit floats: e4m3 (largest 448) or e5m2 (largest 57344)."""

    bits: ClassVar[int] = 8
    format: Literal["e4m3", "e5m2"] = "e4m3"
    """exponent and mantissa bits"""


@SCHEMES.register("fp4")
class FP4Config(FloatConfig):
    """4-bit floats e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) with a float scale."""

    bits: ClassVar[int] = 4
    default_group_size: ClassVar[int | None] = 32
    format: Literal["e2m1"] = "e2m1"
    """exponent and mantissa bits"""


# seed 001 names a quantizer for each width; the arithmetic is one
FP8Quantizer = FP4Quantizer = FloatQuantizer
