"""`FloatFunctional`: additions and joins of two branches, rounded where a range for them is found (skip connections)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantplan.nn.fake_quantizer import FakeQuantizer


class FloatFunctional(nn.Module):
    """Operations that are no modules. Both branches come as floats that lie on their own grids; the sum is computed in floating
    point and rounded to one grid, by `output_fake_quant`, which `prepare` and `prepare_qat` put in."""

    def __init__(self) -> None:
        super().__init__()
        self.output_fake_quant: FakeQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded as results are."""
        return x if self.output_fake_quant is None else self.output_fake_quant(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`."""
        return self(torch.add(x, y))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """`relu(x + y)`."""
        return self(torch.relu(torch.add(x, y)))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x + y`, not rounded: the grid moves along."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x * y`."""
        return self(torch.mul(x, y))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """`x * y`, not rounded: the grid grows along."""
        return torch.mul(x, y)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`."""
        return self(torch.matmul(x, y))

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The tensors joined along `dim`."""
        return self(torch.cat(list(x), dim))
