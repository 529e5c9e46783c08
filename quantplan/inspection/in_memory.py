"""Models in memory looked at module by module: the outputs of two side by side, outliers, and the ranges found (seed 003)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.engine.difference import Difference, difference
from quantplan.errors import fail
from quantplan.inspection.spread import THRESHOLD, Spread, SpreadSums
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.stored import StoredWeight
from quantplan.nn.workflows import run_batch


@dataclass(frozen=True)
class Step:
    """The step of a weight, of static inputs or of an observer's range: one, or one for each row or group."""

    name: str
    kind: str  # weight, input
    lowest: float
    median: float
    highest: float


def compare_layers(float_model: nn.Module, quantized_model: nn.Module, batch: Any) -> dict[str, Difference]:
    """Module -> how far its output is from that of the module of the same name in `float_model`, for modules that give one tensor
    of the same shape in both, in the order they run. Both models are run once, as they are."""
    with torch.no_grad():
        expected = dict(_outputs(float_model, batch))
        found = dict(_outputs(quantized_model, batch))
    return {
        name: difference([(y.float(), found[name].float())])
        for name, y in expected.items()
        if name in found and found[name].shape == y.shape and y.is_floating_point()
    }


def compare_quantized_float(float_model: nn.Module, quant_model: nn.Module, input_data: Any) -> dict[str, dict[str, float]]:
    """`compare_layers` with the keys of seed 003: `max`, `mean` and `relative`, the mean of |difference| / (|value| + 1e-8)."""
    found = compare_layers(float_model, quant_model, input_data).items()
    return {name: {"max": d.largest, "mean": d.mean, "relative": d.mean_relative} for name, d in found}


def check_activation_outliers(
    model: nn.Module, dataloader: Iterable[Any], threshold: float = THRESHOLD
) -> list[tuple[str, float, float, float]]:
    """(module, largest magnitude, mean, standard deviation) of every output of the first batch whose largest magnitude is more
    than `threshold` standard deviations above the mean. `model` is left in evaluation mode, as seed 003 does."""
    model.eval()
    with torch.no_grad():
        outputs = _outputs(model, next(iter(dataloader)))
    spreads = ((name, _spread(y)) for name, y in outputs if y.is_floating_point() and y.numel() > 1)
    return [(n, s.absmax, s.mean, s.std) for n, s in spreads if s.absmax > s.mean + threshold * s.std]


def quantization_steps(model: nn.Module) -> list[Step]:
    """The steps of a quantized, prepared or observed model. Ranges that were never seen are left out."""
    return [
        Step(name, kind, float(step.min()), float(step.median()), float(step.max()))
        for name, module in model.named_modules()
        for kind, step in _steps(module)
    ]


def plot_quantization_stats(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Any:
    """A bar for the median step of every layer, weights and inputs, on a logarithmic axis; written to `path` if given. Returns
    matplotlib's figure. Raises QuantplanError QP405 without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise fail("QP405", "plots need matplotlib", "pip install 'quantplan[report]'") from None
    steps = quantization_steps(model)
    figure = Figure(figsize=(max(6.0, 0.3 * len(steps)), 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(steps)), [s.median for s in steps], color=["C0" if s.kind == "weight" else "C1" for s in steps])
    axes.set_xticks(range(len(steps)), [f"{s.name} {s.kind}" for s in steps], rotation=90)
    axes.set_yscale("log")
    axes.set_ylabel("step (median)")
    axes.set_title("Quantization steps by layer")
    if path is not None:
        figure.savefig(path)
    return figure


def _outputs(model: nn.Module, batch: Any) -> list[tuple[str, Tensor]]:
    """Every module's output that is a tensor, the last of each, in the order of their names' first call."""
    found: dict[str, Tensor] = {}
    with _watched(model, lambda name, y: found.__setitem__(name, y.detach().clone())):
        run_batch(model, batch)
    return list(found.items())


@contextlib.contextmanager
def _watched(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output) if isinstance(output, Tensor) else None

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _spread(y: Tensor) -> Spread:
    sums = SpreadSums()
    sums.add(y.float())
    return sums.result()


def _steps(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, StoredWeight):
        yield "weight", module.wq.quantizer().step(dict(module.quantized().params)).float().abs()
        if "scale" in module.inputs():
            yield "input", module.inputs()["scale"].float()
    weight, inputs = getattr(module, "weight_fake_quant", None), getattr(module, "input_fake_quant", None)
    if isinstance(weight, FakeQuantizer):
        solved = weight.solve(module.weight)  # type: ignore[arg-type]
        yield "weight", weight.scheme.quantizer().step(dict(solved.params)).float().abs()
    for quantizer in (inputs, module):
        if isinstance(quantizer, FakeQuantizer) and quantizer.observer is not None and quantizer.observer.state():
            found = quantizer.static() or {}
            if "scale" in found and (quantizer is inputs or type(quantizer).__name__.endswith("Stub")):
                yield "input", found["scale"].float()
