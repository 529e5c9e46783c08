"""`QuantLinear`: an `nn.Linear` whose weight is stored quantized, in the native format's buffers, and computed by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.engine.memory import return_memory
from quantplan.kernel import Job, Kernel, serving
from quantplan.nn.stored import Device, StoredWeight
from quantplan.numerics import pack_bits
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor


class QuantLinear(StoredWeight):
    """`y = x W^T + b` with `W` on a scheme's grid, as wide as its codes in memory.

    Where a kernel serves the layer (`quantplan.kernel`), it computes with the codes, laid out as it wants them from the first
    batch on; otherwise, and where a gradient is asked for, the weight is dequantized for each batch.
    """

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
        super().__init__((out_features, in_features), wq, aq, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

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
        made.fill(quantized, bias, inputs)
        return made

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
            x = self.rounded(x)
        stored = self._parameters["bias"]  # at a third of what `self.bias` costs: one token's product takes no longer
        bias = stored.to(x.dtype) if stored is not None else None
        if kernel is None:
            return functional.linear(x, self.dequantize().to(x.dtype), bias)
        y = kernel(x) if x.dim() == 2 else kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
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
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shown}, {self._schemes()}"
