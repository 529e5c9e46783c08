"""A solved block as an algorithm that tunes it sees it: matrices, batches, and the error of the block's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.live.forward import Call
from quantplan.live.weights import Place
from quantplan.tensor import QuantizedTensor


@dataclass(frozen=True)
class TunedBlock:
    """See `algorithm.BlockProblem`. `targets`: what the float model's block makes of the float model's hidden states."""

    module: nn.Module
    calls: Sequence[Call]
    hidden: Sequence[Tensor]
    targets: Sequence[Tensor]
    places: Mapping[str, Place]  # matrix -> the parameter of `module` that it is the whole of
    weights: Mapping[str, Tensor]
    started: Mapping[str, QuantizedTensor]
    compute: Callable[[], Any]  # the context products are computed in
    counted: Callable[[Tensor, int], Tensor]  # of `[rows, features]` of a batch, the rows that count

    @property
    def batches(self) -> int:
        return len(self.calls)

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error of the block's outputs for one batch, 0-d, when its matrices are `weights`: over the tokens that
        count, so not over what the block makes of padding."""
        places = ((self.places[name], weight) for name, weight in weights.items())
        changed = {place.parameter: weight.t() if place.transposed else weight for place, weight in places}

        def block(*arguments: Any, **options: Any) -> Any:
            return torch.func.functional_call(self.module, changed, arguments, options)

        with self.compute():
            made = self.calls[batch](block, self.hidden[batch])
        made, target = (self.counted(t.flatten(0, -2), batch) for t in (made.float(), self.targets[batch]))
        return torch.nn.functional.mse_loss(made, target)
