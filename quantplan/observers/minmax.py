"""minmax: the least and the largest value ever seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics, extremes, hull

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer


@OBSERVERS.register("minmax")
class MinMaxConfig(ObserverConfig):
    """The least and the largest value ever seen. Nothing saturates; one outlier widens the range for good."""

    use: ClassVar[str] = "weights, floating-point schemes, activations without outliers"

    def collect(self, x: Tensor) -> Statistics:
        low, high = extremes(x)
        return {"low": low, "high": high}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        return hull(first, second)

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        return Range(seen["low"], seen["high"])
