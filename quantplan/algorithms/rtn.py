"""rtn: round to nearest, with ranges from the largest magnitude or from a search over shrunken ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from quantplan.algorithm import ALGORITHMS, Algorithm, Need
from quantplan.scale_search import Cheapest, Ranges, search_by_hessian, search_scales

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params, Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor


@ALGORITHMS.register("rtn")
class RoundToNearest(Algorithm):
    """Round to nearest: needs no data."""

    search: Literal["minmax", "mse", "imatrix", "hessian"] = "minmax"
    """`minmax`: the range covers every weight; `mse`: per group the range, of a grid of shrunken ones, with the least squared
    error; `imatrix`: the same with each weight counting as the mean square of its input, which takes calibration;
    `hessian`: likewise, but with the least squared error of the group's outputs"""
    grid: int = Field(default=25, ge=2, le=1000)
    """ranges that searches try"""
    lowest: float = Field(default=0.4, gt=0, lt=1)
    """the narrowest of them, as a share of the full one"""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"hessian"}) if self.search in ("imatrix", "hessian") else frozenset()

    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        groups = quantizer.groups(weight)
        if absmax is None and quantizer.config.needs_absmax:
            absmax = groups.abs().amax()
        ranges = Ranges(self.grid, self.lowest)
        if self.search == "imatrix":
            assert statistics is not None, "search: imatrix needs statistics"
            params = search_scales(weight, quantizer, statistics.hessian.diagonal(), ranges, absmax)
        elif self.search == "hessian":
            assert statistics is not None, "search: hessian needs statistics"
            params = search_by_hessian(weight, quantizer, statistics.hessian, ranges, absmax)
        elif self.search == "mse":
            params = self._least_error(groups, quantizer, absmax)
        else:
            params = quantizer.fit(groups, absmax=absmax)
        return quantizer.quantize_groups(groups, params, *weight.shape)

    def _least_error(self, groups: Tensor, quantizer: Quantizer, absmax: Tensor | None) -> Params:
        """Per group, the parameters of the factor with the least squared error; ties go to the wider range."""
        best = Cheapest(quantizer)
        for factor in quantizer.config.shrink_factors(self.grid, self.lowest):
            params = quantizer.fit(groups, factor, absmax)
            error = quantizer.decode(quantizer.encode(groups, params), params).sub_(groups).square_().sum(-1, keepdim=True)
            best.offer(params, error)
        return best.params
