"""hqq: zero points and steps under which most weights lie near the grid and a few may lie far from it. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.scale_search import PIECE, joined, mixed

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params, Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor


@ALGORITHMS.register("hqq")
class HQQ(Algorithm):
    """Half-quadratic quantization (Badri and Shaji 2023): the sum of `|error|^norm`, which outliers weigh little in, lowered by
    turns: what is taken for an outlier's error, then the zero point (kept an integer) or the step that fits the rest best."""

    passes: ClassVar[float] = 25.0

    norm: float = Field(default=0.7, gt=0, le=1)
    """the power of errors that is summed; the smaller, the less an outlier counts"""
    beta: float = Field(default=10.0, gt=0, le=1e4)
    """how closely outliers' errors are followed at first, for errors in units of the step"""
    growth: float = Field(default=1.01, ge=1, le=2)
    """what `beta` is multiplied by in every turn"""
    turns: int = Field(default=20, ge=1, le=1000)
    """turns"""

    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        groups = quantizer.groups(weight)
        if absmax is None and quantizer.config.needs_absmax:
            absmax = weight.abs().amax()
        height = len(groups)
        if quantizer.config.strategy not in ("tensor", "block"):
            height = max(1, PIECE // weight.shape[1])
        params = joined([self._fitted(part, quantizer, absmax) for part in groups.split(height)], quantizer)
        return quantizer.quantize_groups(groups, params, *weight.shape)

    def _fitted(self, groups: Tensor, quantizer: Quantizer, absmax: Tensor | None) -> Params:
        best = _Best(groups, quantizer, quantizer.fit(groups, absmax=absmax), self.norm)
        if "zero_point" in best.params:
            self._move_zeros(groups, quantizer, best)
        else:
            self._move_steps(groups, quantizer, best)
        return best.params

    def _move_zeros(self, groups: Tensor, quantizer: Quantizer, best: _Best) -> None:
        """Zero points that are fractions on the way, and tried as the integers on both sides in the end."""
        levels, beta = 2**quantizer.config.bits - 1, self.beta
        units = groups / quantizer.step(best.params)
        zero = best.params["zero_point"].float()
        for _ in range(self.turns):
            codes = (units + zero).round_().clamp_(0, levels)
            outside = self._outliers(units - (codes - zero), beta)
            zero = codes.sub_(units).add_(outside).mean(-1, keepdim=True)
            beta *= self.growth
        found = best.params
        for candidate in (zero.floor(), zero.ceil()):
            best.try_(found | {"zero_point": candidate.clamp(0, levels).to(found["zero_point"].dtype)})

    def _move_steps(self, groups: Tensor, quantizer: Quantizer, best: _Best) -> None:
        """Steps by least squares for what is no outlier's error."""
        import torch

        beta, params = self.beta, best.params
        step = quantizer.step(params)
        for _ in range(self.turns):
            stored = quantizer.step(params)
            values = quantizer.nearest(groups, params)
            units = values / stored
            rest = groups - self._outliers((groups - values) / stored, beta) * stored
            size = units.square().sum(-1, keepdim=True)
            step = torch.where(size > 0, (rest * units).sum(-1, keepdim=True) / size, step)
            params = quantizer.with_step(params, step)
            best.try_(params)
            beta *= self.growth

    def _outliers(self, errors: Tensor, beta: float) -> Tensor:
        """The part of errors, in units of the step, that is left to outliers: the generalized soft threshold."""
        import torch

        size = errors.abs()
        return torch.sign(errors) * (size - size.clamp(min=1e-8).pow(self.norm - 1) / beta).clamp_(min=0)


class _Best:
    """For each group the parameters with the least sum of `|error|^norm` of those tried that do not raise the squared error: the
    former alone would give up outliers, which cost a model more than all the rest. The first of equals."""

    def __init__(self, groups: Tensor, quantizer: Quantizer, params: Params, norm: float) -> None:
        self._groups, self._quantizer, self._norm = groups, quantizer, norm
        self.params = params
        self._least, self._squared = self._errors(params)

    def _errors(self, params: Params) -> tuple[Tensor, Tensor]:
        sizes = (self._quantizer.nearest(self._groups, params) - self._groups).abs_()
        return sizes.pow(self._norm).sum(-1, keepdim=True), sizes.square_().sum(-1, keepdim=True)

    def try_(self, params: Params) -> None:
        """Takes them over where they are better."""
        import torch

        error, squared = self._errors(params)
        better = (error < self._least) & (squared <= self._squared)
        self._least = torch.where(better, error, self._least)
        self.params = mixed(better, params, self.params, self._quantizer)
