"""nf4: sixteen levels at the quantiles of a normal distribution, with a scale per group.

Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), appendix E, whose level table this is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

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

# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@SCHEMES.register("nf4")
class NF4Config(SchemeConfig):
    """4-bit normal floats: sixteen quantile levels in [-1, 1] times a scale."""

    bits: ClassVar[int] = 4
    default_group_size: ClassVar[int | None] = 64
    scale_dtype: DType | None = None
    """dtype scales are stored in, and rounded to before codes are chosen; by default that of the weight (bfloat16 for
    float32 weights)"""

    def param_layout(self, rows: int, columns: int) -> Layout:
        return {"scale": (SAFETENSORS_DTYPES[self.scale_dtype or "bfloat16"], self.grid(rows, columns))}

    def quantizer(self, stream: str = "") -> NF4Quantizer:
        return NF4Quantizer(self, stream)


class NF4Quantizer(Quantizer):
    """Table arithmetic: `w = LEVELS[code] * scale`, the nearest level by comparing with the midpoints."""

    config: NF4Config

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        from quantplan.numerics import round_through

        top = largest_magnitude(x)
        scale = round_through(top.mul(shrink), getattr(torch, self.config.scale_dtype or "bfloat16"))
        return {"scale": torch.where(top == 0, 1, scale)}

    def encode(self, x: Tensor, params: Params) -> Tensor:
        import torch

        from quantplan.numerics import chance

        levels = torch.tensor(LEVELS, device=x.device)
        y = (x / params["scale"].float()).clamp_(-1, 1).contiguous()
        if self.generator is None:
            return torch.bucketize(y, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        above = torch.bucketize(y, levels).clamp_(min=1)  # up with probability equal to the distance from the level below
        low, high = levels[above - 1], levels[above]
        return (above - (chance(y, self.generator) >= (y - low) / (high - low)).long()).to(torch.uint8)

    def with_step(self, params: Params, step: Tensor) -> Params:
        return {"scale": stored_step(step, self.config.scale_dtype, params["scale"])}

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        import torch

        from quantplan.numerics import look_up

        return look_up(torch.tensor(LEVELS), codes).mul_(params["scale"].float())
