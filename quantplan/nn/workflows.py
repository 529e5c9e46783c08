"""The seeds' workflows, each a few calls of one engine: calibrating, quantizing in one step, rules with static ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from quantplan.errors import fail
from quantplan.nn.affine import FakeQuantize
from quantplan.nn.fake_quantized import FAKE_QUANTIZED, FakeQuantized, fake_quantized
from quantplan.nn.fake_quantizer import FakeQuantizer, WeightFakeQuantizer
from quantplan.nn.half import HalfLinear
from quantplan.nn.prepare import as_fake_quantizer, convert, learn_weight, prepare, prepare_qat
from quantplan.nn.qconfig import QConfig, default_dynamic_qconfig, float16_dynamic_qconfig
from quantplan.nn.quantize import holders
from quantplan.nn.recurrent import RECURRENT, quantized_recurrent
from quantplan.nn.stubs import FP4QuantStub, QuantStub, SchemeLike, static_scheme, weight_scheme


def prepare_model_for_ptq(model: nn.Module, scheme: SchemeLike = "fp4", inplace: bool = False) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) with a stub before every linear layer and convolution, and their weights to be
    rounded to `scheme` once converted (seed 000). Stubs that are there already take part. Raises QuantplanError QP107, QP114."""
    return _with_stubs(model, scheme, inplace, qat_mode=False, learnable=False)


def prepare_model_for_qat(
    model: nn.Module, scheme: SchemeLike = "fp4", learnable_qat_params: bool = False, inplace: bool = False
) -> nn.Module:
    """`prepare_model_for_ptq` for training: weights and inputs are rounded from now on. `learnable_qat_params`: the stubs' scale
    and zero point, and the steps of the weights, are parameters. Raises QuantplanError QP107, QP114."""
    return _with_stubs(model, scheme, inplace, qat_mode=True, learnable=learnable_qat_params)


@torch.no_grad()
def calibrate_model(
    model: nn.Module, data_loader: Iterable[Any], num_batches: int | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Runs the batches through `model`, with its observers on, then sets what stubs round with; `model` itself, otherwise as it
    was: BatchNorm and dropout are in evaluation meanwhile. A batch is a tensor, a mapping of keyword arguments, or a list whose
    first is the input. Raises QuantplanError QP603 where an observer saw nothing."""
    modes = {module: module.training for module in model.modules()}
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    model.eval()
    for quantizer in quantizers:
        quantizer.training = True
    try:
        for batch in islice(data_loader, num_batches):
            run_batch(model, batch, device)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for quantizer in quantizers:
        if isinstance(quantizer, QuantStub):
            if quantizer.enabled:
                quantizer.compute_quant_params()
        elif quantizer.observer is not None and not isinstance(quantizer, FakeQuantize):
            quantizer.found()
    return model


def convert_ptq_model_to_eval(model: nn.Module, inplace: bool = True) -> nn.Module:
    """A calibrated `model` in evaluation, weights and inputs rounded: what `convert` makes computes the same (seed 000)."""
    model = model if inplace else copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enable_fake_quant()
    return model.eval()


def convert_qat_model_to_eval(model: nn.Module, inplace: bool = True) -> nn.Module:
    """A trained `model` in evaluation: stubs keep what they learned, or are set to what they saw (seed 000)."""
    model = convert_ptq_model_to_eval(model, inplace)
    for module in model.modules():
        if isinstance(module, QuantStub) and module.enabled and not module.is_calibrated:
            if module.learnable_params:
                module.is_calibrated = True
            elif module.observer is None or module.observer.state():
                module.compute_quant_params()
    return model


def quantize_static(model: nn.Module, run_fn: Callable[..., Any], run_args: Any = (), inplace: bool = False) -> nn.Module:
    """`prepare`, `run_fn(model, *run_args)` to calibrate, `convert` (seed 003's `quantize`)."""
    prepared = prepare(model if inplace else copy.deepcopy(model), inplace=True).eval()
    run_fn(prepared, *run_args)
    return convert(prepared, inplace=True)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[type | str] | Mapping[type | str, Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) with weights quantized now, and inputs as they come (seed 003).

    `qconfig_spec`: classes or names of what is quantized (by default linear layers, LSTMs, GRUs and RNNs), or such with a QConfig
    each. `dtype`: `qint8` or `float16`. Recurrent ones keep their inputs in floating point. Raises QuantplanError QP105 for
    another dtype.
    """
    defaults = {torch.qint8: default_dynamic_qconfig, torch.float16: float16_dynamic_qconfig}
    if dtype not in defaults:
        raise fail("QP105", f"quantize_dynamic has no dtype {dtype}", "torch.qint8 and torch.float16 are known")
    spec = qconfig_spec if qconfig_spec is not None else {nn.Linear, *RECURRENT}
    chosen = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(spec, defaults[dtype])
    model = model if inplace else copy.deepcopy(model)
    found = holders(model)
    for name, module in list(model.named_modules()):
        qconfig = chosen.get(name, chosen.get(type(module)))
        if qconfig is None or id(module) not in found:
            continue
        for parent, child in found[id(module)]:
            setattr(parent, child, _dynamic(module, qconfig))
    return model


def _dynamic(module: nn.Module, qconfig: QConfig) -> nn.Module:
    weight = qconfig.weight()
    half = getattr(weight, "dtype", None) == torch.float16
    if isinstance(module, RECURRENT):
        return module.half().float() if half else quantized_recurrent(module, weight_scheme("int8", 1))
    if half:
        return HalfLinear.prepared(module).converted()
    layer: FakeQuantized = fake_quantized(module, as_fake_quantizer(weight), as_fake_quantizer(qconfig.activation()))
    return layer.converted()


def apply_fake_quant_to_model(model: nn.Module, bits: int = 8, inplace: bool = False) -> nn.Module:
    """`prepare_qat` of every linear layer, by row, to symmetric integers of so many bits (seed 002). Raises QuantplanError QP107
    for bits that no scheme has."""
    wq = {"scheme": f"int{bits}", "granularity": "channel", "scale_dtype": "float32"}
    return prepare_qat(model, {"default": {"wq": wq}, "overrides": [{"pattern": "*", "keep": False, "optional": True}]}, inplace)


def run_batch(model: nn.Module, batch: Any, device: torch.device | str | None = None) -> Any:
    """The output for a batch: a tensor, a mapping of keyword arguments, or a list or tuple whose first is the input."""
    moved = _moved(batch, device)
    if isinstance(moved, Mapping):
        return model(**moved)
    return model(moved[0] if isinstance(moved, list | tuple) else moved)


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, Mapping):
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [value.to(device) if isinstance(value, torch.Tensor) else value for value in batch]
    return batch.to(device)


def _with_stubs(model: nn.Module, scheme: SchemeLike, inplace: bool, qat_mode: bool, learnable: bool) -> nn.Module:
    model = model if inplace else copy.deepcopy(model)
    found = holders(model)
    for module in model.modules():
        if isinstance(module, QuantStub) and module.enabled:
            module.set_mode(qat_mode, learnable)
    for layer in list(model.modules()):
        if isinstance(layer, FakeQuantized):  # FP4Linear and its like: rounded already
            layer.weight_fake_quant.enable_fake_quant(qat_mode)
            continue
        if type(layer) not in FAKE_QUANTIZED or isinstance(layer, nn.Embedding) or id(layer) not in found:
            continue
        columns = next(iter(layer.parameters()))[0].numel()
        weight = WeightFakeQuantizer(weight_scheme(scheme, columns))
        weight.enable_fake_quant(qat_mode)
        made = fake_quantized(layer, weight, _stub(scheme, qat_mode, learnable))
        if learnable:
            learn_weight(made)
        for parent, name in found[id(layer)]:
            setattr(parent, name, made)
    return model


def _stub(scheme: SchemeLike, qat_mode: bool, learnable: bool) -> QuantStub:
    if scheme == "fp4":
        return FP4QuantStub(qat_mode, learnable)
    return QuantStub(scheme, qat_mode=qat_mode, learnable_params=learnable and "scale" in static_scheme(scheme).static_layout())
