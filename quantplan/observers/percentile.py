"""percentile: a range that leaves out a small share of values on each side."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.observer import OBSERVERS, CountingConfig, Range, Statistics

if TYPE_CHECKING:
    from quantplan.scheme import Quantizer


@OBSERVERS.register("percentile")
class PercentileConfig(CountingConfig):
    """Leaves out a small share of the values on each side. Takes no notice of how far outliers lie. Values are counted as the
    nearest bfloat16, in memory that does not grow: of bfloat16 activations the percentile is exact."""

    use: ClassVar[str] = "activations with a few extreme values"
    ranging: ClassVar[frozenset[str]] = frozenset({"percentile"})

    percentile: float = Field(default=99.99, gt=50, le=100)
    """percent of the values that are not above the range, and likewise not below it; 100: all of them"""

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        import torch

        from quantplan.numerics import counted_values

        values, counts = counted_values(seen["counts"])
        upto = counts.cumsum(0)
        total = int(upto[-1])
        # in fractions of what was written: 100 - 99.9 is less than 0.1 in floating point
        left_out = int(total * (100 - Fraction(str(self.percentile))) / 100)
        ranks = torch.tensor([left_out + 1, total - left_out])  # from 1
        low, high = values[torch.searchsorted(upto, ranks)]
        whole = Range(seen["low"], seen["high"])
        if left_out == 0:
            return whole
        inside = whole.to("cpu")  # rounding to bfloat16 must not lead out of what was seen
        found = Range(low.clamp(inside.low, inside.high), high.clamp(inside.low, inside.high))
        return found.to(whole.low.device)
