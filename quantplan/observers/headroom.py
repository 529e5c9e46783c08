"""headroom: a range as wide as blocks with scales of their own allow, for the one scale above them (nvfp4 activations).

A block's scale is a small float: e4m3 holds 2^-9 to 448. A range of just the largest magnitude seen leaves no room above it, and
all the room below is of no use. The rule is ModelOpt's `nvfp4_act_headroom`: `max(ratio * anchor, upper)`, with `anchor` a low
percentile of the blocks' largest magnitudes and `upper` a high one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.observer import OBSERVERS, CountingConfig, Range, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer

NOTHING = 1e-6  # blocks that lie lower, as a share of `upper`, hold nothing that counts


@OBSERVERS.register("headroom")
class HeadroomConfig(CountingConfig):
    """A range far above the largest magnitude, as long as the scales of small blocks stay normal numbers. Counts the largest
    magnitudes of blocks; for integers and fp8, whose range is their grid, it is far too wide."""

    use: ClassVar[str] = "nvfp4 activations: room for what calibration has not seen"
    within: ClassVar[bool] = False
    collects: ClassVar[str] = "block_counts"
    ranging: ClassVar[frozenset[str]] = frozenset({"ratio", "small", "large"})

    block: int = Field(default=16, ge=1, le=4096)
    """neighbouring features that share a scale"""
    ratio: float = Field(default=16384, ge=1, le=1e6)
    """how far above a small block the range may end: e4m3's normal numbers reach over 28672"""
    small: float = Field(default=1, ge=0, lt=50)
    """percent of the blocks that lie below the small one"""
    large: float = Field(default=99.99, gt=50, le=100)
    """percent of the blocks that the range holds in any case"""

    def collect(self, x: Tensor) -> Statistics:
        import torch

        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.block))
        return super().collect(x.unflatten(-1, (-1, self.block)).abs().amax(-1))

    def range(self, seen: Statistics, quantizer: Quantizer | None) -> Range:
        from quantplan.numerics import counted_values

        values, counts = counted_values(seen["counts"])
        upper = self._percentile(values, counts, self.large)
        counting = values >= upper * NOTHING
        anchor = self._percentile(values[counting], counts[counting], self.small)
        high = (anchor * self.ratio).clamp(min=upper).float().to(seen["high"].device)
        return Range(-high, high)

    def _percentile(self, values: Tensor, counts: Tensor, percent: float) -> Tensor:
        """The least of `values`, which ascend, that at least `percent` percent are not above."""
        import torch

        upto = counts.cumsum(0).double()
        at = torch.searchsorted(upto, (upto[-1] * percent / 100).reshape(1)).clamp(max=len(values) - 1)
        return values[at[0]]
