"""What a checkpoint's weights take, how they are quantized, and how far they are from a reference's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantplan.checkpoint.layout import OutputLayout, output_layout
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.verify import changed_tensors, check_names, check_source, layer_error, read_record
from quantplan.errors import QuantplanError
from quantplan.estimate import estimate
from quantplan.explain import scheme_text
from quantplan.format import FORMATS
from quantplan.headers import Checkpoint
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution, resolve


@dataclass(frozen=True)
class WeightFigures:
    """`size`: bytes of the safetensors files. Bits for each weight of the reference, and for each quantized one with scales and
    zero points counted. `weight_mse`: the mean squared difference, over quantized matrices, of the weights a model computes with
    from the reference's; those that transforms changed before have nothing to be compared with. None: not a checkpoint that
    quantplan made from the reference."""

    size: int
    bits_per_weight: float
    bits_per_quantized_weight: float | None
    scheme: str
    weight_mse: float | None


def weight_figures(model: Checkpoint, reference: Checkpoint) -> WeightFigures:
    """The figures of one checkpoint, beside the one it was made from. Raises QuantplanError where a file is damaged."""
    folder = model.require_path()
    size = sum((folder / file).stat().st_size for file in model.files)
    elements = sum(prod(tensor.shape) for tensor in reference.tensors.values())
    bits, bits_quantized, mse = 8 * model.size / max(1, elements), None, None
    record = _record(folder)
    if record is None:
        return WeightFigures(size, bits, None, _method(model.config), None)
    made = _resolved(record, model, reference)
    if made is not None:
        resolution, layout = made
        bits_quantized = estimate(resolution, layout, 1).bits_per_weight or None
        mse = _mse(resolution, layout, model, changed_tensors(record))
    return WeightFigures(size, bits, bits_quantized, _schemes(record), mse)


def _record(folder: Path) -> Mapping[str, Any] | None:
    try:
        return read_record(folder)
    except QuantplanError:
        return None


def _resolved(record: Mapping[str, Any], model: Checkpoint, reference: Checkpoint) -> tuple[Resolution, OutputLayout] | None:
    """The recorded plan on the reference, with what it writes; None where the output was not made of this reference."""
    if list(check_source(record, reference)):
        return None
    resolution = resolve(load_plan(record["plan"]), reference).require()
    layout = output_layout(resolution)
    return None if list(check_names(layout, model)) else (resolution, layout)


def _mse(resolution: Resolution, layout: OutputLayout, model: Checkpoint, changed: frozenset[str]) -> float | None:
    output, source = FORMATS.get(resolution.plan.output.format)(), resolution.checkpoint
    units = [u for file in layout.files for u in file.units if u.matrix and not changed & {t.name for t in u.outputs}]
    noise = weights = 0.0
    with TensorReader(source.require_path(), source.tensors) as old, TensorReader(model.require_path(), model.tensors) as new:
        for unit in units:
            error = layer_error(unit, output, old, new)
            noise, weights = noise + error.mse * error.weights, weights + error.weights
    return noise / weights if weights else None


def _schemes(record: Mapping[str, Any]) -> str:
    """`int4 group 64`, `int8 channel, activations int8 token`; several with ` + ` between them, most modules first."""
    from quantplan.hf.plugin import QuantplanConfig

    counted: dict[str, int] = {}
    for group in record["treatments"]:
        wq, aq = next(iter(QuantplanConfig([group]).treatments().values()))
        text = scheme_text(wq) + (f", activations {scheme_text(aq)}" if aq is not None else "")
        counted[text] = counted.get(text, 0) + len(group["modules"])
    return " + ".join(sorted(counted, key=lambda text: -counted[text])) or "float"


def _method(config: Mapping[str, Any]) -> str:
    """How another tool quantized a checkpoint, in its own word; `float` where none did."""
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method", "quantized")) if isinstance(quantization, Mapping) else "float"
