"""awq: ranges that cost the layer's outputs least, after channels were scaled by the transform of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from quantplan.algorithm import ALGORITHMS, Algorithm, Need
from quantplan.scale_search import Ranges, mixed, search_scales

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params, Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor


@ALGORITHMS.register("awq")
class AWQ(Algorithm):
    """Activation-aware rounding (Lin et al. 2023, arXiv 2306.00978): its transform scales channels, then each group gets the
    range with the least error, weights counting as the mean square of their inputs. No error is passed on, as GPTQ does."""

    passes: ClassVar[float] = 45.0
    # a matrix alone has nowhere to put the inverse of its channels' factors: scaling is a matter of edges, so a transform's
    implies: ClassVar[Mapping[str, Mapping[str, Any]]] = {"awq": {"where": "awq"}}

    grid: int = Field(default=16, ge=2, le=1000)
    """ranges the search tries"""
    lowest: float = Field(default=0.5, gt=0, lt=1)
    """the narrowest of them, as a share of the full one"""
    signed_scales: bool = True
    """scales of symmetric integers may be negative, so that all levels are used whatever the sign of the largest weight"""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"hessian"})

    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        """Where the found ranges cost a row's output more than its full ranges do, the full ones stay: never worse than rtn."""
        groups = quantizer.groups(weight)
        if absmax is None and quantizer.config.needs_absmax:
            absmax = groups.abs().amax()
        params = quantizer.fit(groups, absmax=absmax)
        if statistics is not None:  # None: an expert that no token came to
            ranges = Ranges(self.grid, self.lowest, self.signed_scales)
            found = search_scales(weight, quantizer, statistics.hessian.diagonal(), ranges, absmax)
            params = _better(weight, quantizer, found, params, statistics.hessian)
        return quantizer.quantize_groups(groups, params, *weight.shape)


def _better(weight: Tensor, quantizer: Quantizer, found: Params, full: Params, hessian: Tensor) -> Params:
    """For each row (for the whole matrix, where rows share parameters) whichever has the less error in the outputs."""
    groups = quantizer.groups(weight)

    def cost(params: Params) -> Tensor:
        error = quantizer.dequantize(quantizer.quantize_groups(groups, params, *weight.shape)) - weight
        return (error * (error @ hessian)).sum(1)

    costs, before = cost(found), cost(full)
    if quantizer.config.strategy not in ("group", "channel"):
        return found if float(costs.sum()) < float(before.sum()) else full
    return mixed((costs < before).view(-1, 1, 1), found, full, quantizer)
