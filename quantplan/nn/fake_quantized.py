"""The layers of quantization-aware training: torch's own, with the weight and the inputs rounded on the way.

Parameters are the float layer's, under the same names, so that state dicts go from one to the other and back.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.nn.fake_quantizer import FakeQuantizer, WeightFakeQuantizer
from quantplan.nn.linear import QuantLinear


class FakeQuantizedLinear(nn.Linear):
    """`y = Q(x) Q(W)^T + b`: forward, what the `QuantLinear` that `converted` makes computes; backward, straight through.

    `weight_fake_quant` rounds the weight; `input_fake_quant`, where there is one, the inputs.
    """

    weight_fake_quant: WeightFakeQuantizer
    input_fake_quant: FakeQuantizer | None

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weight_fake_quant: WeightFakeQuantizer, input_fake_quant: FakeQuantizer | None = None
    ) -> FakeQuantizedLinear:
        """A layer with the very parameters of `linear`."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        made.register_parameter("bias", linear.bias)
        made.weight_fake_quant, made.input_fake_quant = weight_fake_quant, input_fake_quant
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of the input, or autocast's."""
        x = autocast(input)
        if self.input_fake_quant is not None:
            x = self.input_fake_quant(x)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return functional.linear(x, self.weight_fake_quant(self.weight.float()).to(x.dtype), bias)

    def to_float(self) -> nn.Linear:
        """An `nn.Linear` with the very parameters, not rounded."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = self.weight
        made.register_parameter("bias", self.bias)
        return made.train(self.training)

    def converted(self) -> QuantLinear:
        """The quantized layer, with this very bias. Raises NonFinite; QuantplanError QP603 for static inputs never seen."""
        inputs = self.input_fake_quant
        found = inputs.static() if inputs is not None and inputs.observer is not None else None
        solved = self.weight_fake_quant.solve(self.weight)
        aq = inputs.scheme if inputs is not None else None
        made = QuantLinear.from_quantized(solved, self.bias, aq, dtype=self.weight.dtype, inputs=found)
        return made.train(self.training)


FakeQuantized: TypeAlias = FakeQuantizedLinear


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype autocast computes in, where it is on."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
