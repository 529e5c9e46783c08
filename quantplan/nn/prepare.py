"""Preparing a model for training or calibration, and converting it: by a plan, or by `qconfig`s under torch.ao's names."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from quantplan.algorithm import ALGORITHMS
from quantplan.assignment import Assignment
from quantplan.errors import fail
from quantplan.headers import TensorInfo
from quantplan.models.modules import Matrix, Module, scale_group
from quantplan.nn.affine import FakeQuantize
from quantplan.nn.embedding import QuantEmbedding
from quantplan.nn.fake_quantized import FAKE_QUANTIZED, FakeQuantized, fake_quantized
from quantplan.nn.fake_quantizer import FakeQuantizer, WeightFakeQuantizer
from quantplan.nn.fusion import FakeQuantizedBatchNorm, LayerBatchNorm
from quantplan.nn.half import HalfLinear
from quantplan.nn.linear import QuantLinear
from quantplan.nn.qconfig import default_qconfig
from quantplan.nn.quantize import holders, note_quantization, resolve_in_memory
from quantplan.nn.skip import FloatFunctional

PlanLike = str | os.PathLike[str] | Mapping[str, Any]
_QCONFIG_LAYERS = (*(kind for kind in FAKE_QUANTIZED if kind is not nn.Embedding), LayerBatchNorm, FloatFunctional)


def prepare_qat(model: nn.Module, plan: PlanLike | None = None, inplace: bool = False, *, learnable: bool = False) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) whose layers compute as `plan` will quantize them, and train.

    Parameters keep their names, so that checkpoints of the model fit, before and after. Static ranges are found by the plan's
    observers, in training mode, from what comes; see `calibrate_model`. `learnable`: steps of weights are parameters too
    (`learn_inputs` makes those of static inputs so, once calibrated). An algorithm that takes data gives way to `rtn`: it would
    undo what training does. Without a plan, layers take the `qconfig` of the nearest module above them that has one (seed 003),
    and a BatchNorm fused in training is rounded as it will be folded.

    Raises QuantplanError: a bad plan, with every problem at once; QP105 without a plan and a qconfig; QP222 for what cannot be
    trained (fused experts).
    """
    model = model if inplace else copy.deepcopy(model)
    if plan is None:
        return _prepare_qconfigs(model, rounding=True)
    resolution = resolve_in_memory(model, plan)
    for assignment in resolution.quantized:
        if assignment.module.kind == "experts":
            text = f"fused experts cannot be trained quantized: {assignment.name}"
            raise fail("QP222", text, "keep them in an override: keep: true")
    found = holders(model)
    fused: dict[str, list[Any]] = {}
    for assignment in resolution.quantized:
        layer = model.get_submodule(assignment.name)
        made = _of_assignment(layer, assignment)
        if learnable:
            learn_weight(made)
        fused.setdefault(scale_group(assignment.name), []).append(made)
        _replace(found, layer, made)
    for layers in fused.values():
        for layer in layers:
            layer.weight_fake_quant.fused = tuple(layers)
    return model


def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Collection[type] | None = None,
    observer_non_leaf_module_list: Collection[type] | None = None,
    prepare_custom_config_dict: Mapping[str, Mapping[type, Any]] | None = None,
) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) whose layers observe their inputs, for `convert` to quantize (seed 003): layers
    take the `qconfig` of the nearest module above them that has one.

    `allow_list`: the classes of layers to take, by default all that are known. `observer_non_leaf_module_list`: classes of other
    modules whose outputs are observed too, by `activation_post_process`. `prepare_custom_config_dict`: under
    `float_to_observed_custom_module_class`, classes whose `from_float(module)` replaces modules of a class. Raises QuantplanError
    QP105 where no layer has a qconfig.
    """
    model = model if inplace else copy.deepcopy(model)
    _swap(model, (prepare_custom_config_dict or {}).get("float_to_observed_custom_module_class", {}), "from_float")
    watched = [m for m in model.modules() if type(m) in (observer_non_leaf_module_list or ())]
    prepared = _prepare_qconfigs(model, rounding=False, allowed=allow_list)
    for module in watched:
        module.add_module("activation_post_process", getattr(module, "qconfig", default_qconfig).activation())
        module.register_forward_hook(lambda module, _, output: module.activation_post_process(output))
    return prepared


@torch.no_grad()
def convert(
    module: nn.Module,
    inplace: bool = False,
    mapping: Mapping[type, Any] | None = None,
    convert_custom_config_dict: Mapping[str, Mapping[type, Any]] | None = None,
) -> nn.Module:
    """A copy of a prepared `module` (with `inplace`, itself) with its layers quantized: bit for bit what `quantplan.quantize` and
    `quantplan.apply` make of the trained weights. A transformers model then saves as a native checkpoint.

    `mapping`: classes whose `from_float(layer)` replaces layers of a class instead. `convert_custom_config_dict`: under
    `observed_to_quantized_custom_module_class`, classes whose `from_observed(module)` does.

    Raises NonFinite; QuantplanError QP603 for static inputs that were never seen.
    """
    model = module if inplace else copy.deepcopy(module)
    _swap(model, (convert_custom_config_dict or {}).get("observed_to_quantized_custom_module_class", {}), "from_observed")
    _swap(model, mapping or {}, "from_float")
    found = holders(model)
    # all are solved before any is replaced: fused ones look at one another
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantized | FakeQuantizedBatchNorm | HalfLinear)}
    converted = {name: layer.converted() for name, layer in layers.items()}
    for name, layer in layers.items():
        _replace(found, layer, converted[name])
    for part in model.modules():
        if isinstance(part, FloatFunctional) and part.output_fake_quant is not None:
            part.output_fake_quant.enable_fake_quant()
            part.output_fake_quant.disable_observer()
    note_quantization(
        model, [_assignment(n, made) for n, made in converted.items() if isinstance(made, QuantLinear | QuantEmbedding)]
    )
    return model


def learn_weight(layer: FakeQuantized) -> None:
    """Makes the steps of a layer's weight parameters, which begin where rounding would."""
    layer.weight_fake_quant.learn(dict(layer.weight_fake_quant.solve(layer.weight).params))


def learn_inputs(model: nn.Module) -> nn.Module:
    """`model`, in place: steps of static inputs become parameters, which begin where calibration ended. Raises QuantplanError
    QP603 for inputs never seen."""
    for layer in model.modules():
        inputs = getattr(layer, "input_fake_quant", None)
        if isinstance(inputs, FakeQuantizer) and inputs.observer is not None and not inputs.scheme.tensor_params:
            inputs.learn({n: p.reshape(1, 1) for n, p in inputs.found().items()})
            inputs.disable_observer()
    return model


def with_qconfigs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, layer and QConfig of every layer that has one: its own, or that of the nearest module above it."""
    given = {name: module.qconfig for name, module in model.named_modules() if hasattr(module, "qconfig")}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LayerBatchNorm):
            inside.update(id(child) for child in module)
        parts = name.split(".") if name else []
        above = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        qconfig = next((given[n] for n in above if n in given), None)
        own = isinstance(module, nn.Embedding) and name in given  # a table only where it is asked for
        if qconfig is not None and id(module) not in inside and (own or type(module) in _QCONFIG_LAYERS):
            yield name, module, qconfig


def disable_observer(module: nn.Module) -> None:
    """For `model.apply`: ranges stay as they are."""
    if isinstance(module, FakeQuantizer):
        module.disable_observer()


def enable_observer(module: nn.Module) -> None:
    """For `model.apply`: observers see what comes."""
    if isinstance(module, FakeQuantizer):
        module.enable_observer()


def disable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: values pass as they are."""
    if isinstance(module, FakeQuantizer):
        module.disable_fake_quant()


def enable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: values are rounded."""
    if isinstance(module, FakeQuantizer):
        module.enable_fake_quant()


def _prepare_qconfigs(model: nn.Module, rounding: bool, allowed: Collection[type] | None = None) -> nn.Module:
    """`model`, in place, by its qconfigs; `rounding`: values are rounded at once, not only observed; `allowed`: such layers."""
    chosen = [found for found in with_qconfigs(model) if allowed is None or type(found[1]) in allowed]
    if not chosen:
        raise fail("QP105", "no layer has a qconfig", "set model.qconfig = quantplan.get_default_qconfig(), or give a plan")
    found = holders(model)
    for _, layer, qconfig in chosen:
        inputs = _made(qconfig.activation, rounding)
        if isinstance(layer, FloatFunctional):
            layer.output_fake_quant = inputs
            continue
        if _is_half(qconfig):
            _replace(found, layer, HalfLinear.prepared(layer))
            continue
        weight = _made(qconfig.weight, rounding)
        if isinstance(layer, LayerBatchNorm):
            made: nn.Module = FakeQuantizedBatchNorm(layer[0], layer[1], weight, inputs).train(layer.training)
        else:
            made = fake_quantized(layer, weight, inputs)
        _replace(found, layer, made)
    return model


def _made(factory: Any, rounding: bool) -> FakeQuantizer:
    """A fake quantizer of a QConfig's factory."""
    quantizer = as_fake_quantizer(factory())
    quantizer.enable_fake_quant(rounding)
    return quantizer


def as_fake_quantizer(made: Any) -> FakeQuantizer:
    """A fake quantizer, or one that rounds with what an observer finds."""
    return made if isinstance(made, FakeQuantizer) else FakeQuantize(lambda **_: made)


def _is_half(qconfig: Any) -> bool:
    """Whether weights are to be float16, and nothing else."""
    return getattr(qconfig.weight(), "dtype", None) == torch.float16


def _of_assignment(layer: nn.Module, assignment: Assignment) -> Any:
    assert assignment.wq is not None
    weight = WeightFakeQuantizer(assignment.wq, assignment.algorithm, assignment.name)
    inputs = None
    if assignment.aq is not None:
        inputs = FakeQuantizer(assignment.aq, assignment.observer.observer() if assignment.observer is not None else None)
        inputs.place = assignment.name
    weight.place = assignment.name
    return fake_quantized(layer, weight, inputs)


def _replace(found: Mapping[int, list[tuple[nn.Module, str]]], layer: nn.Module, made: nn.Module) -> None:
    for parent, name in found[id(layer)]:
        setattr(parent, name, made)


def _swap(model: nn.Module, mapping: Mapping[type, Any], method: str) -> None:
    """In place: a module whose class is a key becomes what the value's `method` makes of it."""
    found = holders(model)
    for module in list(model.modules()):
        if type(module) in mapping:
            _replace(found, module, getattr(mapping[type(module)], method)(module))


def _assignment(name: str, layer: QuantLinear | QuantEmbedding) -> Assignment:
    """What a quantized layer was told."""
    rows, columns = layer.quantized().shape
    module = Module(name, TensorInfo(f"{name}.weight", "U8", (rows, columns)), "linear", (Matrix(name, name, rows, columns),))
    return Assignment(module, layer.wq, layer.aq, ALGORITHMS.get("rtn")(), {})
