"""What comes to one matrix, or to several that share it, from all batches of both chains: rounded as the plan says, and its
statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantplan.assignment import Assignment
from quantplan.engine import moments
from quantplan.engine.batches import Batches
from quantplan.scheme import Params, check_finite
from quantplan.statistics import Statistics


@dataclass(frozen=True)
class Arrived:
    """Inputs `[rows, columns]` by batch, of the quantized chain and of the float one, whose mapping is empty where it does not
    run, and of which only batches with all tokens, in order, are here. They are held: nothing else can come to lie where they do.
    `tokens`: which of a batch the quantized chain's rows are; None: all, or not known. `known`: static ranges that were found
    before."""

    quantized: Mapping[int, Tensor]
    exact: Mapping[int, Tensor]
    assignment: Assignment
    batches: Batches
    tokens: Mapping[int, Tensor | None]
    known: Params | None = None

    def serves(self, quantized: Mapping[int, Tensor], assignment: Assignment) -> bool:
        """Whether a matrix with these inputs and this assignment is given the same: tensors in the same place, rounded alike."""
        mine = self.quantized
        return (
            (self.assignment.aq, self.assignment.observer) == (assignment.aq, assignment.observer)
            and mine.keys() == quantized.keys()
            and all(mine[i].data_ptr() == x.data_ptr() and mine[i].shape == x.shape for i, x in quantized.items())
        )

    @property
    def counts(self) -> bool:
        """Whether any row counts: an expert may have been given nothing but padding."""
        return any(len(self._counted(x, i)) for i, x in self.quantized.items())

    def _counted(self, x: Tensor, batch: int) -> Tensor:
        return self.batches.counted(x, batch, self.tokens[batch])

    @cached_property
    def params(self) -> Params:
        """What was found for static activations; empty where they are dynamic, or none. Raises NonFinite."""
        aq, observer = self.assignment.aq, self.assignment.observer
        if aq is None or observer is None:
            return {}
        if self.known is not None:
            return self.known
        quantizer, observing = aq.quantizer(self.assignment.name), observer.observer()
        for i, x in self.quantized.items():
            rows = self._counted(x, i)
            if len(rows):
                observing.update(rows)
        return quantizer.fit_static(observing.result(quantizer))

    @cached_property
    def rounded(self) -> Mapping[int, Tensor]:
        """The quantized chain's inputs as the model will compute with them. Raises NonFinite."""
        aq = self.assignment.aq
        if aq is None:
            return self.quantized
        return {i: round_inputs(x, self.assignment, self.params) for i, x in self.quantized.items()}

    @cached_property
    def statistics(self) -> Statistics:
        """Second moments of the rounded inputs, and their drift where the same tokens came in both chains. A quantized router
        sends tokens elsewhere, so the inputs of one expert are not the same tokens, even where they are as many. Raises
        NonFinite."""
        columns = next(iter(self.quantized.values())).shape[-1]
        paired = all(i in self.exact and self.batches.whole(x, i, self.tokens[i]) for i, x in self.rounded.items())
        hessian, fast = moments.SecondMoment(columns), moments.fast_dtype()
        moved = torch.zeros(columns, columns) if paired else None
        for i, inputs in self.rounded.items():
            x = self._counted(inputs, i)
            hessian.add(x)
            if moved is not None:
                away = self.batches.counted(self.exact[i], i) - x
                moved += away.to(fast).t() @ x.to(fast)
        drift = None if moved is None else moved.div_(max(1, hessian.count))
        mean = hessian.mean()
        check_finite(mean)
        return Statistics(mean, hessian.count, drift)

    def mean(self) -> Tensor:
        """Of the rounded inputs, float32 `[columns]`."""
        return torch.cat([self._counted(x.float(), i) for i, x in self.rounded.items()]).mean(0)


def round_inputs(x: Tensor, assignment: Assignment, params: Params) -> Tensor:
    """Activations `[..., features]` as `assignment` rounds them, which has an `aq`. `params`: of static ones. Raises
    NonFinite."""
    assert assignment.aq is not None
    quantizer = assignment.aq.quantizer(assignment.name)
    return quantizer.fake_quantize(x) if assignment.observer is None else quantizer.round_static(x, params)
