"""`QuantizationComparison`: modules in memory side by side, on batches of a loader."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.comparison.timing import spread, timed, waits_for
from quantplan.engine.progress import peak_memory
from quantplan.errors import fail

Metric = Callable[[Any, Any], float]
MB = 1_000_000
WARM_UP = 2  # batches that are not counted


@dataclass(frozen=True)
class ModuleFigures:
    """What was measured of one module. MB are 10^6 bytes: of parameters and buffers, each once, and of the memory at its peak:
    what tensors take on a GPU, else the process's, with the other models and Python in it. Latency is of a batch.

    `accuracy`: the metric's mean over samples, None without one; `mse`: mean squared difference of the outputs from the
    original's, None for the original.
    """

    size_mb: float
    latency_ms: float  # the median
    latency_p10_ms: float
    latency_p90_ms: float
    throughput: float  # samples a second, over all batches
    peak_memory_mb: float
    accuracy: float | None
    mse: float | None


class QuantizationComparison:
    """The original module beside a fake-quantized and a really quantized one: size, latency, memory, accuracy, error.

    The modules are run where they are called for, in eval mode, and left on that device, in the mode they were in. For
    checkpoints of language models use `compare`, which gives each a process of its own.
    """

    def __init__(self, original_model: nn.Module) -> None:
        self.models: dict[str, nn.Module] = {"original": original_model}
        self.results: dict[str, dict[str, float | None]] = {}

    def setup_models(self, fake_quant_model: nn.Module | None = None, real_quant_model: nn.Module | None = None) -> None:
        """The modules to compare with the original, either or both; they replace those that were there, and the results go."""
        quantized = {"fake_quant": fake_quant_model, "real_quant": real_quant_model}
        found = {name: model for name, model in quantized.items() if model is not None}
        self.models = {"original": self.models["original"], **found}
        self.results = {}

    def compare(
        self, test_loader: Iterable[Any], device: str = "cpu", metric: Metric | None = None
    ) -> dict[str, dict[str, float | None]]:
        """Runs every model on every batch; returns name -> the fields of `ModuleFigures`, as plain data.

        A batch is the inputs, `(inputs, targets)`, or a mapping of arguments; `inputs` a tensor or a tuple of them. Outputs are a
        tensor, a tuple that begins with one, or have `logits`. `metric(outputs, targets)` is a number for one batch, such as its
        share of right answers; targets are the mapping's `labels`.

        Raises QuantplanError: no batches, or a metric without targets (QP130); outputs that are not finite, or of another shape
        than the original's (QP601, QP131).
        """
        batches = [as_batch(item, device) for item in test_loader]
        if not batches:
            raise fail("QP130", "the loader has no batches", "give one with at least one batch")
        if metric is not None and any(targets is None for _, targets in batches):
            raise fail("QP130", "the loader has no targets for the metric", "give batches of (inputs, targets)")
        expected: list[Tensor] = []
        found = {}
        for name, model in self.models.items():
            outputs, figures = measure(name, model.to(device), batches, device, metric, expected)
            expected = expected or outputs
            found[name] = asdict(figures)
        self.results = found
        return found

    def print_comparison(self) -> None:
        """The results as a table on standard output."""
        from quantplan.cli import show

        rows = (
            (
                name,
                f"{r['size_mb']:.3f} MB",
                f"{r['latency_ms']:.3f} ms",
                f"{r['throughput']:.0f}",
                f"{r['peak_memory_mb']:.1f} MB",
                *("" if r[key] is None else f"{r[key]:.6g}" for key in ("accuracy", "mse")),
            )
            for name, r in self._measured().items()
        )
        show.table(("model", "size", "latency", "samples/s", "peak memory", "accuracy", "MSE"), rows)

    def save_comparison_report(self, path: str | os.PathLike[str]) -> None:
        """The results as JSON: name -> figures. Raises QP401 to QP403 where it cannot be written."""
        from quantplan.checkpoint.durable import named_errors, write_durably

        data = json.dumps(self._measured(), indent=2, allow_nan=False) + "\n"
        with named_errors(Path(path)):
            write_durably(Path(path), data.encode())

    def _measured(self) -> dict[str, dict[str, float | None]]:
        if not self.results:
            raise fail("QP603", "nothing was compared", "call compare(test_loader) first")
        return self.results


def as_batch(item: Any, device: str) -> tuple[Any, Any]:
    """Inputs (a tuple of arguments, or a mapping) on `device`, and targets or None."""
    if isinstance(item, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in item.items()}, item.get("labels")
    inputs, targets = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    placed = targets.to(device) if isinstance(targets, Tensor) else targets
    return tuple(x.to(device) for x in inputs), placed


def measure(
    name: str, model: nn.Module, batches: list[tuple[Any, Any]], device: str, metric: Metric | None, expected: list[Tensor]
) -> tuple[list[Tensor], ModuleFigures]:
    """The outputs of one model on every batch, and its figures; `expected`: the original's outputs, none for itself."""
    trains, wait = {m: m.training for m in model.modules()}, waits_for(device)
    outputs: list[Tensor] = []

    def run(inputs: Any) -> Tensor:
        return _tensor(call(model, inputs))

    model.eval()
    try:
        with torch.no_grad():
            for inputs, _ in batches[:WARM_UP]:
                run(inputs)
            _reset_peak(device)
            seconds = [timed(lambda inputs=inputs: outputs.append(run(inputs)), wait) for inputs, _ in batches]  # type: ignore[misc]
            peak = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_memory()
    finally:
        for module, training in trains.items():
            module.training = training
    times, samples = spread(seconds), [_samples(inputs) for inputs, _ in batches]
    scores = [metric(y, targets) for y, (_, targets) in zip(outputs, batches, strict=True)] if metric else []
    return outputs, ModuleFigures(
        size_mb=stored_bytes(model) / MB,
        latency_ms=times.median_ms,
        latency_p10_ms=times.p10_ms,
        latency_p90_ms=times.p90_ms,
        throughput=sum(samples) / sum(seconds),
        peak_memory_mb=peak / MB,
        accuracy=sum(float(s) * n for s, n in zip(scores, samples, strict=True)) / sum(samples) if scores else None,
        mse=_mse(name, outputs, expected) if expected else None,
    )


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for inputs as `as_batch` makes them."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _samples(inputs: Any) -> int:
    return len(next(x for x in (inputs.values() if isinstance(inputs, dict) else inputs) if isinstance(x, Tensor)))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; what two names share counts once."""
    model.state_dict(keep_vars=True)  # kernels that hold a layer's codes give them back
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(storages.values())


def _mse(name: str, outputs: list[Tensor], expected: list[Tensor]) -> float:
    total = count = 0.0
    for y, wanted in zip(outputs, expected, strict=True):
        if y.shape != wanted.shape:
            text = f"'{name}' gives outputs of shape {list(y.shape)}, the original {list(wanted.shape)}"
            raise fail("QP131", text, "compare models of the same task")
        total += float((y.double() - wanted.double()).square().sum())
        count += y.numel()
    if not total < float("inf"):
        raise fail(
            "QP601", f"'{name}' or the original gives outputs that are not finite", "look for NaN and infinity in the weights"
        )
    return total / count


def _reset_peak(device: str) -> None:
    """Peak memory from now on: where the system lets a process set its own mark back, else since it started."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
