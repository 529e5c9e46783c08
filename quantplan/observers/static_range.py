"""static_range: the mean of the largest magnitudes of all batches (seed 004's `count` and `sum_of_absmax`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics, extremes

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer


@OBSERVERS.register("static_range")
class StaticRangeConfig(ObserverConfig):
    """The mean over batches of the largest magnitude, on both sides of zero. One odd batch hardly moves it; what lies
    above the mean saturates."""

    use: ClassVar[str] = "static activations of quantization-aware training"

    def collect(self, x: Tensor) -> Statistics:
        import torch

        absmax = torch.stack(extremes(x)).abs().amax()
        # a sum of float32 numbers of like size is exact in float64, so that the order of batches does not show
        return {"count": torch.ones((), dtype=torch.int64, device=x.device), "sum_of_absmax": absmax.double()}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        return {name: first[name] + second[name] for name in first}

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        high = (seen["sum_of_absmax"] / seen["count"]).float()
        return Range(-high, high)
