"""Observers under the names of torch.ao.quantization, as modules: `observer(x)` collects, `calculate_qparams()` gives scale
and zero point. The statistics and the ranges are those of `observers/`; only the arithmetic of the last step stands here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantplan.errors import fail
from quantplan.observer import OBSERVERS, Observer, Range
from quantplan.scheme import SCHEMES, Quantizer

SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
AFFINE = (torch.per_tensor_affine, torch.per_channel_affine)
PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
UNSIGNED = (torch.quint8, torch.uint8)
# dtype -> the integers it holds
INTEGERS = {
    torch.qint8: (-128, 127),
    torch.int8: (-128, 127),
    torch.quint8: (0, 255),
    torch.uint8: (0, 255),
    torch.quint4x2: (0, 15),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
    torch.qint32: (-(2**31), 2**31 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}


class Factory(partial):
    """An observer class with some arguments given: call it for an observer, or give more."""

    def with_args(self, **arguments: Any) -> Factory:
        """The same class with more arguments given."""
        return Factory(self, **arguments)


class ObserverModule(nn.Module, Observer):
    """An `Observer` that is a module. Its statistics are part of its state dict.

    `dtype` and `qscheme` say what `calculate_qparams` computes for; `quant_min` and `quant_max` together replace the integers
    of the dtype, `reduce_range` halves them; further keyword arguments are options of the observer. Raises QuantplanError
    QP105 for what does not go together.
    """

    kind: ClassVar[str]  # name in the registry
    by_channel: ClassVar[bool] = False

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        if "ch_axis" in options:
            options["axis"] = options.pop("ch_axis")
        Observer.__init__(self, OBSERVERS.get(self.kind).model_validate(options))
        self.dtype, self.reduce_range, self.eps, self.is_dynamic = dtype, reduce_range, eps, is_dynamic
        self.qscheme = qscheme if qscheme is not None else AFFINE[self.by_channel]
        self.quant_min, self.quant_max = quant_min, quant_max
        self.custom_range = quant_min is not None and quant_max is not None
        if not self.config.dynamic:
            self._check()

    def _check(self) -> None:
        """Sets the integers to use; raises QP105."""
        if self.qscheme not in (*AFFINE, *SYMMETRIC) or (self.qscheme in PER_CHANNEL) != self.by_channel:
            known = ", ".join(str(pair[self.by_channel]) for pair in (AFFINE, SYMMETRIC))
            raise fail("QP105", f"{type(self).__name__} has no qscheme {self.qscheme}", f"known: {known}")
        if self.dtype not in INTEGERS:
            raise fail("QP105", f"{type(self).__name__} has no dtype {self.dtype}", f"known: {', '.join(map(str, INTEGERS))}")
        if self.reduce_range and self.qscheme in SYMMETRIC and self.dtype == torch.quint8:
            raise fail("QP105", "reduce_range does not go with a symmetric quint8", "set quant_min and quant_max")
        low, high = INTEGERS[self.dtype]
        if self.quant_min is not None and self.quant_max is not None:
            if not self.quant_min <= 0 <= self.quant_max or self.quant_min == self.quant_max:
                raise fail("QP105", f"no grid with zero from {self.quant_min} to {self.quant_max}")
            if self.quant_max - self.quant_min > high - low:
                raise fail("QP105", f"{self.quant_min} to {self.quant_max} are more integers than {self.dtype} has")
            low, high = self.quant_min, self.quant_max
        if self.reduce_range and (self.custom_range or high - low == 255):
            low, high = low // 2, high // 2
        self.quant_min, self.quant_max = low, high

    @classmethod
    def with_args(cls, **arguments: Any) -> Factory:
        """A factory of observers with these arguments, as a QConfig takes them."""
        return Factory(cls, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        """Collects, and returns `x` itself. Raises NonFinite."""
        self.update(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, float32, and zero point, int32, `[1]` or `[channels]`, by torch.ao's formulas, so that values equal its.

        The range is widened to hold zero. Affine: `scale = (high - low) / (quant_max - quant_min)`, `zero_point = quant_min -
        round(low / scale)`. Symmetric: `scale = absmax / ((quant_max - quant_min) / 2)`, the zero point the middle of an
        unsigned dtype, else 0. A scale is at least `eps`. Raises QuantplanError QP603 when nothing was seen.
        """
        found = self.result(self._grid())
        assert (
            self.quant_min is not None and self.quant_max is not None
        )  # `_check` set them, and a dynamic observer has no result
        known = Range(found.low.clamp(max=0).reshape(-1), found.high.clamp(min=0).reshape(-1))
        steps = float(self.quant_max - self.quant_min)
        if self.qscheme in SYMMETRIC:
            scale = (known.absmax / (steps / 2)).clamp(min=self.eps)
            middle = 2**15 if self.dtype == torch.uint16 else 0
            if self.dtype in UNSIGNED:
                middle = (self.quant_min + self.quant_max) // 2 if self.custom_range else 128
            return scale, torch.full_like(scale, middle, dtype=torch.int32)
        scale = ((known.high - known.low) / steps).clamp(min=self.eps)
        zero = self.quant_min - torch.round(known.low / scale).to(torch.int32)
        return scale, zero.clamp(self.quant_min, self.quant_max)

    def _grid(self) -> Quantizer:
        """The scheme whose levels lie as those of the qscheme, of as many bits: for observers that weigh errors."""
        steps = (self.quant_max or 0) - (self.quant_min or 0)
        bits = min(8, max(2, math.ceil(math.log2(steps + 1))))
        symmetric = {"symmetric": self.qscheme in SYMMETRIC, "scale_rule": "midpoint", "scale_dtype": "float32"}
        return SCHEMES.get(f"int{bits}").model_validate({"granularity": "tensor", **symmetric}).quantizer()

    @property
    def min_val(self) -> Tensor:
        """The least value seen, or its average; infinite before any."""
        return (self._seen or {}).get("low", torch.tensor(math.inf))

    @property
    def max_val(self) -> Tensor:
        """The largest value seen, or its average; minus infinity before any."""
        return (self._seen or {}).get("high", torch.tensor(-math.inf))

    @property
    def ch_axis(self) -> int:
        """The axis of channels; -1 where there is one range."""
        axis = self.config.channel_axis
        return -1 if axis is None else axis

    def reset_min_max_vals(self) -> None:
        """torch.ao's word for `reset`."""
        self.reset()

    def get_extra_state(self) -> dict[str, Tensor]:
        """What the state dict holds of the observer: its statistics."""
        return self.state()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `get_extra_state`. Raises as `load_state`."""
        self.load_state(state)

    def extra_repr(self) -> str:
        return f"{self.config!r}, dtype={self.dtype}, qscheme={self.qscheme}"


ObserverBase = ObserverModule  # torch.ao's name


class MinMaxObserver(ObserverModule):
    """The least and the largest value ever seen."""

    kind = "minmax"


class MovingAverageMinMaxObserver(ObserverModule):
    """Moving averages of the least and the largest value; `averaging_constant` is the weight of the newest tensor."""

    kind = "moving_average"


class PerChannelMinMaxObserver(ObserverModule):
    """The least and the largest value ever seen of each channel of `ch_axis`."""

    kind = "per_channel"
    by_channel = True

    def __init__(self, *, ch_axis: int = 0, **arguments: Any) -> None:
        super().__init__(ch_axis=ch_axis, **arguments)


class MovingAveragePerChannelMinMaxObserver(ObserverModule):
    """Moving averages of the least and the largest value of each channel of `ch_axis`."""

    kind = "moving_average"
    by_channel = True

    def __init__(self, *, ch_axis: int = 0, **arguments: Any) -> None:
        super().__init__(ch_axis=ch_axis, **arguments)


class HistogramObserver(ObserverModule):
    """The range with the least error of rounding, found in a histogram of `bins` bins.

    As in torch.ao the search takes the grid to have all the bits of the dtype, whatever `quant_min` and `quant_max` say.
    """

    kind = "histogram"

    def __init__(self, *, dtype: torch.dtype = torch.quint8, **arguments: Any) -> None:
        bits = math.ceil(math.log2(INTEGERS[dtype][1] - INTEGERS[dtype][0])) if dtype in INTEGERS else 8
        super().__init__(dtype=dtype, **{"bits": bits, **arguments})


class PercentileObserver(ObserverModule):
    """The range that leaves out all but `percentile` percent of the values on each side."""

    kind = "percentile"


class MSEObserver(ObserverModule):
    """The range with the least squared error of rounding and saturating."""

    kind = "mse"


class HeadroomObserver(ObserverModule):
    """A range far above the largest magnitude, for tensors whose blocks have scales of their own."""

    kind = "headroom"


class StaticRangeObserver(ObserverModule):
    """The mean of the largest magnitudes of all tensors (seed 004's static range)."""

    kind = "static_range"


class PlaceholderObserver(ObserverModule):
    """Collects nothing and only carries its arguments: dynamic quantization, or none."""

    kind = "placeholder"

    def __init__(self, *, dtype: torch.dtype = torch.float32, custom_op_name: str = "", **arguments: Any) -> None:
        super().__init__(dtype=dtype, **arguments)
        self.custom_op = custom_op_name
