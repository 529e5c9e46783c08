"""`QuantLinear`: an `nn.Linear` whose weight is stored quantized, in the buffers of the native format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.models.modules import Matrix
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

Device = torch.device | str | int | None


class QuantLinear(nn.Module):
    """`y = x W^T + b` with `W` on a scheme's grid, as wide as its codes in memory and dequantized when it is used.

    Buffers are `weight_codes`, `weight_scale` and whatever else the native format stores for the scheme, so that the keys of
    its state dict are the names in a native checkpoint. They keep the dtype they are stored in: `.half()`, `.to(dtype)` and
    the like move the bias and `dtype` only, and never change what the weight is. `aq` rounds inputs to a grid whose ranges
    are taken from the inputs themselves, or, where it is static, were found by calibration and stand in `input_scale` and the
    like; its gradient passes straight through.
    """

    bias: nn.Parameter | None
    weight_codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        wq: SchemeConfig,
        aq: SchemeConfig | None = None,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Uninitialised storage, as `nn.Linear` on the meta device has: for a state dict to be loaded into. `dtype`: of the
        bias and of `weight`. Raises QP114 when groups do not divide `in_features`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.wq, self.aq = wq, aq
        self.dtype = dtype or torch.get_default_dtype()
        for config in (wq, aq):
            misfit = config.misfit(in_features) if config is not None else None
            if misfit:
                advice = f"groups of {', '.join(map(str, misfit[1]))} divide them" if misfit[1] else ""
                raise fail("QP114", f"groups of {misfit[0]} do not divide {in_features} columns", advice)
        for name, (stored, shape) in FORMATS.get("quantplan")().layout(self._matrix, wq, aq).items():
            self.register_buffer(name[1:], torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[stored]), device=device))
        empty = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        wq: SchemeConfig,
        aq: SchemeConfig | None = None,
        algorithm: Algorithm | None = None,
        *,
        name: str = "",
        absmax: Tensor | None = None,
    ) -> QuantLinear:
        """A quantized copy of `linear`, sharing its bias. `algorithm`: rtn by default; `name` keeps the random numbers of
        different layers apart; `absmax`: see `Quantizer.fit`. Raises NonFinite for NaN or infinity in the weight."""
        with torch.no_grad():
            weight = linear.weight.detach().float()
            chosen = algorithm or ALGORITHMS.get("rtn")()
            solved = chosen.solve(weight, wq.quantizer(name), absmax)
        made = cls.from_quantized(solved, linear.bias, aq, dtype=linear.weight.dtype)
        return made.train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedTensor,
        bias: nn.Parameter | None = None,
        aq: SchemeConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        inputs: Params | None = None,
    ) -> QuantLinear:
        """A layer with this weight `[out, in]` and this very bias. `dtype`: of `weight`, the bias's by default. `inputs`: what
        static activations need, as `Quantizer.fit_static` makes it; without it they are not ready to be used."""
        rows, columns = quantized.shape
        dtype = dtype or (bias.dtype if bias is not None else None)
        made = cls(columns, rows, quantized.scheme, aq, bias=False, device="meta", dtype=dtype)
        for name, tensor in FORMATS.get("quantplan")().encode(made._matrix, quantized, aq).items():
            setattr(made, name[1:], tensor)
        for name, tensor in FORMATS.get("quantplan")().encode_inputs(made._matrix, inputs or {}).items():
            setattr(made, name[1:], tensor)
        made.bias = bias
        return made

    @property
    def _matrix(self) -> Matrix:
        return Matrix("", "", self.out_features, self.in_features)

    def quantized(self) -> QuantizedTensor:
        """The weight as codes and parameters, `[out, in]`."""
        return FORMATS.get("quantplan")().decode(self._matrix, self.wq, self.aq, lambda name: getattr(self, name[1:]))

    def inputs(self) -> Params:
        """What was found for static activations; empty for dynamic ones."""
        return FORMATS.get("quantplan")().decode_inputs(self._matrix, self.aq, lambda name: getattr(self, name[1:]))

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The weight the layer computes with, float32 `[out, in]`."""
        return self.wq.quantizer().dequantize(self.quantized())

    @property
    def weight(self) -> Tensor:
        """The weight as an `nn.Linear` would hold it, in `dtype`: for code that looks at it. Computed at every access."""
        return self.dequantize().to(self.dtype)

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the dequantized weight in `dtype` and this very bias; activations are not quantized there."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`, or autocast's, as `nn.Linear`."""
        if self.aq is not None:
            x = _StraightThrough.apply(x, self.aq, self.inputs())
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return functional.linear(x, self.dequantize().to(x.dtype), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        stored = {id(buffer) for buffer in self._buffers.values()}

        def keep_stored_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in stored or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        return super()._apply(keep_stored_dtype, recurse)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shown}, wq={_shown(self.wq)}" + (f", aq={_shown(self.aq)}" if self.aq is not None else "")


class _StraightThrough(torch.autograd.Function):
    """Fake quantization of activations; rounding has no gradient of its own, so the output's is passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, aq: SchemeConfig, inputs: Params) -> Tensor:
        quantizer = aq.quantizer()
        return quantizer.quantize_activation(x) if aq.dynamic else quantizer.round_static(x, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _shown(scheme: SchemeConfig) -> str:
    """`int4 group 64`, `fp8 e5m2 channel`, `int8 asymmetric group 32`."""
    parts = [
        scheme.name,
        getattr(scheme, "format", ""),
        "" if scheme.dynamic else "static",
        "" if scheme.symmetric_grid else "asymmetric",
        scheme.strategy,
    ]
    return " ".join([p for p in parts if p] + ([str(scheme.group)] if scheme.group else []))
