"""moving_average: exponential moving averages of every batch's least and largest value.

`low += averaging_constant * (batch's low - low)`, and so for `high`; the first batch sets them (as torch.ao's
MovingAverageMinMaxObserver).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.observer import OBSERVERS, ObserverConfig, Range, Statistics, extremes

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer


@OBSERVERS.register("moving_average")
class MovingAverageConfig(ObserverConfig):
    """Exponential moving averages of every batch's least and largest value. Follows activations that drift, and lags
    behind them. Partial runs merge as though one came after the other."""

    use: ClassVar[str] = "activations that drift: training"
    order_matters: ClassVar[bool] = True

    averaging_constant: float = Field(default=0.01, gt=0, le=1)
    """weight of the newest batch"""
    axis: int | None = None
    """the axis of channels that have averages of their own; by default there is one range for the tensor"""

    @property
    def channel_axis(self) -> int | None:
        return self.axis

    def collect(self, x: Tensor) -> Statistics:
        import torch

        low, high = extremes(x, by_channel=self.axis is not None)
        batches = torch.ones((), dtype=torch.int64, device=x.device)
        return {"low": low, "high": high, "first_low": low, "first_high": high, "batches": batches}

    def join(self, first: Statistics, second: Statistics) -> Statistics:
        joined = {name: first[name] for name in ("first_low", "first_high")}
        joined["batches"] = first["batches"] + second["batches"]
        # An average that starts at `start` and ends at `end` after n batches has forgotten all but (1 - c) ** (n - 1) of
        # its start; had it started from `before`, its first batch being one more, it would have ended here. Where `second`
        # is one batch, `end` is `start`, and this is the usual step.
        moved = 1 - (1 - self.averaging_constant) ** second["batches"].item()
        for side in ("low", "high"):
            before, start, end = first[side], second[f"first_{side}"], second[side]
            joined[side] = before + (end - start) + moved * (start - before)
        return joined

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        return Range(seen["low"], seen["high"])
