"""How far one matrix is from another, summed piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """`x`, the reference, against `y`: `snr = 10 log10(sum x^2 / sum (x - y)^2)` in dB, infinite when they are equal;
    `relative = sqrt(sum (x - y)^2 / sum x^2)`; `largest = max |x - y|`; `mean = mean |x - y|`; `squared = mean (x - y)^2`;
    `cosine = x·y / (|x| |y|)`; `mean_relative = mean(|x - y| / (|x| + 1e-8))`, seed 003's, which numbers near zero dominate."""

    snr: float
    relative: float
    largest: float
    mean: float
    squared: float
    cosine: float
    mean_relative: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data; JSON has neither infinity nor NaN, so what is equal has no `snr_db`."""
        found = {
            "snr_db": round(self.snr, 3),
            "relative_error": self.relative,
            "max_error": self.largest,
            "mean_error": self.mean,
            "mean_squared_error": self.squared,
            "cosine": self.cosine,
            "mean_relative_error": self.mean_relative,
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


class DifferenceSums:
    """The sums behind a `Difference`, in float64, of pieces as they come."""

    def __init__(self) -> None:
        self._signal = self._noise = self._other = self._product = self._absolute = self._relative = self._largest = 0.0
        self._count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """One more piece: `x` of the reference, `y` of the other, float32, same shape; not changed."""
        if not x.numel():
            return
        difference = (y - x).abs_()
        self._signal += float(x.double().square_().sum())
        self._other += float(y.double().square_().sum())
        self._product += float(x.double().mul_(y).sum())
        self._noise += float(difference.double().square_().sum())
        self._absolute += float(difference.double().sum())
        self._largest = max(self._largest, float(difference.amax()))
        self._relative += float((difference / x.abs().add_(1e-8)).double().sum())
        self._count += x.numel()

    def result(self) -> Difference:
        """The figures. A reference of zeros has a relative error of 0 where the other is zero too, else infinity."""
        exact, lengths = self._noise == 0, math.sqrt(self._signal * self._other)
        known = self._noise and self._signal
        return Difference(
            snr=10 * math.log10(self._signal / self._noise) if known else math.inf if exact else -math.inf,
            relative=math.sqrt(self._noise / self._signal) if known else 0.0 if exact else math.inf,
            largest=self._largest,
            mean=self._absolute / max(1, self._count),
            squared=self._noise / max(1, self._count),
            cosine=self._product / lengths if lengths else 1.0 if exact else 0.0,
            mean_relative=self._relative / max(1, self._count),
        )


def difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """The difference over pieces `(x, y)` of the reference and the other, float32."""
    sums = DifferenceSums()
    for x, y in pairs:
        sums.add(x, y)
    return sums.result()
