"""`PTQPipeline` (seed 002): a model in memory calibrated, quantized and measured. Layers are those of `nn/real_quant`, observers
those of plans, figures those of `comparison`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.comparison.in_memory import Metric, ModuleFigures, as_batch, call, measure, stored_bytes
from quantplan.errors import QuantplanError, fail
from quantplan.nn.real_quant import RealQuantizeLinear, convert_to_real_quant, integers, quantize_all, rounds_inputs
from quantplan.numerics import counted_values
from quantplan.observer import OBSERVERS, Range
from quantplan.plan.activations import default_observer
from quantplan.scheme import NonFinite

# A layer's inputs get one range for all tokens where that costs no more than this times the squared error of a range for each
# token. KL of SmolLM2-135M: 0.0302 without such layers, 0.0314 at 1.5 (28 of its 210), 0.0624 at 2 (111), 0.0673 at 4 (163).
TOLERANCE = 1.5


class PTQPipeline:
    """Post-training quantization of a module: `calibrate`, `convert_to_real_quant`, and what that gained and cost.

    A model that is given as it is stays so: what is quantized is a copy. One that `convert_to_real_quant` made is quantized
    itself. Loaders are iterables of batches: inputs, `(inputs, targets)`, or mappings of arguments, whose targets are `labels`;
    they run on the model's device. Bits and symmetry as in `RealQuantizeLinear`; those of a converted model are its own.
    """

    def __init__(self, model: nn.Module, bits: int = 8, symmetric: bool = True) -> None:
        """Raises QuantplanError QP105 for a width that is not 4, 8 or 16."""
        integers(bits)
        self.bits, self.symmetric = bits, symmetric
        self.model = model
        self.quantized: nn.Module | None = model if _layers(model, RealQuantizeLinear) else None
        self._original_bytes = stored_bytes(model)
        self._ranges: dict[str, _Range] = {}
        self._squares: dict[str, _Squares] = {}

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Any], num_batches: int = 10) -> None:
        """Runs up to `num_batches` batches and observes the inputs of layers; a second call adds to the first.

        Layers that round their inputs: where one range for all tokens serves about as well as one for each, it becomes static,
        and faster. Weights of 4 bits: scales are searched for the least error of the outputs (`search: imatrix` of `rtn`).

        Raises QuantplanError: no batches (QP130); weights that are quantized already (QP105); inputs that are not finite (QP601).
        """
        if self.quantized is not None and any(m.quantized for m in _layers(self.quantized, RealQuantizeLinear).values()):
            raise fail("QP105", "the weights are quantized already", "calibrate before quantize_weights")
        trains = {m: m.training for m in self.model.modules()}
        seen = 0
        with ExitStack() as hooks:
            for name, layer in _layers(self.model, nn.Linear if self.quantized is None else RealQuantizeLinear).items():
                watched = self._watched(name, layer)
                if watched is not None:
                    hooks.callback(layer.register_forward_pre_hook(watched.take, with_kwargs=True).remove)
            self.model.eval()
            try:
                for item in islice(loader, num_batches):
                    call(self.model, as_batch(item, _device(self.model))[0])
                    seen += 1
            finally:
                for module, training in trains.items():
                    module.training = training
        if not seen:
            raise fail("QP130", "the loader has no batches", "give one with at least one batch")

    def convert_to_real_quant(self) -> nn.Module:
        """The quantized model: every `nn.Linear` a `RealQuantizeLinear`, weights integers."""
        return self.quantize_weights()

    def quantize_weights(self) -> nn.Module:
        """The quantized model: makes all weights integers, after converting the model where that was not done. A second call
        changes nothing. Raises QuantplanError QP601 for a weight with NaN or infinity."""
        quantized = self.quantized if self.quantized is not None else convert_to_real_quant(self.model, self.bits, self.symmetric)
        ranges = {name: known for name, r in self._ranges.items() if (known := r.result()) is not None}
        squares = {name: mean for name, s in self._squares.items() if (mean := s.result()) is not None}
        quantize_all(quantized, ranges, squares)
        self.quantized = quantized
        return quantized

    def get_model_size(self) -> tuple[int, int]:
        """Bytes of parameters and buffers, each once: of the model that was given, and of what it is now."""
        return self._original_bytes, stored_bytes(self._current)

    def benchmark_inference(self, loader: Iterable[Any], repeats: int = 1) -> dict[str, float]:
        """Runs every batch `repeats` times: `latency_ms` of a batch (the median, with `latency_p10_ms` and `latency_p90_ms`) and
        `throughput` in samples a second, of the quantized model, or of the given one while there is none. Raises QP130."""
        figures = vars(self._measure(list(loader) * repeats))
        return {n: figures[n] for n in ("latency_ms", "latency_p10_ms", "latency_p90_ms", "throughput")}

    def evaluate_accuracy(self, loader: Iterable[Any], metric: Metric | None = None) -> float:
        """The mean over samples of `metric(outputs, targets)`, by default the share of targets that are where the output is
        largest, over the last axis; of the quantized model, or of the given one while there is none. Raises QP130."""
        accuracy = self._measure(list(loader), metric or right).accuracy
        assert accuracy is not None
        return accuracy

    @property
    def _current(self) -> nn.Module:
        return self.quantized if self.quantized is not None else self.model

    def _watched(self, name: str, layer: nn.Linear | RealQuantizeLinear) -> _Range | _Squares | None:
        """What is to be observed of a layer's inputs."""
        made = layer if isinstance(layer, RealQuantizeLinear) else None
        bits, symmetric = (self.bits, self.symmetric) if made is None else (made.bits, made.symmetric)
        if rounds_inputs(layer.out_features, bits, symmetric):
            return self._ranges.setdefault(name, _Range(name))
        return self._squares.setdefault(name, _Squares(name)) if bits == 4 else None

    def _measure(self, items: list[Any], metric: Metric | None = None) -> ModuleFigures:
        device = _device(self._current)
        batches = [as_batch(item, device) for item in items]
        if not batches:
            raise fail("QP130", "the loader has no batches", "give one with at least one batch")
        if metric is not None and any(targets is None for _, targets in batches):
            raise fail("QP130", "the loader has no targets for the metric", "give batches of (inputs, targets)")
        return measure("model", self._current, batches, device, metric, [])[1]


class _Squares:
    """The mean square of each column of a layer's inputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | None = None
        self.count = 0

    def take(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A hook before the layer's forward."""
        x = _first(arguments, keywords)
        x = x.reshape(-1, x.shape[-1])
        found = x.square().sum(0)
        if not found.isfinite().all():
            raise _not_finite(self.name)
        self.total = found if self.total is None else self.total + found
        self.count += len(x)

    def result(self) -> Tensor | None:
        """Float32 `[columns]`; None where nothing was seen."""
        return self.total / self.count if self.total is not None and self.count else None


class _Range:
    """What a layer's inputs were, and the squared error that rounding them with a range for each token would have made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dynamic = integers(8, granularity="token").quantizer()
        self.static = integers(8, granularity="tensor", dynamic=False).quantizer()
        self.observer = OBSERVERS.get(default_observer(self.static.config)).model_validate({}).observer()
        self.error = 0.0

    def take(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A hook before the layer's forward."""
        x = _first(arguments, keywords)
        try:
            self.observer.update(x)
        except NonFinite:
            raise _not_finite(self.name) from None
        self.error += float((self.dynamic.quantize_activation(x) - x).double().square().sum())

    def result(self) -> Range | None:
        """One range for all inputs; None where a range for each token is much better, or nothing was seen."""
        state = self.observer.state()
        if not state:
            return None
        found = self.observer.result(self.static).to("cpu")
        values, counts = counted_values(state["counts"])
        rounded = self.static.round_static(values, self.static.fit_static(found))
        error = float(((rounded - values).double().square() * counts).sum())
        return found if error <= TOLERANCE * self.error else None


def _first(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The input of a linear, float32."""
    x: Tensor = arguments[0] if arguments else keywords["input"]
    return x.detach().float()


def _not_finite(name: str) -> QuantplanError:
    return fail("QP601", f"NaN or infinity in the inputs of '{name}'", "look at the data and the weights")


def right(outputs: Tensor, targets: Tensor) -> float:
    """The share of targets, any shape, that are where the output is largest over its last axis."""
    return float((outputs.argmax(-1) == targets).double().mean())


def _layers(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The modules of exactly this type, by the first of their names."""
    return {name: module for name, module in model.named_modules() if type(module) is kind}


def _device(model: nn.Module) -> str:
    """Where the model is."""
    first = next((t for tensors in (model.parameters(), model.buffers()) for t in tensors), None)
    return "cpu" if first is None else str(first.device)
