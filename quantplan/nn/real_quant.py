"""Seed 002's words: `RealQuantize`, `RealQuantizeLinear` and `convert_to_real_quant`. The arithmetic is that of the integer
schemes, and a layer whose weight is quantized computes with a `QuantLinear`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantplan.algorithm import ALGORITHMS
from quantplan.errors import fail
from quantplan.nn.linear import QuantLinear
from quantplan.nn.quantize import holders
from quantplan.observer import Range, extremes
from quantplan.scheme import SCHEMES, NonFinite, Params, SchemeConfig
from quantplan.statistics import Statistics

WIDTHS = (4, 8, 16)
GROUPS = (32, 16, 8)  # columns that share a scale of 4 bits; where none divides them, a row does
WORTH_ROUNDING = 32  # outputs from which on rounding a token's inputs costs less than integers save


def integers(bits: int, **options: Any) -> SchemeConfig:
    """The integer scheme of 4, 8 or 16 bits, with float32 scales. Raises QP105 for other widths."""
    if bits not in WIDTHS:
        raise fail("QP105", f"no integers of {bits} bits here", f"bits is one of {', '.join(map(str, WIDTHS))}")
    if bits < 16:
        return SCHEMES.get(f"int{bits}").model_validate({"scale_dtype": "float32", **options})
    import quantplan  # which finds it in the schemes' folder: it is not in the registry

    wide: SchemeConfig = quantplan.INT16Config.model_validate({"scale_dtype": "float32", **options})
    return wide


def rounds_inputs(out_features: int, bits: int, symmetric: bool) -> bool:
    """Whether a `RealQuantizeLinear` rounds its inputs to int8 once its weight is quantized."""
    return bits == 8 and symmetric and out_features >= WORTH_ROUNDING


class RealQuantize(nn.Module):
    """Tensors to signed integers and back, with one scale and zero point for all of their values.

    `q = clamp(round(x / scale) + zero_point, -2^(bits-1), 2^(bits-1) - 1)` and `x ~ (q - zero_point) * scale`: the formulas of
    int4 and int8 (`quantplan.schemes.integer`), with codes moved by `2^(bits-1)`. `scale`, float32, may be learned: `dequantize`
    has a gradient for it, and rounding has none for `x`. Raises QuantplanError QP105 for a width that is not 4, 8 or 16.
    """

    low: Tensor
    high: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, symmetric: bool = True) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.config = integers(bits, granularity="tensor", symmetric=symmetric)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers: int8, and int16 for 16 bits."""
        return torch.int8 if self.bits <= 8 else torch.int16

    @property
    def calibrated(self) -> bool:
        """Whether values were seen."""
        return bool(self.low <= self.high)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Takes in values, any shape and float dtype: scale and zero point are those of the range of all tensors so far.
        Raises NonFinite, a ValueError, for NaN and infinity; then nothing has changed."""
        if x.numel() == 0:
            return
        low, high = extremes(x)
        self.low.copy_(torch.minimum(self.low, low.to(self.low)))
        self.high.copy_(torch.maximum(self.high, high.to(self.high)))
        params = self.config.quantizer().fit_range(Range(self.low, self.high))
        self.scale.copy_(params["scale"].reshape(()))
        if not self.symmetric:
            self.zero_point.copy_(params["zero_point"].reshape(()).int() - self._middle)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Integers, shape of `x`; what lies outside the range saturates. The first tensor calibrates what was not."""
        if not self.calibrated:
            self.calibrate(x)
        return (self.config.quantizer().encode(x.float(), self._params()).int() - self._middle).to(self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """Float32 values of integers, shape of `q`. Raises QP603 where nothing was calibrated."""
        if not self.calibrated:
            raise fail("QP603", "the quantizer has seen no values", "call calibrate first")
        return self.config.quantizer().decode(q.int() + self._middle, self._params())

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the grid, in its own dtype."""
        return self.dequantize(self.quantize(x)).to(x.dtype) if x.numel() else x

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}"

    @property
    def _middle(self) -> int:
        return 2 ** (self.bits - 1)

    def _params(self) -> Params:
        return {"scale": self.scale, "zero_point": self.zero_point + self._middle}


class RealQuantizeLinear(nn.Module):
    """An `nn.Linear` whose weight becomes integers, for good, when `quantize_weights` is called; until then it is one.

    Weights: 8 and 16 bits have a scale for each row, 4 bits for 32 columns of it (16, 8 or all where 32 do not divide them);
    `symmetric=False` adds zero points. Inputs of symmetric 8-bit layers with 32 outputs or more are rounded to int8 too, one
    scale for each token, or one for all where `quantize_weights` was given their range, so that integers are multiplied by
    integers (the kernel int8_mm). All else takes inputs as they are.

    The state dict has `weight` and `bias`; once quantized `bias` and `quantized.`, a `QuantLinear`, which a layer that is not
    quantized yet loads as well.
    """

    bias: nn.Parameter | None
    quantized: QuantLinear | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        symmetric: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialised as an `nn.Linear`. Raises QP105 for a width that is not 4, 8 or 16."""
        super().__init__()
        self._set_up(nn.Linear(in_features, out_features, bias, device, dtype), bits, symmetric)

    def _set_up(self, linear: nn.Linear, bits: int, symmetric: bool) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.symmetric = bits, symmetric
        weight: Any = linear.weight
        self._parameters["weight"] = weight  # not by name, which is the property's
        self.register_parameter("bias", linear.bias)
        self.quantized = None
        self._wq()

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = 8, symmetric: bool = True) -> RealQuantizeLinear:
        """A layer with this very weight and bias, not quantized yet. Raises QP105."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set_up(linear, bits, symmetric)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]`: the parameter, or, once quantized, what the integers stand for, computed at every access."""
        dense = self._parameters.get("weight")
        if dense is not None:
            return dense
        assert self.quantized is not None
        return self.quantized.weight

    @torch.no_grad()
    def quantize_weights(self, inputs: Range | None = None, squares: Tensor | None = None) -> None:
        """Makes the weight integers and gives the floats up; does nothing a second time.

        `inputs`: where the inputs lie, for layers that round them. `squares`: the mean square of each column's inputs, float32
        `[in_features]`: scales are then searched for the least squared error of the outputs, and else cover every weight. Raises
        NonFinite for NaN and infinity in the weight, QP222 without one."""
        if self.quantized is not None:
            return
        if self.weight.is_meta:
            raise fail("QP222", "the model has no weights: it is on the meta device", "load its weights first")
        known = None if squares is None else Statistics(squares.to(self.weight.device).diag(), 1)
        rtn = ALGORITHMS.get("rtn").model_validate({} if known is None else {"search": "imatrix"})
        solved = rtn.solve(self.weight.float(), self._wq().quantizer(), statistics=known)
        aq = self.activations(static=inputs is not None)
        found = aq.quantizer().fit_static(inputs) if aq is not None and inputs is not None else None
        made = QuantLinear.from_quantized(solved, None, aq, dtype=self.weight.dtype, inputs=found)
        self._replace(made.train(self.training))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, as `nn.Linear`."""
        quantized, bias = self.quantized, self._parameters["bias"]  # by name it takes longer: see QuantLinear.forward
        if quantized is None:
            return functional.linear(x, self.weight, bias)
        y: Tensor = quantized(x)
        return y if bias is None else y + bias.to(y.dtype)

    def activations(self, static: bool = False) -> SchemeConfig | None:
        """The grid of the inputs once the weight is quantized; None where they are taken as they are."""
        if not rounds_inputs(self.out_features, self.bits, self.symmetric):
            return None
        return integers(8, granularity="tensor", dynamic=False) if static else integers(8, granularity="token")

    def _wq(self) -> SchemeConfig:
        group = next((g for g in GROUPS if self.in_features % g == 0), None) if self.bits == 4 else None
        grouping = {"group_size": group} if group else {"granularity": "channel"}
        fine = {} if group is None else {"scale_dtype": "bfloat16"}  # scales of small groups weigh
        return integers(self.bits, symmetric=self.symmetric, **grouping, **fine)

    def _replace(self, made: QuantLinear) -> None:
        self.quantized = made
        del self._parameters["weight"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        stored = f"{prefix}quantized."
        if self.quantized is None and f"{stored}weight_codes" in state_dict:
            aq = self.activations(static=f"{stored}input_scale" in state_dict)
            weight = self.weight
            size = {"in_features": self.in_features, "out_features": self.out_features}
            made = QuantLinear(**size, wq=self._wq(), aq=aq, bias=False, device=weight.device, dtype=weight.dtype)
            self._replace(made.train(self.training))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shown}, bits={self.bits}, symmetric={self.symmetric}"


def convert_to_real_quant(model: nn.Module, bits: int = 8, symmetric: bool = True) -> nn.Module:
    """A copy of `model` in which every `nn.Linear` is a `RealQuantizeLinear`, with the same weight values, not quantized yet.

    `model` itself stays as it is. A layer that stands in several places is one layer in the copy too. Subclasses of `nn.Linear`
    stay, and so do layers that share their weight with an embedding, which would have to keep it as well. Hooks on replaced
    layers are lost. For plans, with what to keep and other schemes, see `quantplan.quantize`. Raises QP105 for a bad width.
    """
    integers(bits)
    made = copy.deepcopy(model)
    embedded = {id(m.weight) for m in made.modules() if isinstance(m, nn.Embedding)}
    if type(made) is nn.Linear:
        return RealQuantizeLinear.from_linear(made, bits, symmetric)
    places = holders(made)
    for linear in list(made.modules()):
        if type(linear) is nn.Linear and id(linear.weight) not in embedded:
            layer = RealQuantizeLinear.from_linear(linear, bits, symmetric)
            for parent, name in places[id(linear)]:
                setattr(parent, name, layer)
    return made


def quantize_all(model: nn.Module, inputs: Mapping[str, Range], squares: Mapping[str, Tensor]) -> None:
    """Calls `quantize_weights` of every layer, with what is known of its inputs by its name in `named_modules`. Raises QP601
    with the name of a weight that holds NaN or infinity."""
    for name, layer in model.named_modules():
        if not isinstance(layer, RealQuantizeLinear):
            continue
        try:
            layer.quantize_weights(inputs.get(name), squares.get(name))
        except NonFinite:
            raise fail("QP601", "NaN or infinity in the weight", "mend the weight", tensor=f"{name}.weight") from None
