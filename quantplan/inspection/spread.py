"""How numbers are spread: extremes, moments, and the outlier check of seed 003."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 6.0  # standard deviations: seed 003's `check_activation_outliers`


@dataclass(frozen=True)
class Spread:
    """Figures over all finite numbers of a tensor. `std` is that of a sample (n - 1); `kurtosis = m4 / m2^2` of central
    moments, 3 for a normal distribution; `peak = absmax / rms`; `sigmas = (absmax - mean) / std`, which makes an `outlier` of a
    tensor where it is over 6. `nonfinite` counts NaN and infinity, which the other figures leave out."""

    minimum: float
    maximum: float
    absmax: float
    mean: float
    std: float
    rms: float
    kurtosis: float
    peak: float
    sigmas: float
    nonfinite: int = 0

    @property
    def outlier(self) -> bool:
        """Seed 003's check: `absmax > mean + 6 std`."""
        return self.absmax > self.mean + THRESHOLD * self.std

    def as_dict(self) -> dict[str, Any]:
        """Plain data; every number is finite."""
        return {**asdict(self), "outlier": self.outlier}


class SpreadSums:
    """The sums behind a `Spread`, in float64, of pieces as they come."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._count = self._nonfinite = 0
        self._powers = [0.0] * 4

    def add(self, x: Tensor) -> None:
        """One more piece, any float dtype and shape; not changed."""
        import torch

        found = x.double().flatten()
        finite = found.isfinite()
        if not bool(finite.all()):
            self._nonfinite += int((~finite).sum())
            found = found[finite]
        if not found.numel():
            return
        low, high = torch.aminmax(found)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        squares = found * found
        powers = (found.sum(), squares.sum(), (squares * found).sum(), squares.square_().sum())
        self._powers = [total + float(p) for total, p in zip(self._powers, powers, strict=True)]
        self._count += found.numel()

    def result(self) -> Spread:
        """The figures; zeros when there were no numbers."""
        n = self._count
        if not n:
            return Spread(0, 0, 0, 0, 0, 0, 0, 0, 0, self._nonfinite)
        m1, m2, m3, m4 = (total / n for total in self._powers)
        variance = max(0.0, m2 - m1 * m1)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        std, rms = math.sqrt(variance * n / max(1, n - 1)), math.sqrt(m2)
        absmax = max(-self._low, self._high)
        return Spread(
            minimum=self._low,
            maximum=self._high,
            absmax=absmax,
            mean=m1,
            std=std,
            rms=rms,
            kurtosis=max(0.0, fourth) / variance**2 if variance else 0.0,
            peak=absmax / rms if rms else 0.0,
            sigmas=(absmax - m1) / std if std else 0.0,
            nonfinite=self._nonfinite,
        )
