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

    def count(self, batch: int) -> int:
        """How many tokens a batch has, padding among them."""
        return len(self._masks[batch])

    def whole(self, x: Tensor, batch: int, tokens: Tensor | None = None) -> bool:
        """Whether `x` `[rows, features]` has all tokens of a batch, in order. An expert is given those that a router chose:
        `tokens`, where they are known (see `RoutedTokens.of`)."""
        return tokens is None and len(x) == self.count(batch)

    def counted(self, x: Tensor, batch: int, tokens: Tensor | None = None) -> Tensor:
        """The rows of `x` `[rows, features]` that count in statistics; all, where it is not known which tokens they are."""
        mask = self._masks[batch]
        if mask.all() or not self.known(x, batch, tokens):
            return x
        return x[mask if tokens is None else mask[tokens]]

    def known(self, x: Tensor, batch: int, tokens: Tensor | None) -> bool:
        """Whether what does not count can be told from what does, or all of the batch counts."""
        return tokens is not None or self.whole(x, batch) or bool(self._masks[batch].all())
