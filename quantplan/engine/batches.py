"""Calibration data as the engine runs them: batches of a few thousand tokens, and which tokens of each count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantplan.calibration.read import CalibrationSet, batches

TOKENS = 2048  # of a batch: what one forward holds of a block's inner activations


class Batches:
    """`inputs`: keyword arguments of the model's forward, one a batch."""

    def __init__(self, data: CalibrationSet, config: Any) -> None:
        size = max(1, TOKENS // data.length)
        self.inputs = list(batches(data, config, size))
        self._masks = [mask.reshape(-1) for mask in data.mask.split(size)]

    def whole(self, x: Tensor, batch: int) -> bool:
        """Whether `x` `[tokens, features]` has all tokens of a batch, in order. An expert is given those that a router chose."""
        return len(x) == len(self._masks[batch])

    def counted(self, x: Tensor, batch: int) -> Tensor:
        """The rows of `x` `[tokens, features]` that count in statistics; of an expert's inputs all do."""
        mask = self._masks[batch]
        return x[mask] if self.whole(x, batch) and not mask.all() else x
