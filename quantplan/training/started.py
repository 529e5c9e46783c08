"""Fake quantizers that begin where an output of `apply` ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantplan.nn.fake_quantize import fake_quantize_static, widened
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.scheme import Params, Quantizer, SchemeConfig
from quantplan.tensor import QuantizedTensor


class StartedQuantizer(FakeQuantizer):
    """Rounds a weight to the grid of a solved one.

    `frozen`: codes stay those of `start`, whatever the weight; else they are the nearest ones. `learnable`: steps are learned, as
    shares of the first ones: `step = first * (1 + change)`. Before training it gives what `start` stands for, bit for bit, if the
    weight is one that `inside` makes.
    """

    change: nn.Parameter | None

    def __init__(self, start: QuantizedTensor, frozen: bool, learnable: bool) -> None:
        super().__init__(start.scheme)
        self.frozen, self.use_grad_scaling = frozen, False
        self._names = tuple(start.params)
        for name, param in start.params.items():
            self.register_buffer(f"start_{name}", param, persistent=False)
        self.register_buffer("codes", start.codes if frozen else None, persistent=False)
        first = start.scheme.quantizer().step(dict(start.params))
        self.register_buffer("first", first if learnable else None, persistent=False)
        self.register_parameter("change", nn.Parameter(torch.zeros_like(first)) if learnable else None)

    def params(self, x: Tensor, quantizer: Quantizer, absmax: Tensor | None = None) -> Params:
        return {name: getattr(self, f"start_{name}") for name in self._names}

    def learning(self) -> tuple[Tensor | None, Tensor | None]:
        if self.change is None:
            return None, None
        first: Any = self.first
        return first * (1 + self.change), None

    def round(self, x: Tensor, absmax: Tensor | None = None) -> Tensor:
        if not self.frozen:
            return super().round(x, absmax)
        params = self.learned(self.params(x, self._quantizer))
        return _Decoded.apply(self.learning()[0], self.codes, self._quantizer, params)

    @torch.no_grad()
    def solve(self, weight: Tensor, absmax: Tensor | None = None) -> QuantizedTensor:
        """The weight as codes and parameters, `[out, columns]`."""
        if not self.frozen:
            return super().solve(weight, absmax)
        codes: Any = self.codes
        return QuantizedTensor(codes, self.learned(self.params(weight, self._quantizer)), self.scheme)


class _Decoded(torch.autograd.Function):
    """The values of codes, `[rows, columns]`, with the gradient of their step: a value counts its level."""

    @staticmethod
    def forward(ctx: Any, step: Tensor | None, codes: Tensor, quantizer: Quantizer, params: Params) -> Tensor:
        ctx.quantizer, ctx.params = quantizer, params
        ctx.save_for_backward(codes)
        return quantizer.ungroup(quantizer.decode(quantizer.groups(codes), widened(params, quantizer)), *codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (codes,) = ctx.saved_tensors
        quantizer, params = ctx.quantizer, widened(ctx.params, ctx.quantizer)
        values = quantizer.decode(quantizer.groups(codes), params)
        counted = (values * quantizer.groups(gradients[0].float())).sum(-1, keepdim=True) / quantizer.step(params)
        return counted.squeeze(-1), None, None, None


class StartedRange(FakeQuantizer):
    """Rounds static inputs with the range that calibration found."""

    def __init__(self, scheme: SchemeConfig, found: Params) -> None:
        super().__init__(scheme)
        self._names = tuple(found)
        for name, param in found.items():
            self.register_buffer(f"start_{name}", param, persistent=False)

    def found(self) -> Params:
        return {name: getattr(self, f"start_{name}") for name in self._names}

    def static(self) -> Params | None:
        return self.found()

    def round(self, x: Tensor, absmax: Tensor | None = None) -> Tensor:
        return fake_quantize_static(x, self.quantizer(), self.found())


@torch.no_grad()
def inside(weight: Tensor, start: QuantizedTensor) -> Tensor:
    """`weight`, float32 `[rows, columns]`, where it rounds to the codes of `start`, and what these stand for elsewhere: there an
    algorithm chose another code than the nearest, and a weight at the edge of its cell would fall back at the first step."""
    quantizer = start.scheme.quantizer()
    params = widened(dict(start.params), quantizer)
    groups, values = quantizer.groups(weight.float()), quantizer.decode(quantizer.groups(start.codes), params)
    return quantizer.ungroup(torch.where(quantizer.nearest(groups, params) == values, groups, values), *weight.shape)
