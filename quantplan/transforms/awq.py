"""awq: channels with large inputs get the finer part of the grid. The half of the method that the algorithm `awq` implies."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantplan.assignment import Assignment
from quantplan.transform import TRANSFORMS, Channels, Kind, Reader, Transform

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Quantizer

FLOOR = 1e-4  # of the largest input: channels that are all but silent are not scaled away


@TRANSFORMS.register("awq")
class ActivationAware(Transform):
    """Scales channels by `mean|x|^r` (Lin et al. 2023, arXiv 2306.00978), with the `r` from 0 to 1 whose weights, rounded by
    their own scheme, change the outputs least. Goes before any algorithm; `algorithm: awq` brings it along."""

    scales: ClassVar[frozenset[Kind]] = frozenset({"norm", "linear"})
    needs_hessian: ClassVar[bool] = True

    steps: int = Field(default=20, ge=1, le=1000)
    """how many `r` are tried, from 0"""
    rows: int = Field(default=1024, ge=1)
    """rows of each matrix that the search rounds, evenly spaced"""
    where: Literal["quantized", "awq"] = "quantized"
    """`quantized`: for every quantized matrix; `awq`: for those whose algorithm is `awq`"""

    def wants(self, assignment: Assignment) -> bool:
        return assignment.wq is not None and (self.where == "quantized" or assignment.algorithm.name == "awq")

    def factors(self, channels: Channels) -> Tensor | None:
        """As the contract; None where no `r` is better than 0."""
        import torch

        size = torch.zeros(channels.count)
        for reader in channels.readers:
            size = torch.maximum(size, reader.largest(reader.inputs.magnitude, channels.count))
        if not size.any():
            return None
        size = size.clamp_min(float(size.amax()) * FLOOR)
        least, best = self._cost(channels, None), None
        for step in range(1, self.steps):
            scale = size.pow(step / self.steps)
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            cost = self._cost(channels, scale)
            if cost < least:
                least, best = cost, scale
        return None if best is None else best.reciprocal()

    def _cost(self, channels: Channels, scale: Tensor | None) -> float:
        """What rounding costs the outputs of all readers, with channels multiplied by `scale`: the sum of `tr(E H E^T)`."""
        return sum(self._cost_of(r, r.quantizer, scale) for r in channels.readers if r.quantizer is not None)

    def _cost_of(self, reader: Reader, quantizer: Quantizer, scale: Tensor | None) -> float:
        hessian = reader.inputs.hessian
        assert hessian is not None
        weight = reader.weight[:: -(-len(reader.weight) // self.rows)]
        spread = reader.spread(scale) if scale is not None else hessian.new_ones(hessian.shape[0])
        error = quantizer.fake_quantize(weight * spread) / spread - weight
        return float((error * (error @ hessian)).sum())
