"""histogram: counts in equal bins, and the range with the least error of rounding, by torch.ao's HistogramObserver's rules.

The search narrows the range from both ends in quantiles, always on the side that passes more bins, until the error grows.
The error takes the values of a bin as spread evenly over it: the integral of the squared distance to the centres of the
`2 ** bits` steps that the range is cut into (NormMinimization of Caffe2's quantization server).
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics, extremes, hull
from quantplan.scheme import check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer

QUANTILE = 1e-5  # of all values: the search's step
PIECE = 1 << 24  # values counted at a time: float32 counts are exact up to here


@OBSERVERS.register("histogram")
class HistogramConfig(ObserverConfig):
    """Counts in equal bins, and the range with the least error of rounding to uniform steps. The search ends where
    the error first grows, often near the whole range. Bins are spread anew when the range grows, so that partial runs merge
    approximately."""

    use: ClassVar[str] = "activations with outliers, uniform grids; the same as torch.ao"
    order_matters: ClassVar[bool] = True
    ranging: ClassVar[frozenset[str]] = frozenset({"bits"})

    bins: int = Field(default=2048, ge=2, le=1 << 20)
    """bins between the least and the largest value"""
    bits: int | None = Field(default=None, ge=1, le=32)
    """bits of the grid that the range is for; by default the quantizer's, or 8"""
    upsample_rate: int = Field(default=16, ge=1, le=1024)
    """parts that a bin falls into when bins are spread anew"""

    def collect(self, x: Tensor) -> Statistics:
        low, high = extremes(x)
        return {"low": low, "high": high, "histogram": self._count(x, low, high)}

    def advance(self, seen: Statistics, x: Tensor) -> Statistics:
        low, high = extremes(x)
        both = hull(seen, {"low": low, "high": high})
        counts = self._count(x, **both)  # in the bins to come: only what was seen before is spread anew
        return {**both, "histogram": self._spread(seen, **both).add_(counts)}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        both = hull(first, second)
        return {**both, "histogram": self._spread(first, **both).add_(self._spread(second, **both))}

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        low, high = seen["low"], seen["high"]
        if low == high or (quantizer is not None and quantizer.config.needs_absmax):
            return Range(low, high)  # a static range over blocks with scales of their own only has to cover them
        start, end = self._least_error(seen["histogram"].cpu(), self.bits or (quantizer.config.bits if quantizer else 8))
        width = (high - low) / self.bins
        return Range(low + width * start, low + width * (end + 1))

    def _count(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Values in each bin, float64: exact, and what is spread in powers of two stays so. Raises NonFinite where the range
        is too wide for float32."""
        import torch

        check_finite((high - low) * self.bins)
        first, last = low.item(), high.item()
        counts = torch.zeros(self.bins, dtype=torch.float64, device=x.device)
        for piece in x.reshape(-1).split(PIECE):
            counts += torch.histc(piece.float(), self.bins, first, last)
        return counts

    def _spread(self, seen: Statistics, low: Tensor, high: Tensor) -> Tensor:
        """Counts in the bins of a range that holds the one seen: each part of a bin goes where its centre lies."""
        import torch

        counts = seen["histogram"]
        if seen["low"] == low and seen["high"] == high:
            return counts.clone()
        if seen["low"] == seen["high"]:
            return self._count(seen["low"].reshape(1), low, high).mul_(counts.sum())
        parts = self.bins * self.upsample_rate
        check_finite((high - low) * self.bins)
        starts = torch.linspace(seen["low"].item(), seen["high"].item(), parts + 1, device=counts.device)[:-1]
        edges = torch.linspace(low.item(), high.item(), self.bins + 1, device=counts.device)
        centres = starts + (seen["high"] - seen["low"]) / (2 * parts)
        places = torch.searchsorted(edges, centres, right=True).sub_(1).clamp_(0, self.bins - 1)
        share = counts.repeat_interleave(self.upsample_rate) / self.upsample_rate
        return torch.bincount(places, weights=share, minlength=self.bins)

    def _least_error(self, counts: Tensor, bits: int) -> tuple[int, int]:
        """The first and the last bin of the range found."""
        upto = counts.cumsum(0)
        total, held = upto[-1].item(), upto.tolist()
        start, end = 0, self.bins - 1
        below, above = 0.0, 1.0  # the quantiles the search has come to
        least = float("inf")
        while below < above:
            lower, upper = below + QUANTILE, above - QUANTILE
            left = bisect_left(held, float32(lower * total), start, end)
            right = max(start, bisect_right(held, float32(upper * total), start, end + 1) - 1)
            if left - start > end - right:
                below, right = lower, end
            else:
                above, left = upper, start
            if (left, right) == (start, end):
                continue
            error = self._error(counts, left, right, 2**bits)
            if error > least:
                break
            least, start, end = error, left, right
        return start, end

    def _error(self, counts: Tensor, start: int, end: int, steps: int) -> float:
        """The squared error of rounding to the centres of `steps` equal steps from bin `start` through bin `end`; in bins."""
        import torch

        step = (end - start + 1) / steps
        edges = torch.arange(-start, self.bins - start + 1, dtype=torch.float64)
        place = (edges / step).floor_().clamp_(0, steps - 1)
        # the integral of (x - centre of the step x lies in) ** 2 up to each edge
        integral = (edges - (place + 0.5) * step).pow_(3).div_(3) + place * (step**3 / 12)
        return torch.dot(counts, integral.diff()).item()


def float32(x: float) -> float:
    """`x` rounded to float32: torch.ao compares counts with quantiles so, and a whole number is then met and not passed."""
    return struct.unpack("f", struct.pack("f", x))[0]
