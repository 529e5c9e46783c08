"""`QuantLinear`: an `nn.Linear` whose weight is stored quantized, in the native format's buffers, and computed by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.engine.memory import return_memory
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.kernel import Job, Kernel, serving
from quantplan.models.modules import Matrix
from quantplan.nn.fake_quantize import fake_quantize, fake_quantize_static
from quantplan.numerics import pack_bits
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

Device = torch.device | str | int | None


class QuantLinear(nn.Module):
    """`y = x W^T + b` with `W` on a scheme's grid, as wide as its codes in memory.

    Where a kernel serves the layer (`quantplan.kernel`), it computes with the codes, laid out as it wants them from the first
    batch on; otherwise, and where a gradient is asked for, the weight is dequantized for each batch.

    Buffers are `weight_codes`, `weight_scale` and whatever else the native format stores for the scheme, so that the keys of
    its state dict are the names in a native checkpoint. They keep the dtype they are stored in: `.half()`, `.to(dtype)` and
    the like move the bias and `dtype` only, and never change what the weight is. `aq` rounds inputs to a grid whose ranges
    are taken from the inputs themselves, or, where it is static, were found by calibration and stand in `input_scale` and the
    like; its gradient passes straight through, and is zero where an input was clamped.
    """

    bias: nn.Parameter | None
    weight_codes: Tensor
    weight_scale: Tensor
    _kernel: Kernel | None = None
    _served: torch.dtype | None = None  # inputs that `_kernel` was chosen for

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
        return FORMATS.get("quantplan")().decode(self._matrix, self.wq, self.aq, lambda name: self._stored(name[1:]))

    def inputs(self) -> Params:
        """What was found for static activations; empty for dynamic ones."""
        return FORMATS.get("quantplan")().decode_inputs(self._matrix, self.aq, lambda name: self._stored(name[1:]))

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
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype is not self._served:
            self._choose(x.dtype)
        kernel = None if x.requires_grad and torch.is_grad_enabled() else self._kernel
        if self.aq is not None and (kernel is None or not kernel.rounds):
            quantizer = self.aq.quantizer()
            x = fake_quantize(x, quantizer) if self.aq.dynamic else fake_quantize_static(x, quantizer, self.inputs())
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        if kernel is None:
            return functional.linear(x, self.dequantize().to(x.dtype), bias)
        y = kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def job(self, dtype: torch.dtype) -> Job:
        """What a kernel is asked to do for inputs of `dtype`."""
        return Job(self.wq, self.aq, self.out_features, self.in_features, self.weight_scale.device, dtype)

    @torch.compiler.disable
    def _choose(self, dtype: torch.dtype) -> None:
        """Sets up the kernel for inputs of `dtype`, if one serves. While it holds the codes, the buffer is empty."""
        self._rest()
        job = self.job(dtype)
        chosen = serving(job)
        if chosen is not None:
            self._kernel = chosen(self.quantized(), job, self.inputs())
            if self._kernel.holds_codes:
                self._buffers["weight_codes"] = None
            return_memory()  # of what it was made by, several times the size of the codes
        self._served = dtype

    @torch.compiler.disable
    def _rest(self) -> None:
        """Gives the kernel up and puts the codes back, where a state dict has them."""
        self._buffers["weight_codes"] = self._stored("weight_codes")
        self._kernel = self._served = None

    def _stored(self, name: str) -> Tensor:
        """A tensor of the native format."""
        stored: Tensor | None = self._buffers[name]
        if stored is None:
            assert self._kernel is not None
            return pack_bits(self._kernel.codes(), self.wq.bits)
        return stored

    def __getattr__(self, name: str) -> Any:
        if name == "weight_codes" and self.__dict__["_buffers"].get(name, self) is None:
            self._rest()  # whoever asks may change them
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._rest()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._rest()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        self._rest()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self._rest()
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
