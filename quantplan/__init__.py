"""quantplan: one checked plan turns any Hugging Face checkpoint into a quantized one that engines load.

Names are imported when they are first used, so that checking a plan never imports torch.
"""

from importlib import import_module
from typing import Any

from quantplan.hf import register
from quantplan.import_hook import after_import

__version__ = "0.1.0"

# public name -> module; tested to be complete, sorted and importable
_NAMES = {
    "Evaluation": "quantplan.evaluation.metrics",
    "FP4Config": "quantplan.schemes.floating",
    "FP4Quantizer": "quantplan.schemes.floating",
    "FP8Config": "quantplan.schemes.floating",
    "FP8Quantizer": "quantplan.schemes.floating",
    "FakeQuantizedLinear": "quantplan.nn.fake_quantized",
    "FakeQuantizer": "quantplan.nn.fake_quantizer",
    "HeadroomObserver": "quantplan.nn.observers",
    "HistogramObserver": "quantplan.nn.observers",
    "INT2Config": "quantplan.schemes.integer",
    "INT2Quantizer": "quantplan.schemes.integer",
    "INT4Config": "quantplan.schemes.integer",
    "INT4Quantizer": "quantplan.schemes.integer",
    "INT6Config": "quantplan.schemes.integer",
    "INT6Quantizer": "quantplan.schemes.integer",
    "INT8Config": "quantplan.schemes.integer",
    "INT8Quantizer": "quantplan.schemes.integer",
    "Inspection": "quantplan.inspection.inspect",
    "MSEObserver": "quantplan.nn.observers",
    "MinMaxObserver": "quantplan.nn.observers",
    "MovingAverageMinMaxObserver": "quantplan.nn.observers",
    "MovingAveragePerChannelMinMaxObserver": "quantplan.nn.observers",
    "PerChannelMinMaxObserver": "quantplan.nn.observers",
    "PercentileObserver": "quantplan.nn.observers",
    "PlaceholderObserver": "quantplan.nn.observers",
    "Problem": "quantplan.errors",
    "QuantLinear": "quantplan.nn.linear",
    "QuantizationComparison": "quantplan.comparison.in_memory",
    "QuantizedTensor": "quantplan.tensor",
    "QuantplanError": "quantplan.errors",
    "StaticRangeObserver": "quantplan.nn.observers",
    "WeightFakeQuantizer": "quantplan.nn.fake_quantizer",
    "apply": "quantplan.engine.apply",
    "compare": "quantplan.comparison.compare",
    "convert": "quantplan.nn.prepare",
    "create_quantizer_from_scheme": "quantplan.faces",
    "evaluate": "quantplan.evaluation.metrics",
    "fake_quantize": "quantplan.nn.fake_quantize",
    "inspect_checkpoint": "quantplan.inspection.inspect",
    "load": "quantplan.hf.load",
    "load_plan": "quantplan.plan.load",
    "prepare_qat": "quantplan.nn.prepare",
    "quantize": "quantplan.nn.quantize",
    "read_checkpoint": "quantplan.headers",
    "resolve": "quantplan.plan.resolve",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'quantplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


after_import("transformers.quantizers.auto", register)
