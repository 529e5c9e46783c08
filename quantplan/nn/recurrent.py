"""`QuantRecurrent`: an LSTM, GRU or RNN whose weight matrices are stored quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.nn.linear import QuantLinear
from quantplan.scheme import SchemeConfig


class QuantRecurrent(nn.Module):
    """`recurrent` with every weight matrix on the grid of `wq`, dequantized for each sequence; what is fed in stays float."""

    def __init__(self, recurrent: nn.RNNBase, wq: SchemeConfig) -> None:
        super().__init__()
        kept = copy.copy(recurrent)
        kept._parameters = {}  # the geometry alone: the weights are below
        self.__dict__["_geometry"] = kept
        self._names: list[str] = list(recurrent._flat_weights_names)
        self.matrices, self.vectors = nn.ModuleDict(), nn.ParameterDict()
        for name in self._names:
            weight = getattr(recurrent, name)
            if weight.dim() == 1:
                self.vectors[name] = weight
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = weight
            self.matrices[name] = QuantLinear.from_linear(linear, wq, name=name)
        self.train(recurrent.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As torch's: the outputs of all steps, and the last state."""
        geometry = self._geometry
        geometry.training = self.training
        geometry._flat_weights = [self._weight(name) for name in self._names]
        found: tuple[Any, Any] = geometry(input, hx)
        return found

    def _weight(self, name: str) -> Tensor:
        if name in self.vectors:
            return self.vectors[name]
        held = self.matrices[name]
        assert isinstance(held, QuantLinear)
        return held.weight.contiguous()

    @property
    def _geometry(self) -> Any:
        return self.__dict__["_geometry"]


RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def quantized_recurrent(module: nn.RNNBase, wq: SchemeConfig) -> QuantRecurrent:
    """The quantized module. Raises NonFinite."""
    with torch.no_grad():
        return QuantRecurrent(module, wq)
