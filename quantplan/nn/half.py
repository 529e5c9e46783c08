"""`HalfLinear`: a linear layer whose weight is kept in float16 (torch.ao's `float16_dynamic_qconfig`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.errors import fail


class HalfLinear(nn.Linear):
    """`y = x W^T + b` with `W` in float16, computed in the dtype of `x`."""

    @classmethod
    def prepared(cls, linear: Any) -> HalfLinear:
        """A layer with the very parameters of `linear`, which `converted` rounds. Raises QP222 for another class."""
        if type(linear) is not nn.Linear:
            raise fail("QP222", f"a {type(linear).__name__} cannot be kept in float16", "use an integer dtype")
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        made.register_parameter("bias", linear.bias)
        return made.train(linear.training)

    def converted(self) -> HalfLinear:
        """The layer with its weight in float16; what lies outside of it saturates."""
        largest = torch.finfo(torch.float16).max
        self.weight = nn.Parameter(self.weight.detach().clamp(-largest, largest).half(), requires_grad=False)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of the input."""
        return functional.linear(input, self.weight.to(input.dtype), self.bias)
