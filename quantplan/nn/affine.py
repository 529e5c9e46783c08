"""`FakeQuantize` and its learnable kin, under torch.ao's names: affine integers with an observer's scale and zero point.

The rounding and its gradients are `fake_quantize`'s; here stand the switches, and torch.ao's convention that a zero point lies
between `quant_min` and `quant_max`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.errors import fail
from quantplan.nn.fake_quantize import fake_quantize
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.observers import (
    SYMMETRIC,
    UNSIGNED,
    Factory,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverModule,
)
from quantplan.scheme import SCHEMES, Params, Quantizer, SchemeConfig
from quantplan.tensor import QuantizedTensor


class FakeQuantize(FakeQuantizer):
    """`(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale` (seed 003).

    While `observer_enabled`, `activation_post_process` sees every tensor and `scale` and `zero_point` follow it; while
    `fake_quant_enabled`, tensors are rounded. `observer` is an observer class or a factory (`with_args`), to which `quant_min`,
    `quant_max` and further arguments go. `is_dynamic`: the range is that of each tensor. Raises QuantplanError QP105 where the
    integers are not 2 to the power of 2 to 8: no scheme has them.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        limits = {"quant_min": quant_min, "quant_max": quant_max} if quant_min is not None and quant_max is not None else {}
        made: ObserverModule = observer(**limits, **observer_kwargs)
        dynamic = is_dynamic or made.is_dynamic or made.config.dynamic
        super().__init__(scheme_of(made, dynamic), None if dynamic else made)
        self.quant_min, self.quant_max = made.quant_min or 0, made.quant_max or 255
        self.dtype, self.qscheme, self.ch_axis, self.is_dynamic = made.dtype, made.qscheme, made.ch_axis, dynamic
        self._hold(torch.ones(1), torch.full((1,), self._middle, dtype=torch.int32))

    @classmethod
    def with_args(cls, **arguments: Any) -> Factory:
        """A factory of these modules with these arguments, as a QConfig takes them."""
        return Factory(cls, **arguments)

    @property
    def _middle(self) -> int:
        """The zero point of a symmetric grid, 0 where it is not."""
        return self.quant_min + 2 ** (self.scheme.bits - 1) if self.scheme.symmetric_grid else max(0, self.quant_min)

    def _hold(self, scale: Tensor, zero_point: Tensor) -> None:
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def activation_post_process(self) -> Any:
        """torch.ao's word for the observer; None for ranges of each tensor."""
        return self.observer

    @property
    def observes(self) -> bool:
        return self.observer_enabled

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        scale, zero_point = self.calculate_qparams()
        if self.scale.shape != scale.shape:
            self.scale.data, self.zero_point.data = self.scale.new_empty(scale.shape), self.zero_point.new_empty(scale.shape)
        self.scale.data.copy_(scale)
        self.zero_point.data.copy_(zero_point)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The observer's scale and zero point. Raises QuantplanError QP603 when nothing was seen."""
        return self.activation_post_process.calculate_qparams()

    def round(self, x: Tensor, absmax: Tensor | None = None) -> Tensor:
        if self.ch_axis == -1:
            return super().round(x.reshape(1) if x.dim() == 0 else x, absmax).view(x.shape)
        channels = x.movedim(self.ch_axis, 0)
        return super().round(channels.reshape(len(channels), -1), absmax).view(channels.shape).movedim(0, self.ch_axis)

    @torch.no_grad()
    def params(self, x: Tensor, quantizer: Quantizer, absmax: Tensor | None = None) -> Params:
        if self.observer is None:
            return super().params(x, quantizer, absmax)
        return {n: p.to(x.device) for n, p in self._grid_params().items()}

    def found(self) -> Params:
        if self.observer is not None and self.observer_enabled and not self.observer.state():
            self.calculate_qparams()  # raises: it has seen nothing
        return {n: p.reshape(1) for n, p in self._grid_params().items()}

    def solve(self, weight: Tensor, absmax: Tensor | None = None) -> QuantizedTensor:
        if self.observer is not None and self.observer_enabled:
            self.observe(weight)
        return super().solve(weight, absmax)

    def _grid_params(self) -> Params:
        """Scale and zero point as the scheme stores them, one row for each channel."""
        scale = self.scale.detach().float().reshape(-1, 1)
        if self.scheme.symmetric_grid:
            return {"scale": scale}
        return {"scale": scale, "zero_point": (self.zero_point.detach().round() - self.quant_min).reshape(-1, 1).to(torch.uint8)}

    def extra_repr(self) -> str:
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, qscheme={self.qscheme}"


class LearnableFakeQuantize(FakeQuantize):
    """A `FakeQuantize` whose `scale` and `zero_point` are parameters (LSQ), for the tensor or, with `channel_len`, each channel.

    Three phases: `enable_static_observation` (observe, round nothing), `enable_static_estimate` (round with what the observer
    finds, as it begins), `enable_param_learning` (round with the parameters, which the optimizer moves). `use_grad_scaling`:
    their gradients are multiplied by `1 / sqrt(count * quant_max)`.
    """

    scale: Any
    zero_point: Any

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        use_grad_scaling: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        if self.is_dynamic:
            raise fail("QP105", "the range of each tensor cannot be learned", "give a LearnableFakeQuantize a static observer")
        count = max(1, channel_len)
        with torch.no_grad():
            start = float(self._middle) if self.scheme.symmetric_grid else zero_point
            self.scale.data, self.zero_point.data = torch.full((count,), scale), torch.full((count,), start)
        self.use_grad_scaling, self.highest, self.eps = use_grad_scaling, float(self.quant_max), torch.finfo(torch.float32).eps
        self.enable_static_estimate()

    def _hold(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale, self.zero_point = nn.Parameter(scale.float()), nn.Parameter(zero_point.float())

    def forward(self, x: Tensor) -> Tensor:
        if not self.observer_enabled:
            self.scale.data.clamp_(min=self.eps)
        return super().forward(x)

    def learning(self) -> tuple[Tensor | None, Tensor | None]:
        zero = None if self.scheme.symmetric_grid else (self.zero_point - self.quant_min).reshape(-1, 1)
        return self.scale.reshape(-1, 1), zero

    def enable_static_observation(self) -> None:
        """Phase 1: the observer sees what comes; nothing is rounded, nothing learned."""
        self._switch(learning=False, rounding=False, observing=True)

    def enable_static_estimate(self) -> None:
        """Phase 2: values are rounded with what the observer finds."""
        self._switch(learning=False, rounding=True, observing=True)

    def enable_param_learning(self) -> None:
        """Phase 3: values are rounded with the parameters, and these have gradients."""
        self._switch(learning=True, rounding=True, observing=False)

    def _switch(self, learning: bool, rounding: bool, observing: bool) -> None:
        self.scale.requires_grad = self.zero_point.requires_grad = learning
        self.enable_fake_quant(rounding)
        self.enable_observer(observing)


_LearnableFakeQuantize = LearnableFakeQuantize  # torch.ao's name


def fake_quantize_per_tensor_affine(x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:
    """`(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale`, with the gradients of `fake_quantize`:
    straight through where not clamped, and for `scale` and `zero_point` where they require one. Raises QuantplanError QP105 for
    integers that are not 2 to the power of 2 to 8."""
    scheme = scheme_of(MovingAverageMinMaxObserver(quant_min=quant_min, quant_max=quant_max, dtype=_dtype(quant_min)))
    step = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(1, 1)
    zero = torch.as_tensor(zero_point, dtype=torch.float32, device=x.device).reshape(1, 1) - quant_min
    held = {"scale": step.detach(), "zero_point": zero.detach().round().to(torch.uint8)}
    return fake_quantize(x.reshape(1, -1), scheme.quantizer(), held, step=step, zero_point=zero).view(x.shape)


def _dtype(quant_min: int) -> torch.dtype:
    return torch.qint8 if quant_min < 0 else torch.quint8


def scheme_of(observer: ObserverModule, dynamic: bool = False) -> SchemeConfig:
    """The integer scheme with an observer's levels. Raises QuantplanError QP105 where there is none."""
    if observer.config.dynamic:  # a placeholder says no more than the dtype
        observer = MovingAverageMinMaxObserver(dtype=torch.qint8 if observer.dtype == torch.qint8 else torch.quint8)
    low, high = observer.quant_min or 0, observer.quant_max or 0
    bits = (high - low).bit_length()
    if high - low + 1 != 2**bits or not 2 <= bits <= 8:
        text = f"no scheme has the {high - low + 1} levels from {low} to {high}"
        raise fail("QP105", text, "schemes have 2 to the power of 2 to 8: quant_min=-128, quant_max=127")
    middle = (low + high) // 2 if observer.custom_range else 128  # as `calculate_qparams` sets it
    zero = middle if observer.dtype in UNSIGNED else 0
    symmetric = observer.qscheme in SYMMETRIC and zero == low + 2 ** (bits - 1)
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": "float32"}
    if symmetric:
        options["scale_rule"] = "midpoint"
    options |= {"granularity": "channel"} if observer.ch_axis != -1 else {"granularity": "tensor", "dynamic": dynamic}
    return SCHEMES.get(f"int{bits}").model_validate(options)


# torch.ao's defaults (torch/ao/quantization/fake_quantize.py)
_MOVING = {"observer": MovingAverageMinMaxObserver}
default_fake_quant = FakeQuantize.with_args(
    **_MOVING, quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=torch.per_tensor_affine, reduce_range=True
)
default_weight_fake_quant = FakeQuantize.with_args(
    **_MOVING, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, reduce_range=False
)
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
    reduce_range=False,
    ch_axis=0,
)
default_dynamic_fake_quant = FakeQuantize.with_args(
    **_MOVING, quant_min=0, quant_max=255, is_dynamic=True, dtype=torch.quint8, averaging_constant=1
)
