"""gptq: weights fitted to second moments of their inputs, column after column, each error passed on to the columns left."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.algorithm import ALGORITHMS, Algorithm, Need
from quantplan.scale_search import Ranges, mixed, search_scales

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params, Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor

BLOCK = 64  # columns whose errors are passed on one by one; beyond them, by one matrix product
NORMAL = 1 << 24  # elements of the normal equations of as many rows as are solved at a time: 64 MB


@ALGORITHMS.register("gptq")
class GPTQ(Algorithm):
    """Error compensation (Frantar et al. 2023, arXiv 2210.17323) with scales fitted to what it will do, targets corrected for
    the drift of the quantized model, and a refinement that can only lower the layer's error."""

    passes: ClassVar[float] = 60.0

    damping: float = Field(default=0.03, gt=0, le=1)
    """share of the mean of the Hessian's diagonal that is added to it"""
    act_order: bool = True
    """columns with the largest inputs first; groups stay where they are, so nothing is stored for it"""
    drift: float = Field(default=1.0, ge=0, le=1)
    """how far weights make up for what layers before them did to their inputs: 1 fully, 0 not at all"""
    drift_damping: float = Field(default=1.0, gt=0, le=100)
    """what that correction adds to the Hessian's diagonal, as a share of its mean: it must not learn the noise of few data"""
    grid: int = Field(default=16, ge=2, le=1000)
    """ranges the scale search tries"""
    lowest: float | None = Field(default=None, gt=0, lt=1)
    """the narrowest of them, as a share of the full one; by default 0.6, and 0.3 for schemes of 3 bits and fewer"""
    signed_scales: bool = True
    """scales of symmetric integers may be negative, so that all levels are used whatever the sign of the largest weight"""
    refits: int = Field(default=1, ge=0, le=100)
    """rounds of refinement: scales by least squares for the codes found, then codes again"""
    sweeps: int = Field(default=1, ge=0, le=100)
    """in each, rounds of coordinate descent over all columns"""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"hessian", "drift"} if self.drift else {"hessian"})

    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        import torch

        assert statistics is not None, "gptq needs statistics"
        hessian = statistics.damped(self.damping)
        target = weight
        if self.drift:
            target = torch.lerp(weight, statistics.corrected(weight, self.drift_damping), self.drift)
        diagonal = statistics.hessian.diagonal()
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else torch.arange(len(diagonal))
        upper = statistics.factor(self.damping, order)
        importance = torch.empty_like(diagonal)
        importance[order] = upper.diagonal().square().reciprocal()  # what an error there costs once the rest made up for it
        lowest = self.lowest or (0.3 if quantizer.config.bits <= 3 else 0.6)
        ranges = Ranges(self.grid, lowest, self.signed_scales)
        params = search_scales(target, quantizer, importance, ranges, absmax)
        columns = _Columns(quantizer, params, *weight.shape)
        values = _compensate(target.t(), columns, upper, order)
        params, values = self._refine(target.t(), quantizer, params, values, hessian)
        return quantizer.quantize_groups(quantizer.groups(values.t().contiguous()), params, *weight.shape)

    def _refine(
        self, target: Tensor, quantizer: Quantizer, params: Params, values: Tensor, hessian: Tensor
    ) -> tuple[Params, Tensor]:
        """Alternates the two closed forms while they lower the error; rows whose error they do not lower stay as they are."""
        import torch

        rows, columns = target.shape[1], target.shape[0]
        lowest = _error(target, values, hessian)
        for _ in range(self.refits):
            tried = params
            if quantizer.config.fine_steps and quantizer.config.strategy in ("group", "channel"):
                tried = _refit(target, quantizer, params, values, hessian)
            start = _Columns(quantizer, tried, rows, columns).nearest_all(values)
            found = _descend(target, start, _Columns(quantizer, tried, rows, columns), hessian, self.sweeps)
            error = _error(target, found, hessian)
            better = error < lowest
            if not better.any():
                break
            lowest = torch.where(better, error, lowest)
            values = torch.where(better, found, values)
            if tried is not params:
                params = mixed(better.view(-1, 1, 1), tried, params, quantizer)
        return params, values


class _Columns:
    """Rounding of single columns of a matrix whose parameters are settled."""

    def __init__(self, quantizer: Quantizer, params: Params, rows: int, columns: int) -> None:
        spread, self._wide = quantizer.spread(params, rows, columns)
        own = quantizer.config.tensor_params
        self._quantizer, self._columns = quantizer, columns
        self._params = [
            {n: p if n in own else p[:, i].contiguous() for n, p in spread.items()} for i in range(-(-columns // self._wide))
        ]

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The grid's values nearest to `values`, `[rows]`, in that column."""
        return self._quantizer.nearest(values.unsqueeze(-1), self._params[column // self._wide]).squeeze(-1)

    def nearest_all(self, values: Tensor) -> Tensor:
        """The same for all columns, `[columns, rows]`."""
        import torch

        parts = values.split(self._wide)
        rounded = [self._quantizer.nearest(v.t().contiguous(), p).t() for v, p in zip(parts, self._params, strict=True)]
        return torch.cat(rounded)


def _compensate(target: Tensor, columns: _Columns, upper: Tensor, order: Tensor) -> Tensor:
    """The GPTQ pass over `target` `[columns, rows]`; `upper`: the inverse Hessian's factor, in `order`. Values on the grid."""
    import torch

    work = target[order].contiguous()
    values = torch.empty_like(work)
    places = order.tolist()
    for start in range(0, len(places), BLOCK):
        stop = min(start + BLOCK, len(places))
        block, factor = work[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            rounded = columns.nearest(block[j], places[start + j])
            values[start + j] = rounded
            torch.div(block[j] - rounded, factor[j, j], out=errors[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(values)
    result[order] = values
    return result


def _descend(target: Tensor, values: Tensor, columns: _Columns, hessian: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the layer's error: each column in turn takes the grid's best values given all others. Every step
    lowers the error (QuantEase, arXiv 2309.01885). All `[columns, rows]`."""
    import torch

    values = values.clone()
    slope = hessian @ (target - values)
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        for start in range(0, len(values), BLOCK):
            stop = min(start + BLOCK, len(values))
            inner, near = slope[start:stop].clone(), hessian[start:stop, start:stop]
            moves = torch.empty_like(inner)
            for j in range(stop - start):
                before = values[start + j]
                found = columns.nearest(before + inner[j] / diagonal[start + j], start + j)
                torch.sub(found, before, out=moves[j])
                values[start + j] = found
                inner[j + 1 :].addr_(near[j + 1 :, j], moves[j], alpha=-1)
            slope.addmm_(hessian[:, start:stop], moves, alpha=-1)
    return values


def _refit(target: Tensor, quantizer: Quantizer, params: Params, values: Tensor, hessian: Tensor) -> Params:
    """The steps that fit best when codes stay: for each row a least-squares problem in the factors of its groups, solved for
    all groups at once (two-stage grid optimization, arXiv 2602.02126)."""
    import torch

    columns, rows = target.shape
    across = quantizer.config.grid(rows, columns)[1]
    height = max(1, NORMAL // across**2)
    pieces = zip(target.split(height, 1), values.split(height, 1), strict=True)
    factors = torch.cat([_factors(t, v, across, hessian) for t, v in pieces])
    return quantizer.with_step(params, quantizer.step(params) * factors)


def _factors(target: Tensor, values: Tensor, across: int, hessian: Tensor) -> Tensor:
    """What the steps of some rows are to be multiplied by, `[rows, across, 1]`; 1 where no sound factor was found."""
    import torch

    columns, rows = target.shape
    wide = columns // across
    parts = values.view(across, wide, rows)
    normal = torch.empty(rows, across, across)
    for k in range(across):
        pushed = (hessian[:, k * wide : (k + 1) * wide] @ parts[k]).view(across, wide, rows)
        normal[:, :, k] = (parts * pushed).sum(1).t()
    wanted = (parts * (hessian @ target).view(across, wide, rows)).sum(1).t()
    size = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * size.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    normal += torch.diag_embed(torch.where(size > 0, ridge, 1.0))
    factors, failed = torch.linalg.solve_ex(normal, wanted.unsqueeze(-1))
    good = torch.isfinite(factors) & (factors > 0.1) & (size > 0).unsqueeze(-1) & (failed == 0).view(-1, 1, 1)
    return torch.where(good, factors, 1.0)


def _error(target: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """`e^T H e` of each row, `[rows]`."""
    difference = target - values
    return (difference * (hessian @ difference)).sum(0)
