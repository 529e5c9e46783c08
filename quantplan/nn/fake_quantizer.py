"""`FakeQuantizer`: the module that rounds a weight, or activations, to a scheme's grid while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.errors import fail
from quantplan.nn.fake_quantize import fake_quantize, widened, with_learned
from quantplan.observer import Observer
from quantplan.scheme import NonFinite, Params, Quantizer, SchemeConfig, largest_magnitude
from quantplan.tensor import QuantizedTensor


class FakeQuantizer(nn.Module):
    """Rounds to the grid of `scheme` with straight-through gradients (`fake_quantize`), while `fake_quant_enabled`.

    The range is one of three: taken from each tensor as it comes (weights and dynamic activations); found by `observer`, which
    sees what comes in training while `observer_enabled` (static activations); or learned, once `learn` was called. Nothing but
    what is learned is in the state dict. `name` keeps the random numbers of different weights apart.
    """

    step: nn.Parameter | None
    zero: nn.Parameter | None

    def __init__(self, scheme: SchemeConfig, observer: Observer | None = None, name: str = "") -> None:
        super().__init__()
        self.scheme, self.observer, self.name = scheme, observer, name
        self.enabled = self.fake_quant_enabled = self.observer_enabled = True
        self.place = ""  # the layer's name, for what is raised
        self.use_grad_scaling, self.highest = True, 1.0  # `highest`: the highest level, in steps
        self.register_parameter("step", None)
        self.register_parameter("zero", None)
        self._quantizer = scheme.quantizer(name)
        self._found: Params | None = None  # what the observer's range gives; None: ask it

    def quantizer(self) -> Quantizer:
        """The arithmetic; in training its random numbers go on from tensor to tensor, else they begin anew."""
        return self._quantizer if self.training else self.scheme.quantizer(self.name)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` on the grid, in its own dtype. Raises NonFinite, or QuantplanError QP601 naming the layer; QP603 where
        a range is to be used and nothing was seen."""
        if not self.enabled:
            return x
        if self.observer is not None and self.observes:
            self.observe(x)
        if not self.fake_quant_enabled or x.numel() == 0:
            return x
        return self.round(x)

    @property
    def observes(self) -> bool:
        """Whether the observer sees what comes."""
        return self.training and self.observer_enabled

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Whether values are rounded."""
        self.fake_quant_enabled = bool(enabled)

    def disable_fake_quant(self) -> None:
        """Values pass as they are."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Whether the observer sees what comes."""
        self.observer_enabled = bool(enabled)

    def disable_observer(self) -> None:
        """Ranges stay as they are."""
        self.enable_observer(False)

    def observe(self, x: Tensor) -> None:
        """Shows a tensor to the observer."""
        assert self.observer is not None
        with self._named():
            self.observer.update(x)
        self._found = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says which layer NaN or infinity came to, where that is known."""
        try:
            yield
        except NonFinite:
            if not self.place:
                raise
            advice = "if training diverged: a smaller learning rate, or clipped gradients"
            raise fail("QP601", "NaN or infinity in what is rounded", advice, tensor=self.place) from None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any) -> None:
        """A float model's checkpoint has no learned steps: they stay as they are."""
        learned = {f"{prefix}step", f"{prefix}zero"} - state_dict.keys()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [name for name in missing if name not in learned]

    def load_range(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what the observer saw. Raises as `Observer.load_state`."""
        assert self.observer is not None
        self.observer.load_state(state)
        self._found = None

    def round(self, x: Tensor, absmax: Tensor | None = None) -> Tensor:
        """`[..., columns]` on the grid. `absmax`: see `Quantizer.fit`."""
        quantizer = self.quantizer()
        with self._named():
            params = self.params(x, quantizer, absmax)
        step, zero = self.learning()
        scale = self.gradient_scale(x.numel()) if step is not None else 1.0
        return fake_quantize(x, quantizer, params, step=step, zero_point=zero, gradient_scale=scale)

    def learning(self) -> tuple[Tensor | None, Tensor | None]:
        """What is learned, step and zero point, as `fake_quantize` takes them; None: nothing."""
        return self.step, self.zero

    @torch.no_grad()
    def params(self, x: Tensor, quantizer: Quantizer, absmax: Tensor | None = None) -> Params:
        """The parameters of `x`, as `QuantizedTensor` has them, learned ones aside."""
        groups = quantizer.groups(x.detach().reshape(-1, x.shape[-1]).float())
        if self.observer is None:
            if absmax is None and self.scheme.needs_absmax:
                absmax = largest_magnitude(groups).amax()
            found = quantizer.fit(groups, absmax=absmax)
        else:
            known = {n: p.to(x.device) for n, p in self.found().items()}
            found = quantizer.static_params(groups, known)
        return {n: p if n in self.scheme.tensor_params else p.squeeze(-1) for n, p in found.items()}

    def found(self) -> Params:
        """What `Quantizer.fit_static` finds in the observer's range. Raises QuantplanError QP603 when nothing was seen."""
        assert self.observer is not None
        if self._found is None:
            quantizer = self.scheme.quantizer()
            self._found = quantizer.fit_static(self.observer.result(quantizer))
        return self._found

    @torch.no_grad()
    def static(self) -> Params | None:
        """What the quantized layer stores for static activations, learned or found; None for dynamic ones. Raises QuantplanError
        QP603 when nothing was seen."""
        if self.observer is None:
            return None
        if self.learning()[0] is None:
            return self.found()
        grid = self.learned({n: p.reshape(1, 1) for n, p in self.found().items()})
        return {n: p.reshape(1) for n, p in grid.items()}

    @torch.no_grad()
    def solve(self, weight: Tensor, absmax: Tensor | None = None) -> QuantizedTensor:
        """A weight as codes and parameters, `[out, columns]`."""
        matrix = weight.detach().reshape(weight.shape[0], -1).float().contiguous()
        quantizer = self.scheme.quantizer(self.name)
        params = self.learned(self.params(matrix, quantizer, absmax))
        return quantizer.quantize_groups(quantizer.groups(matrix), widened(params, quantizer), *matrix.shape)

    def learn(self, params: Params) -> None:
        """From now on the step, and the zero point where there is one, are parameters, which begin as `params`, shaped as
        those of `QuantizedTensor`, has them. What belongs to the whole tensor is not learned."""
        quantizer = self.scheme.quantizer()
        self.highest = highest_level(self.scheme, params)
        self.step = nn.Parameter(quantizer.step(params).detach().clone())
        if "zero_point" in params:
            self.zero = nn.Parameter(params["zero_point"].detach().float().clone())

    def learned(self, params: Params) -> Params:
        """`params` with what was learned in the place of what was fitted, as it is stored."""
        step, zero = self.learning()
        return with_learned(params, self.scheme.quantizer(), step, zero)

    def gradient_scale(self, count: int) -> float:
        """What gradients of learned parameters are multiplied by: `1 / sqrt(count * highest level)`, LSQ's section 2.2."""
        return (count * self.highest) ** -0.5 if self.use_grad_scaling else 1.0


def highest_level(scheme: SchemeConfig, params: Params) -> float:
    """The highest level of a grid in steps; of integers with a zero point, the highest code (torch.ao's `quant_max`)."""
    if "zero_point" in params and scheme.name.startswith("int"):
        return 2.0**scheme.bits - 1
    return scheme.quantizer().levels({**params, "zero_point": params["scale"] * 0} if "zero_point" in params else params)[-1]


class WeightFakeQuantizer(FakeQuantizer):
    """Rounds a weight `[out, ...]` as `algorithm` does when a plan is applied.

    `fused`: modules whose weights, this one's among them, share what belongs to a whole tensor (nvfp4's scale of q, k and v);
    they are no children. An algorithm that takes data cannot be asked at every step: `rtn` then.
    """

    def __init__(self, scheme: SchemeConfig, algorithm: Algorithm | None = None, name: str = "") -> None:
        super().__init__(scheme, name=name)
        plain = ALGORITHMS.get("rtn")()
        self.algorithm = plain if algorithm is None or algorithm.takes_data else algorithm
        self._fits = self.algorithm == plain  # the ranges are then those of `Quantizer.fit`
        self.fused: tuple[Any, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on the grid, in its own dtype. Raises NonFinite."""
        if not self.fake_quant_enabled:
            return weight
        matrix = weight.reshape(weight.shape[0], -1)
        return self.round(matrix, self.absmax()).view(weight.shape)

    @torch.no_grad()
    def absmax(self) -> Tensor | None:
        """The largest magnitude of all fused weights, for schemes that need it; None: this weight's own."""
        if not self.scheme.needs_absmax or not self.fused:
            return None
        weights = [layer.weight.detach() for layer in self.fused]
        return torch.stack([weight.abs().amax().float() for weight in weights]).amax()

    @torch.no_grad()
    def params(self, x: Tensor, quantizer: Quantizer, absmax: Tensor | None = None) -> Params:
        if self._fits or self.step is not None:
            return super().params(x, quantizer, absmax)
        return dict(self.algorithm.solve(x.detach().float(), self.scheme.quantizer(self.name), absmax).params)

    @torch.no_grad()
    def solve(self, weight: Tensor, absmax: Tensor | None = None) -> QuantizedTensor:
        """The weight as codes and parameters, `[out, columns]`: what a plan applied to it gives, or what was learned."""
        absmax = self.absmax() if absmax is None else absmax
        if self.step is not None:
            return super().solve(weight, absmax)
        matrix = weight.detach().reshape(weight.shape[0], -1).float().contiguous()
        with self._named():
            return self.algorithm.solve(matrix, self.scheme.quantizer(self.name), absmax)
