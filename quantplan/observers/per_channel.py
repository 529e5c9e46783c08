"""per_channel: the least and the largest value ever seen of each channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics, extremes, hull

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer


@OBSERVERS.register("per_channel")
class PerChannelConfig(ObserverConfig):
    """The least and the largest value ever seen of each channel. One outlier widens the range of its own channel only."""

    use: ClassVar[str] = "weights, by output channel; outlier features of activations"

    axis: int = -1
    """the axis of channels: -1 features, 0 the output channels of a weight"""

    @property
    def channel_axis(self) -> int:
        return self.axis

    def collect(self, x: Tensor) -> Statistics:
        low, high = extremes(x, by_channel=True)
        return {"low": low, "high": high}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        return hull(first, second)

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        return Range(seen["low"], seen["high"])
