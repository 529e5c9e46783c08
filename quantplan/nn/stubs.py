"""`QuantStub`: activations observed, rounded in training, or rounded for good, as mode and switches say (seed 000); and the
layers that stand behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantplan.errors import fail
from quantplan.nn.fake_quantize import fake_quantize
from quantplan.nn.fake_quantized import FakeQuantizedConv2d, FakeQuantizedLinear
from quantplan.nn.fake_quantizer import FakeQuantizer, WeightFakeQuantizer, highest_level
from quantplan.observer import OBSERVERS, Range
from quantplan.scheme import SCHEMES, Params, SchemeConfig

SchemeLike = SchemeConfig | str | dict[str, Any]


class QuantStub(FakeQuantizer):
    """Rounds activations to the grid of `scheme`, with one range for the tensor where the scheme has it. Without a scheme it
    marks a boundary and passes everything (seed 003).

    In training it observes, and `qat_mode` off: passes its input as it is (calibration); on: rounds, with `scale` and
    `zero_point` once `is_calibrated`, until then with what it has seen so far; with `learnable_params` these are parameters, and
    `compute_quant_params` starts them anew. In evaluation it rounds once calibrated, and passes until then. `enabled` off: it
    passes everything. Raises QuantplanError QP105 for `learnable_params` of a scheme that has no one step for the tensor.
    """

    def __init__(
        self,
        scheme: SchemeLike | None = None,
        *,
        qat_mode: bool = False,
        learnable_params: bool = False,
        observer: str = "minmax",
        use_grad_scaling: bool = False,
    ) -> None:
        config = static_scheme(scheme) if scheme is not None else SCHEMES.get("int8")()
        super().__init__(config, OBSERVERS.get(observer)().observer() if not config.dynamic else None)
        self.enabled, self.is_calibrated, self.use_grad_scaling = scheme is not None, False, use_grad_scaling
        self._kinds = {n: p.dtype for n, p in self._defaults().items()}
        for name, start in self._defaults().items():
            self.register_buffer(name, start.int() if name == "zero_point" else start)
        self.set_mode(qat_mode, learnable_params)

    def set_mode(self, qat_mode: bool, learnable_params: bool = False) -> None:
        """What the stub does in training: see the class. Scale and zero point stay what they are. Raises as the class."""
        self.qat_mode, self.learnable_params = qat_mode, learnable_params
        if learnable_params and self.enabled and "scale" not in self._kinds:
            text = f"{self.scheme.name} activations have no step for the tensor to learn"
            raise fail("QP105", text, "leave learnable_params out")
        if learnable_params:
            self.highest = highest_level(self.scheme, self._defaults()) if self._kinds else 1.0
        for name in self._kinds.keys() & {"scale", "zero_point"}:
            held = getattr(self, name).detach()
            delattr(self, name)
            if learnable_params:
                self.register_parameter(name, nn.Parameter(held.float()))
            else:
                self.register_buffer(name, held.round().int() if name == "zero_point" else held)

    def _defaults(self) -> Params:
        """A step of 1 and a zero point of 0, or of the level nearest to it."""
        if self.scheme.dynamic:
            return {}
        found = self.scheme.quantizer().fit_static(Range(torch.zeros(()), torch.ones(())))
        return {n: torch.ones_like(p) if n != "zero_point" else torch.zeros_like(p) for n, p in found.items()}

    def forward(self, x: Tensor) -> Tensor:
        """`x` as it is, or on the grid in its own dtype. Raises NonFinite where it observes NaN or infinity."""
        if not self.enabled or x.numel() == 0:
            return x
        if not self.training:
            return self.round(x) if self.is_calibrated and self.fake_quant_enabled else x
        if self.observer is not None and self.observer_enabled:
            self.observe(x)
        return self.round(x) if self.qat_mode and self.fake_quant_enabled else x

    def compute_quant_params(self) -> None:
        """Sets scale and zero point to what was seen, and `is_calibrated`. Raises QuantplanError QP603 when nothing was."""
        if self.observer is not None:
            quantizer = self.scheme.quantizer()
            for name, found in quantizer.fit_static(self.observer.result(quantizer)).items():
                held: Tensor = getattr(self, name)
                held.data = found.to(device=held.device, dtype=held.dtype)
        self.is_calibrated = True

    @staticmethod
    def _ste_round(x: Tensor) -> Tensor:
        """`x` rounded to integers, with the gradient of `x` (the straight-through estimator)."""
        return x + (x.round() - x).detach()

    @property
    def _running(self) -> bool:
        """Whether ranges are those seen so far, and not held."""
        return not self.is_calibrated and not self.learnable_params

    def found(self) -> Params:
        if self._running:
            return super().found()
        return {n: getattr(self, n).detach().reshape(1).to(kind) for n, kind in self._kinds.items()}

    def learning(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.learnable_params:
            return None, None
        scale, zero = (getattr(self, name, None) for name in ("scale", "zero_point"))
        return (scale.reshape(1, 1) if scale is not None else None), (zero.reshape(1, 1) if zero is not None else None)

    @property
    def min_val(self) -> Tensor:
        """The least value seen; infinite before any."""
        return self._seen("low", torch.inf)

    @property
    def max_val(self) -> Tensor:
        """The largest value seen; minus infinity before any."""
        return self._seen("high", -torch.inf)

    def _seen(self, end: str, otherwise: float) -> Tensor:
        state = self.observer.state() if self.observer is not None else {}
        return state.get(end, torch.tensor(otherwise))

    def get_extra_state(self) -> dict[str, Any]:
        """What the state dict holds beside scale and zero point: whether they are calibrated, and what was seen."""
        return {"is_calibrated": self.is_calibrated, "seen": self.observer.state() if self.observer is not None else {}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_extra_state`."""
        self.is_calibrated = bool(state["is_calibrated"])
        if self.observer is not None:
            self.observer.load_state(state["seen"])
            self._found = None

    def extra_repr(self) -> str:
        shown = f"{self.scheme.name}, " if self.enabled else ""
        return f"{shown}qat_mode={self.qat_mode}, learnable_params={self.learnable_params}, is_calibrated={self.is_calibrated}"


class DeQuantStub(nn.Module):
    """Marks where activations are floats again; they always are, and it passes them."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


class FP4QuantStub(QuantStub):
    """Seed 000's stub: fp4 activations, asymmetric unless `symmetric`."""

    def __init__(
        self, qat_mode: bool = False, learnable_params: bool = False, *, symmetric: bool = False, **options: Any
    ) -> None:
        scheme = {"scheme": "fp4", "symmetric": symmetric}
        super().__init__(scheme, qat_mode=qat_mode, learnable_params=learnable_params, **options)


class FP4Linear(FakeQuantizedLinear):
    """An `nn.Linear` with the weight rounded to fp4: in groups of 32, or by row where they do not divide; or to `scheme`."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, scheme: SchemeLike = "fp4", **options: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.weight_fake_quant = WeightFakeQuantizer(weight_scheme(scheme, in_features))
        self.input_fake_quant = None


class FP4Conv2d(FakeQuantizedConv2d):
    """An `nn.Conv2d` with the weight rounded to fp4: in groups of 32, or by filter where they do not divide; or to `scheme`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, *geometry: Any, scheme: SchemeLike = "fp4", **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *geometry, **options)
        self.weight_fake_quant = WeightFakeQuantizer(weight_scheme(scheme, self.weight[0].numel()))
        self.input_fake_quant = None


def quantize_to_fp4_asymmetric(x: Tensor, scale: Tensor | float, zero_point: Tensor | float) -> Tensor:
    """`x` on the grid of fp4 values less `zero_point`, times `scale`, as floats (seed 000); the zero point is the nearest whole
    number that fp4 holds."""
    quantizer = static_scheme({"scheme": "fp4", "symmetric": False}).quantizer()
    step, zero = (torch.as_tensor(v, dtype=torch.float32, device=x.device).reshape(1, 1) for v in (scale, zero_point))
    return fake_quantize(x, quantizer, quantizer.with_zero_point({"scale": step, "zero_point": zero.to(torch.int8)}, zero))


def static_scheme(scheme: SchemeLike) -> SchemeConfig:
    """A scheme for activations with one range for the tensor where it has such; scales are float32 unless said otherwise. Raises
    QuantplanError QP107 for an unknown scheme."""
    if isinstance(scheme, SchemeConfig):
        return scheme
    options: dict[str, Any] = dict(scheme) if isinstance(scheme, dict) else {"scheme": scheme}
    member = SCHEMES.get(options.pop("scheme", ""))
    if "dynamic" not in options and ("tensor" in member.granularities or member.tensor_params):
        options["dynamic"] = False
    return _with_float32_scales(member, options)


def weight_scheme(scheme: SchemeLike, columns: int) -> SchemeConfig:
    """A scheme for a weight of so many columns: by row where its groups would not divide them. Raises QuantplanError QP107 for an
    unknown scheme, QP114 where it has nothing but groups."""
    if isinstance(scheme, SchemeConfig):
        return scheme
    options: dict[str, Any] = dict(scheme) if isinstance(scheme, dict) else {"scheme": scheme}
    member = SCHEMES.get(options.pop("scheme", ""))
    made = _with_float32_scales(member, options)
    if made.misfit(columns) and "channel" in member.granularities and "group_size" not in options:
        made = _with_float32_scales(member, {**options, "granularity": "channel"})
    misfit = made.misfit(columns)
    if misfit:
        raise fail("QP114", f"groups of {misfit[0]} do not divide {columns} columns", "keep the layer, or take another scheme")
    return made


def _with_float32_scales(member: type[SchemeConfig], options: dict[str, Any]) -> SchemeConfig:
    defaults = {"scale_dtype": "float32"} if "scale_dtype" in member.model_fields else {}
    return member.model_validate({**defaults, **options})
