"""autoround: rounding and ranges of a whole block learned together, by signed gradients of the error of its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantplan.algorithm import ALGORITHMS, Algorithm, Need

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from quantplan.algorithm import BlockProblem
    from quantplan.scheme import Params, Quantizer
    from quantplan.statistics import Statistics
    from quantplan.tensor import QuantizedTensor

NARROWEST, WIDEST = 0.5, 1.5  # how far a range may be moved, as a share of where it started


@ALGORITHMS.register("autoround")
class AutoRound(Algorithm):
    """SignRound (Cheng et al. 2023, arXiv 2309.05516): a shift of every weight by at most half a step, and a factor for every
    range, take steps of one size against the sign of their gradients, the size falling linearly to zero. What it ends with is
    kept only if it lowers the block's error on all the data; so it is never worse than what it starts from."""

    passes: ClassVar[float] = 3000.0
    tunes: ClassVar[bool] = True

    iterations: int = Field(default=50, ge=1, le=100_000)
    """steps a block, each with one batch of 2,048 tokens"""
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """the first step's size, in steps of the grid; by default 1 / iterations after rtn, and 0.3 / iterations after gptq, whose
    codes are better than what larger steps find"""
    start: Literal["gptq", "rtn"] = "gptq"
    """what finds the codes and ranges it starts from"""
    ranges: bool | None = None
    """whether ranges are learned too; by default after rtn only"""
    seed: int = 0
    """of the order batches come in"""

    @property
    def needs(self) -> frozenset[Need]:
        return ALGORITHMS.get(self.start)().needs

    def solve(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        absmax: Tensor | None = None,
        statistics: Statistics | None = None,
    ) -> QuantizedTensor:
        return ALGORITHMS.get(self.start)().solve(weight, quantizer, absmax, statistics)

    def tune(self, problem: BlockProblem) -> Mapping[str, QuantizedTensor]:
        import torch

        states = {name: _State(name, problem) for name in problem.weights}
        before = sum(problem.loss(i, {n: s.start for n, s in states.items()}) for i in range(problem.batches))
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        rate = self.learning_rate or (1.0 if self.start == "rtn" else 0.3) / self.iterations
        ranges = self.start == "rtn" if self.ranges is None else self.ranges
        for i in range(self.iterations):
            order = order or torch.randperm(problem.batches, generator=generator).tolist()
            size = rate * (1 - i / self.iterations)
            with torch.enable_grad():
                loss = problem.loss(order.pop(), {n: s.rounded() for n, s in states.items()})
            loss.backward()
            for state in states.values():
                state.step(size, ranges)
        with torch.no_grad():
            found = {name: state.quantized() for name, state in states.items()}
            values = {name: q.scheme.quantizer().dequantize(q) for name, q in found.items()}
            after = sum(problem.loss(i, values) for i in range(problem.batches))
        return found if after < before else {}


class _State:
    """One matrix: what is learned, and the weight it stands for."""

    def __init__(self, name: str, problem: BlockProblem) -> None:
        import torch

        started = problem.started[name]
        self.quantizer = started.scheme.quantizer(name)
        own = started.scheme.tensor_params
        self.params: Params = {n: p if n in own else p.unsqueeze(-1) for n, p in started.params.items()}
        self.start = self.quantizer.dequantize(started)
        weight = problem.weights[name]
        self.shape = weight.shape
        groups, begun = self.quantizer.groups(weight), self.quantizer.groups(self.start)
        # where the start's code is not the nearest, its value takes the weight's place
        self.base = torch.where(self.quantizer.nearest(groups, self.params) == begun, groups, begun)
        self.unit = self.quantizer.step(self.params)
        self.shift = torch.zeros_like(self.base, requires_grad=True)
        self.factor = torch.ones_like(self.unit, requires_grad=True)

    def _now(self) -> tuple[Tensor, Params]:
        """The shifted weight, as groups, and the parameters of the moved ranges."""
        params = self.quantizer.with_step(self.params, self.unit * self.factor.detach())
        return self.base + self.shift * self.unit.abs(), params

    def rounded(self) -> Tensor:
        """The weight on the grid, `[rows, columns]`, with the gradients of a straight-through rounding: of the shift, that of the
        weight; of the factor, that of the level."""
        shifted, params = self._now()
        levels = self.quantizer.nearest(shifted.detach(), params)
        error = (levels - shifted.detach()) * (self.factor / self.factor.detach())
        return self.quantizer.ungroup(shifted + error, *self.shape)

    def step(self, size: float, ranges: bool) -> None:
        """One step against the gradients' signs, which are then forgotten."""
        import torch

        with torch.no_grad():
            if self.shift.grad is not None:
                self.shift.sub_(self.shift.grad.sign_(), alpha=size).clamp_(-0.5, 0.5)
            if ranges and self.factor.grad is not None:
                self.factor.sub_(self.factor.grad.sign_(), alpha=size).clamp_(NARROWEST, WIDEST)
        self.shift.grad = self.factor.grad = None

    def quantized(self) -> QuantizedTensor:
        shifted, params = self._now()
        return self.quantizer.quantize_groups(shifted, params, *self.shape)
