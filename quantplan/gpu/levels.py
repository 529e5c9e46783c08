"""What the codes of a scheme are worth, as kernels want to know it; found by asking the scheme, so that new ones are served."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from quantplan.numerics import E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat, float_values
from quantplan.scheme import SchemeConfig


@dataclass(frozen=True)
class Levels:
    """`value = step * (level - zero point)`. The level of a code is the code (`integer`), a float of `mantissa` bits (`float`;
    `unit` is 2 to the difference between a float32's bias and its own), or found in a table."""

    kind: Literal["integer", "float", "table"]
    bits: int
    mantissa: int = 0
    unit: float = 1.0


@cache
def levels_of(scheme: SchemeConfig) -> Levels:
    """How a kernel gets from codes to levels."""
    values = level_table(scheme)
    integers = torch.arange(2**scheme.bits) - (2 ** (scheme.bits - 1) if scheme.symmetric_grid else 0)
    if torch.allclose(values, integers.float(), atol=1e-4):
        return Levels("integer", scheme.bits)
    known = format_of(scheme)
    return Levels("float", known.bits, known.mantissa_bits, 2.0 ** (127 - known.bias)) if known else Levels("table", scheme.bits)


@cache
def format_of(scheme: SchemeConfig) -> FloatFormat | None:
    """The small float that the levels are; None where they are none."""
    values, formats = level_table(scheme), (E2M1, E2M3, E3M2, E4M3, E5M2)
    same = (f for f in formats if f.bits == scheme.bits and torch.allclose(values, float_values(f), equal_nan=True))
    return next(same, None)


@cache
def level_table(scheme: SchemeConfig) -> Tensor:
    """The level of every code, float32 `[2 ** bits]`."""
    quantizer = scheme.quantizer()
    params = quantizer.fit(torch.tensor([-1.0, 1.0]), absmax=torch.tensor(1.0))
    values = quantizer.decode(torch.arange(2**scheme.bits, dtype=torch.uint8), params) / quantizer.step(params)
    return values + params["zero_point"].float() if "zero_point" in params else values
