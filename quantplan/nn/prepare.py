"""`prepare_qat` and `convert`: a plan's model for training, and what it becomes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantplan.algorithm import ALGORITHMS
from quantplan.assignment import Assignment
from quantplan.errors import fail
from quantplan.headers import TensorInfo
from quantplan.models.modules import Matrix, Module, scale_group
from quantplan.nn.fake_quantized import FakeQuantized, FakeQuantizedLinear
from quantplan.nn.fake_quantizer import FakeQuantizer, WeightFakeQuantizer
from quantplan.nn.linear import QuantLinear
from quantplan.nn.quantize import holders, note_quantization, resolve_in_memory

PlanLike = str | os.PathLike[str] | Mapping[str, Any]


def prepare_qat(model: nn.Module, plan: PlanLike, *, inplace: bool = False, learnable: bool = False) -> nn.Module:
    """A copy of `model` (with `inplace`, itself) whose layers compute as `plan` will quantize them, and train.

    Parameters keep their names, so that checkpoints of the model fit, before and after. Static ranges are found by the plan's
    observers, in training mode, from what comes; see `calibrate_model`. `learnable`: steps of weights, and of static inputs once
    calibrated, are parameters too. An algorithm that takes data gives way to `rtn`: it would undo what training does.

    Raises QuantplanError: a bad plan, with every problem at once; QP222 for what cannot be trained (fused experts).
    """
    model = model if inplace else copy.deepcopy(model)
    resolution = resolve_in_memory(model, plan)
    for assignment in resolution.quantized:
        if assignment.module.kind == "experts":
            text = f"fused experts cannot be trained quantized: {assignment.name}"
            raise fail("QP222", text, "keep them in an override: keep: true")
    found = holders(model)
    fused: dict[str, list[FakeQuantized]] = {}
    for assignment in resolution.quantized:
        layer = model.get_submodule(assignment.name)
        made = _fake_quantized(layer, assignment)
        if learnable:
            learn_weight(made)
        fused.setdefault(scale_group(assignment.name), []).append(made)
        for parent, name in found[id(layer)]:
            setattr(parent, name, made)
    for layers in fused.values():
        for layer in layers:
            layer.weight_fake_quant.fused = tuple(layers)
    return model


def _fake_quantized(layer: nn.Module, assignment: Assignment) -> FakeQuantized:
    assert isinstance(layer, nn.Linear) and assignment.wq is not None
    weight = WeightFakeQuantizer(assignment.wq, assignment.algorithm, assignment.name)
    inputs = None
    if assignment.aq is not None:
        inputs = FakeQuantizer(assignment.aq, assignment.observer.observer() if assignment.observer is not None else None)
    return FakeQuantizedLinear.from_float(layer, weight, inputs)


def learn_weight(layer: FakeQuantized) -> None:
    """Makes the steps of a layer's weight parameters, which begin where rounding would."""
    layer.weight_fake_quant.learn(dict(layer.weight_fake_quant.solve(layer.weight).params))


@torch.no_grad()
def convert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a prepared `model` (with `inplace`, itself) with its layers quantized: bit for bit what `quantplan.quantize` and
    `quantplan.apply` make of the trained weights. A transformers model then saves as a native checkpoint."""
    model = model if inplace else copy.deepcopy(model)
    found = holders(model)
    # all are solved before any is replaced: fused ones look at one another
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FakeQuantizedLinear)}
    converted = {name: layer.converted() for name, layer in layers.items()}
    for name, layer in layers.items():
        for parent, child in found[id(layer)]:
            setattr(parent, child, converted[name])
    note_quantization(model, [_assignment(name, layer) for name, layer in converted.items()])
    return model


def _assignment(name: str, layer: QuantLinear) -> Assignment:
    """What a quantized layer was told."""
    rows, columns = layer.out_features, layer.in_features
    module = Module(name, TensorInfo(f"{name}.weight", "U8", (rows, columns)), "linear", (Matrix(name, name, rows, columns),))
    return Assignment(module, layer.wq, layer.aq, ALGORITHMS.get("rtn")(), {})
