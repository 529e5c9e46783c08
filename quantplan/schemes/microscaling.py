"""mxfp4, mxfp6, mxfp8: blocks of 32 small floats that share a power-of-two scale.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3. The scale is one e8m0 byte, `2 ** (byte - 127)`,
with `byte = floor(log2(absmax)) - emax + 127`; what lies above the largest value saturates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from quantplan.scheme import SCHEMES, Granularity, Layout, Params, Quantizer, SchemeConfig, largest_magnitude

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.numerics import FloatFormat


class MXConfig(SchemeConfig):
    """Options of the microscaling schemes."""

    granularities: ClassVar[tuple[Granularity, ...]] = ("group",)
    fixed_group_size: ClassVar[int | None] = 32
    fine_steps: ClassVar[bool] = False
    format: str

    def float_format(self) -> FloatFormat:
        """The element's format."""
        from quantplan import numerics

        return getattr(numerics, self.format.upper())

    def shrink_factors(self, count: int, lowest: float) -> list[float]:
        return [1.0, 2.0, 0.5]  # scales are powers of two: the neighbours are all there is

    def param_layout(self, rows: int, columns: int) -> Layout:
        return {"scale": ("U8", self.grid(rows, columns))}

    def quantizer(self, stream: str = "") -> MXQuantizer:
        return MXQuantizer(self, stream)


class MXQuantizer(Quantizer):
    """Arithmetic of the microscaling formats; parameters hold the e8m0 byte as uint8."""

    config: MXConfig

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        top = largest_magnitude(x).mul_(shrink)
        exponent = torch.frexp(top).exponent - 1  # floor(log2 top), exact
        byte = (exponent - self.config.float_format().maximum_exponent + 127).clamp_(0, 254)
        return {"scale": torch.where(top == 0, 127, byte).to(torch.uint8)}

    def encode(self, x: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import encode_float

        return encode_float(x / _power(params["scale"]), self.config.float_format(), self.generator)

    def step(self, params: Params) -> Tensor:
        return _power(params["scale"])

    def with_step(self, params: Params, step: Tensor) -> Params:
        import torch

        byte = step.clamp(min=torch.finfo(torch.float32).tiny).log2().round_().add_(127).clamp_(0, 254)
        return {"scale": byte.to(torch.uint8)}

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import decode_float

        return decode_float(codes, self.config.float_format()).mul_(_power(params["scale"]))


def _power(byte: Tensor) -> Tensor:
    """`2 ** (byte - 127)`, float32."""
    import torch

    return torch.ldexp(torch.ones(byte.shape, device=byte.device), byte.int() - 127)


@SCHEMES.register("mxfp4")
class MXFP4Config(MXConfig):
    """4-bit microscaling floats (e2m1), blocks of 32."""

    bits: ClassVar[int] = 4
    format: Literal["e2m1"] = "e2m1"
    """exponent and mantissa bits"""


@SCHEMES.register("mxfp6")
class MXFP6Config(MXConfig):
    """6-bit microscaling floats (e2m3 or e3m2), blocks of 32."""

    bits: ClassVar[int] = 6
    format: Literal["e2m3", "e3m2"] = "e2m3"
    """exponent and mantissa bits"""


@SCHEMES.register("mxfp8")
class MXFP8Config(MXConfig):
    """8-bit microscaling floats (e4m3 or e5m2), blocks of 32."""

    bits: ClassVar[int] = 8
    format: Literal["e4m3", "e5m2"] = "e4m3"
    """exponent and mantissa bits"""
