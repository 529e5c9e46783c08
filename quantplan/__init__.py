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
    "DeQuantStub": "quantplan.nn.stubs",
    "Evaluation": "quantplan.evaluation.metrics",
    "FP4Config": "quantplan.schemes.floating",
    "FP4Conv2d": "quantplan.nn.stubs",
    "FP4Linear": "quantplan.nn.stubs",
    "FP4QuantStub": "quantplan.nn.stubs",
    "FP4Quantizer": "quantplan.schemes.floating",
    "FP8Config": "quantplan.schemes.floating",
    "FP8Quantizer": "quantplan.schemes.floating",
    "FakeQuantize": "quantplan.nn.affine",
    "FakeQuantizeLinear": "quantplan.nn.fake_quantized",
    "FakeQuantizedBatchNorm": "quantplan.nn.fusion",
    "FakeQuantizedConv1d": "quantplan.nn.fake_quantized",
    "FakeQuantizedConv2d": "quantplan.nn.fake_quantized",
    "FakeQuantizedConv3d": "quantplan.nn.fake_quantized",
    "FakeQuantizedEmbedding": "quantplan.nn.fake_quantized",
    "FakeQuantizedLinear": "quantplan.nn.fake_quantized",
    "FakeQuantizer": "quantplan.nn.fake_quantizer",
    "FloatFunctional": "quantplan.nn.skip",
    "HeadroomObserver": "quantplan.nn.observers",
    "HistogramObserver": "quantplan.nn.observers",
    "INT16Config": "quantplan.schemes.integer",
    "INT2Config": "quantplan.schemes.integer",
    "INT2Quantizer": "quantplan.schemes.integer",
    "INT4Config": "quantplan.schemes.integer",
    "INT4Quantizer": "quantplan.schemes.integer",
    "INT6Config": "quantplan.schemes.integer",
    "INT6Quantizer": "quantplan.schemes.integer",
    "INT8Config": "quantplan.schemes.integer",
    "INT8Quantizer": "quantplan.schemes.integer",
    "Inspection": "quantplan.inspection.inspect",
    "LearnableFakeQuantize": "quantplan.nn.affine",
    "MSEObserver": "quantplan.nn.observers",
    "MinMaxObserver": "quantplan.nn.observers",
    "MovingAverageMinMaxObserver": "quantplan.nn.observers",
    "MovingAveragePerChannelMinMaxObserver": "quantplan.nn.observers",
    "ObserverBase": "quantplan.nn.observers",
    "PTQPipeline": "quantplan.ptq",
    "PerChannelMinMaxObserver": "quantplan.nn.observers",
    "PercentileObserver": "quantplan.nn.observers",
    "PlaceholderObserver": "quantplan.nn.observers",
    "Problem": "quantplan.errors",
    "PtqProvider": "quantplan.nn.rules",
    "QConfig": "quantplan.nn.qconfig",
    "QConfigMapping": "quantplan.nn.qconfig",
    "QatProvider": "quantplan.nn.rules",
    "QuantConv": "quantplan.nn.convolution",
    "QuantEmbedding": "quantplan.nn.embedding",
    "QuantLinear": "quantplan.nn.linear",
    "QuantRecurrent": "quantplan.nn.recurrent",
    "QuantStub": "quantplan.nn.stubs",
    "QuantizationComparison": "quantplan.comparison.in_memory",
    "QuantizationRule": "quantplan.nn.rules",
    "QuantizedTensor": "quantplan.tensor",
    "QuantplanError": "quantplan.errors",
    "RealQuantize": "quantplan.nn.real_quant",
    "RealQuantizeLinear": "quantplan.nn.real_quant",
    "StaticRangeObserver": "quantplan.nn.observers",
    "TrainReport": "quantplan.training.train",
    "Training": "quantplan.training.settings",
    "WeightFakeQuantizer": "quantplan.nn.fake_quantizer",
    "_LearnableFakeQuantize": "quantplan.nn.affine",
    "apply": "quantplan.engine.apply",
    "apply_fake_quant_to_model": "quantplan.nn.workflows",
    "calibrate_model": "quantplan.nn.workflows",
    "capture": "quantplan.nn.graph",
    "check_activation_outliers": "quantplan.inspection.in_memory",
    "compare": "quantplan.comparison.compare",
    "compare_layers": "quantplan.inspection.in_memory",
    "compare_quantized_float": "quantplan.inspection.in_memory",
    "convert": "quantplan.nn.prepare",
    "convert_fx": "quantplan.nn.graph",
    "convert_ptq_model_to_eval": "quantplan.nn.workflows",
    "convert_qat_model_to_eval": "quantplan.nn.workflows",
    "convert_to_real_quant": "quantplan.nn.real_quant",
    "create_quantizer_from_scheme": "quantplan.faces",
    "default_dynamic_fake_quant": "quantplan.nn.affine",
    "default_dynamic_observer": "quantplan.nn.qconfig",
    "default_dynamic_qat_qconfig": "quantplan.nn.qconfig",
    "default_dynamic_qconfig": "quantplan.nn.qconfig",
    "default_fake_quant": "quantplan.nn.affine",
    "default_observer": "quantplan.nn.qconfig",
    "default_per_channel_qconfig": "quantplan.nn.qconfig",
    "default_per_channel_weight_fake_quant": "quantplan.nn.affine",
    "default_per_channel_weight_observer": "quantplan.nn.qconfig",
    "default_qat_qconfig": "quantplan.nn.qconfig",
    "default_qconfig": "quantplan.nn.qconfig",
    "default_weight_fake_quant": "quantplan.nn.affine",
    "default_weight_observer": "quantplan.nn.qconfig",
    "disable_fake_quant": "quantplan.nn.prepare",
    "disable_observer": "quantplan.nn.prepare",
    "enable_fake_quant": "quantplan.nn.prepare",
    "enable_observer": "quantplan.nn.prepare",
    "evaluate": "quantplan.evaluation.metrics",
    "fake_quantize": "quantplan.nn.fake_quantize",
    "fake_quantize_per_tensor_affine": "quantplan.nn.affine",
    "float16_dynamic_qconfig": "quantplan.nn.qconfig",
    "freeze_bn_stats": "quantplan.nn.fusion",
    "fuse_modules": "quantplan.nn.fusion",
    "fuse_modules_qat": "quantplan.nn.fusion",
    "get_default_qat_qconfig": "quantplan.nn.qconfig",
    "get_default_qat_qconfig_mapping": "quantplan.nn.qconfig",
    "get_default_qconfig": "quantplan.nn.qconfig",
    "get_default_qconfig_mapping": "quantplan.nn.qconfig",
    "inspect_checkpoint": "quantplan.inspection.inspect",
    "learn_inputs": "quantplan.nn.prepare",
    "load": "quantplan.hf.load",
    "load_plan": "quantplan.plan.load",
    "load_quant_stats": "quantplan.nn.rules",
    "per_channel_dynamic_qconfig": "quantplan.nn.qconfig",
    "plot_quantization_stats": "quantplan.inspection.in_memory",
    "prepare": "quantplan.nn.prepare",
    "prepare_fx": "quantplan.nn.graph",
    "prepare_model_for_ptq": "quantplan.nn.workflows",
    "prepare_model_for_qat": "quantplan.nn.workflows",
    "prepare_qat": "quantplan.nn.prepare",
    "prepare_qat_fx": "quantplan.nn.graph",
    "quant_stats": "quantplan.nn.rules",
    "quantization_steps": "quantplan.inspection.in_memory",
    "quantize": "quantplan.nn.quantize",
    "quantize_dynamic": "quantplan.nn.workflows",
    "quantize_model": "quantplan.nn.rules",
    "quantize_to_fp4_asymmetric": "quantplan.nn.stubs",
    "read_checkpoint": "quantplan.headers",
    "resolve": "quantplan.plan.resolve",
    "symmetric_quantize": "quantplan.faces",
    "train": "quantplan.training.train",
    "update_bn_stats": "quantplan.nn.fusion",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'quantplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


after_import("transformers.quantizers.auto", register)
