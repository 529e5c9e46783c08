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
    import torch
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
    """`w = value(code) * scale`, `scale = absmax / maximum`; saturating (Micikevicius et al. 2022, arXiv 2209.05433).

    With a zero point `z`, `w = (value(code) - z) * scale`: the grid is moved to cover a range that lies to one side. `z` is
    a whole number that the format holds, so that zero is exact.
    """

    config: FloatConfig

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        from quantplan.numerics import round_through

        dtype, maximum = getattr(torch, self.config.scale_dtype or "bfloat16"), self.config.float_format().maximum
        if not self.config.symmetric_grid:
            return self._fit_range(x, shrink, dtype, maximum)
        top = largest_magnitude(x)
        scale = round_through(top.mul(shrink / maximum), dtype)
        return {"scale": torch.where(top == 0, 1, scale)}

    def _fit_range(self, x: Tensor, shrink: float, dtype: torch.dtype, maximum: float) -> Params:
        """The zero point that lets the grid's ends meet those of the range best, and the scale that covers the range."""
        import torch

        from quantplan.numerics import round_through

        largest_magnitude(x)  # raises NonFinite
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        low, high = low.clamp_(max=0).mul_(shrink), high.clamp_(min=0).mul_(shrink)
        width = torch.where(low == high, 1, high - low)
        zero = self._whole(-maximum - low * (2 * maximum / width))
        inner = self._whole(torch.full_like(zero, maximum - 1.5))  # an end of the grid is for zero only where nothing lies beyond
        zero = torch.where(high > 0, torch.minimum(zero, inner), zero)
        zero = torch.where(low < 0, torch.maximum(zero, -inner), zero)
        above = torch.where(zero < maximum, high / (maximum - zero).clamp(min=1), 0)
        below = torch.where(zero > -maximum, -low / (maximum + zero).clamp(min=1), 0)
        scale = torch.where(low == high, 1, round_through(torch.maximum(above, below), dtype))
        return {"scale": scale, "zero_point": zero.to(torch.int8)}

    def _whole(self, zero: Tensor) -> Tensor:
        """The nearest whole number that the format holds."""
        import torch

        from quantplan.numerics import float_values

        values = float_values(self.config.float_format())
        whole = values[torch.isfinite(values) & (values == values.round())].unique().to(zero.device)
        return whole[torch.bucketize(zero.contiguous(), (whole[1:] + whole[:-1]) / 2)]

    def encode(self, x: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import encode_float

        units = x / params["scale"].float()
        if "zero_point" in params:
            units = units + params["zero_point"].float()
        return encode_float(units, self.config.float_format(), self.generator)

    def with_step(self, params: Params, step: Tensor) -> Params:
        return params | {"scale": stored_step(step, self.config.scale_dtype, params["scale"])}

    def with_zero_point(self, params: Params, zero_point: Tensor) -> Params:
        return params | {"zero_point": self._whole(zero_point).to(params["zero_point"].dtype)}

    def reach(self, params: Params) -> tuple[Tensor | float, Tensor | float]:
        zero = params["zero_point"].float() if "zero_point" in params else 0.0
        low, high = super().reach({"scale": params["scale"]})
        return low - zero, high - zero

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import decode_float

        values = decode_float(codes, self.config.float_format())
        if "zero_point" in params:
            values = values.sub_(params["zero_point"].float())
        return values.mul_(params["scale"].float())


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
    symmetric: bool = True
    """whether zero is the middle of the grid; if not, the grid is moved by a whole number, stored with every scale (seed 000's
    asymmetric FP4: activations that lie to one side of zero)"""

    @property
    def symmetric_grid(self) -> bool:
        return self.symmetric

    def param_layout(self, rows: int, columns: int) -> Layout:
        layout = super().param_layout(rows, columns)
        return layout if self.symmetric else {**layout, "zero_point": ("I8", self.grid(rows, columns))}


# seed 001 names a quantizer for each width; the arithmetic is one
FP8Quantizer = FP4Quantizer = FloatQuantizer
