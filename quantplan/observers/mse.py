"""mse: the range, of a grid of shrunken ones, with the least squared error of rounding and saturating."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.observer import OBSERVERS, CountingConfig, Range, Statistics
from quantplan.scheme import SCHEMES

if TYPE_CHECKING:
    from quantplan.scheme import Quantizer


@OBSERVERS.register("mse")
class MSEConfig(CountingConfig):
    """The range, of a grid of shrunken ones, with the least squared error on the grid of the scheme itself. Values are
    counted as the nearest bfloat16, in memory that does not grow."""

    use: ClassVar[str] = "static ranges of few bits"
    ranging: ClassVar[frozenset[str]] = frozenset({"grid", "lowest"})

    grid: int = Field(default=100, ge=2, le=1000)
    """ranges tried, each narrower than the last by one ratio"""
    lowest: float = Field(default=0.001, gt=0, lt=1)
    """the narrowest range tried, as a share of the largest magnitude"""

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        """Both ends are cut at one magnitude, so that the nearer one stays until the farther one has come as close. Ties go
        to the wider range."""
        import torch

        from quantplan.numerics import counted_values

        whole = Range(seen["low"], seen["high"]).to("cpu")
        if quantizer is None:
            quantizer = SCHEMES.get("int8").model_validate({"symmetric": False, "scale_dtype": "float32"}).quantizer()
        if quantizer.config.needs_absmax:
            return whole  # blocks have scales of their own: the static range only has to cover them
        # which codes are nearest, not which were drawn
        quantizer = quantizer.config.model_copy(update={"rounding": "nearest"}).quantizer()
        values, counts = counted_values(seen["counts"])
        best, least = whole, torch.inf
        for i in range(self.grid):
            top = whole.absmax * self.lowest ** (i / (self.grid - 1))
            cut = Range(whole.low.clamp(-top, top), whole.high.clamp(-top, top))
            params = quantizer.fit_range(cut)
            rounded = quantizer.decode(quantizer.encode(values, params), params)
            error = (rounded.double() - values).square_().mul_(counts).sum().item()
            if error < least:
                best, least = cut, error
        return best.to(seen["low"].device)
