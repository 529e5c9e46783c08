"""The model that is trained: what an output of `apply` computes, with parameters that learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantplan.errors import fail
from quantplan.hf.convert import find_places
from quantplan.hf.load import load
from quantplan.live.skeleton import model_class
from quantplan.nn.fake_quantized import FakeQuantized, fake_quantized
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.linear import QuantLinear
from quantplan.nn.prepare import prepare_qat
from quantplan.plan.resolve import Resolution
from quantplan.training.settings import Training
from quantplan.training.started import StartedQuantizer, StartedRange, inside
from quantplan.training.trained import Started

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Student:
    """A model, and what of it is trained. `layers`: stored matrix -> its layer; `floats`: stored tensor -> the parameter that is
    trained, and the dtype it is stored in; `rates`: every trained parameter and how its learning rate counts."""

    model: Any
    layers: Mapping[str, FakeQuantized]
    floats: Mapping[str, tuple[nn.Parameter, torch.dtype]]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what is trained."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def state(self) -> dict[str, Tensor]:
        """What training changes, on the CPU: parameters that are trained, and ranges of static inputs."""
        found = {name: p.detach().to("cpu", copy=True) for name, p in self.trained()}
        for name, module in self._observed():
            assert module.observer is not None
            found |= {f"{name}/{part}": t.to("cpu", copy=True) for part, t in module.observer.state().items()}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """In place: takes what `state` returned."""
        with torch.no_grad():
            for name, p in self.trained():
                p.copy_(state[name])
        for name, module in self._observed():
            seen = {n.removeprefix(f"{name}/"): t for n, t in state.items() if n.startswith(f"{name}/")}
            if seen:
                module.load_range(seen)

    def _observed(self) -> Iterator[tuple[str, FakeQuantizer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, FakeQuantizer) and module.observer is not None:
                yield name, module


def float_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The float model of a checkpoint, float32, in evaluation, nothing of it trained."""
    from quantplan.headers import read_config

    kind = model_class(read_config(folder))
    model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def student_of(resolution: Resolution, start: Started, teacher: Any, settings: Training, trust_remote_code: bool) -> Student:
    """The student of an output, as the recipe trains it. Raises QP222 where nothing can be trained, QP105 for a recipe that the
    plan does not go with."""
    if settings.from_float:
        if resolution.transforms:
            text = f"recipe {settings.recipe} trains the float model, and the plan's transforms rewrite it"
            raise fail("QP105", text, "use recipe scales, weights or lsq")
        model = float_model(resolution.checkpoint.require_path(), trust_remote_code)
        places = find_places(model, start)
        prepare_qat(model, dict(_in_memory(resolution)), inplace=True)
    else:
        model = load(start.reader.folder, dtype=torch.float32, trust_remote_code=trust_remote_code).requires_grad_(False)
        model.hf_quantizer, model.is_quantized = None, False  # transformers trains no model that says it is quantized
        del model.config.quantization_config
        places = find_places(teacher, start)
        for matrix, place in places.items():
            _start_layer(model, place, start, matrix, teacher, settings, bool(resolution.transforms))
    layers = {matrix: model.get_submodule(place) for matrix, place in places.items()}
    layers = {matrix: layer for matrix, layer in layers.items() if isinstance(layer, FakeQuantized)}
    if not layers:
        raise fail("QP222", "the model has no quantized layer that can be trained", "fused experts cannot be")
    for layer in layers.values():
        layer.weight.requires_grad_(settings.recipe != "scales")
    return Student(model, layers, _floats(model, resolution, settings))


def _in_memory(resolution: Resolution) -> Mapping[str, Any]:
    import json

    return {k: v for k, v in json.loads(resolution.loaded.canonical()).items() if k not in ("calibration", "output", "engines")}


def _start_layer(
    model: Any, place: str, start: Started, matrix: str, teacher: Any, settings: Training, transformed: bool
) -> None:
    """In place: the layer of training for one stored matrix."""
    layer = model.get_submodule(place)
    if not isinstance(layer, QuantLinear):
        return
    solved, frozen = start.read(matrix), settings.recipe == "scales"
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = teacher.get_submodule(place).weight.detach()
    if type(teacher.get_submodule(place)) is Conv1D:
        weight = weight.t().contiguous()
    if not frozen:
        weight = layer.dequantize() if transformed else inside(weight, solved)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    inputs: FakeQuantizer | None = None
    if layer.aq is not None:
        inputs = FakeQuantizer(layer.aq) if layer.aq.dynamic else StartedRange(layer.aq, layer.inputs())
    quantizer = StartedQuantizer(solved, frozen, learnable=settings.recipe in ("scales", "lsq"))
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, fake_quantized(linear, quantizer, inputs))


def _floats(model: Any, resolution: Resolution, settings: Training) -> dict[str, tuple[nn.Parameter, torch.dtype]]:
    """Gains and biases: parameters with one axis that are stored under their own name; they are trained from now on."""
    if not settings.norms:
        return {}
    stored, output = resolution.checkpoint.tensors, resolution.plan.output.dtype
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name in stored and stored[name].dtype in FLOAT_DTYPES:
            parameter.requires_grad_(True)
            found[name] = parameter, getattr(torch, output) if output else FLOAT_DTYPES[stored[name].dtype]
    return found
