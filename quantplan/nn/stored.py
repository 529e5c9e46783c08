"""`StoredWeight`: a module whose weight is stored quantized, in the native format's buffers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.models.modules import Matrix
from quantplan.nn.fake_quantize import fake_quantize, fake_quantize_static
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

Device = torch.device | str | int | None


class StoredWeight(nn.Module):
    """A weight `[rows, columns]` on a scheme's grid, as wide as its codes in memory, and how inputs are rounded.

    Buffers are `weight_codes`, `weight_scale` and whatever else the native format stores for the scheme, so that the keys of
    its state dict are the names in a native checkpoint. They keep the dtype they are stored in: `.half()`, `.to(dtype)` and
    the like move the bias and `dtype` only, and never change what the weight is. `aq` rounds inputs to a grid whose ranges
    are taken from the inputs themselves, or, where it is static, were found by calibration and stand in `input_scale` and the
    like; its gradient passes straight through, and is zero where an input was clamped.
    """

    bias: nn.Parameter | None
    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        wq: SchemeConfig,
        aq: SchemeConfig | None,
        bias: bool,
        device: Device,
        dtype: torch.dtype | None,
        features: int | None = None,
    ) -> None:
        """Uninitialised storage of a weight `[rows, ...]`, whose columns are what is left of the shape. `features`: of an input,
        which groups of `aq` must divide; by default the columns. Raises QP114 when groups do not divide."""
        super().__init__()
        self._shape, self.wq, self.aq = shape, wq, aq
        columns = self._matrix.columns
        self.dtype = dtype or torch.get_default_dtype()
        for config, count in ((wq, columns), (aq, features or columns)):
            misfit = config.misfit(count) if config is not None else None
            if misfit:
                advice = f"groups of {', '.join(map(str, misfit[1]))} divide them" if misfit[1] else ""
                raise fail("QP114", f"groups of {misfit[0]} do not divide {count} columns", advice)
        for name, (stored, size) in FORMATS.get("quantplan")().layout(self._matrix, wq, aq).items():
            self.register_buffer(name[1:], torch.empty(size, dtype=getattr(torch, TORCH_DTYPES[stored]), device=device))
        empty = nn.Parameter(torch.empty(shape[0], dtype=self.dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    def fill(self, quantized: QuantizedTensor, bias: nn.Parameter | None = None, inputs: Params | None = None) -> None:
        """In place: takes this weight, this very bias, and what static activations need, as `Quantizer.fit_static` makes it;
        without it they are not ready to be used."""
        for name, tensor in FORMATS.get("quantplan")().encode(self._matrix, quantized, self.aq).items():
            setattr(self, name[1:], tensor)
        for name, tensor in FORMATS.get("quantplan")().encode_inputs(self._matrix, inputs or {}).items():
            setattr(self, name[1:], tensor)
        self.bias = bias

    @property
    def _matrix(self) -> Matrix:
        return Matrix("", "", self._shape[0], math.prod(self._shape[1:]))

    def quantized(self) -> QuantizedTensor:
        """The weight as codes and parameters, `[rows, columns]`."""
        return FORMATS.get("quantplan")().decode(self._matrix, self.wq, self.aq, lambda name: self._stored(name[1:]))

    def inputs(self) -> Params:
        """What was found for static activations; empty for dynamic ones."""
        return FORMATS.get("quantplan")().decode_inputs(self._matrix, self.aq, lambda name: self._stored(name[1:]))

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The weight the layer computes with, float32 `[rows, columns]`."""
        return self.wq.quantizer().dequantize(self.quantized())

    @property
    def weight(self) -> Tensor:
        """The weight as the float layer would hold it, in `dtype`: for code that looks at it. Computed at every access."""
        return self.dequantize().to(self.dtype).view(self._shape)

    @property
    def scale(self) -> Tensor:
        """Seed 003's word for `weight_scale`."""
        return self.weight_scale

    @property
    def zero_point(self) -> Tensor:
        """Seed 003's word for the weight's zero points; for symmetric grids their middle."""
        found = self.quantized().params.get("zero_point")
        return found if found is not None else torch.zeros((), dtype=torch.int32, device=self.weight_scale.device)

    def rounded(self, x: Tensor) -> Tensor:
        """Inputs `[..., features]` as `aq` rounds them."""
        if self.aq is None:
            return x
        quantizer = self.aq.quantizer()
        return fake_quantize(x, quantizer) if self.aq.dynamic else fake_quantize_static(x, quantizer, self.inputs())

    def _stored(self, name: str) -> Tensor:
        """A tensor of the native format."""
        stored: Tensor | None = self._buffers[name]
        assert stored is not None
        return stored

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        stored = {id(buffer) for buffer in self._buffers.values()}

        def keep_stored_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in stored or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        return super()._apply(keep_stored_dtype, recurse)

    def _schemes(self) -> str:
        """For `extra_repr`: `wq=int4 group 64, aq=...`."""
        return f"wq={_shown(self.wq)}" + (f", aq={_shown(self.aq)}" if self.aq is not None else "")


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
