"""`quantize`: a plan carried out on a model in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.assignment import Assignment
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.headers import Checkpoint, TensorInfo
from quantplan.models.keep import KeepRule
from quantplan.models.modules import Matrix, Module, find_modules, scale_group
from quantplan.nn.convolution import QuantConv
from quantplan.nn.embedding import QuantEmbedding
from quantplan.nn.linear import QuantLinear
from quantplan.nn.stored import StoredWeight
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution, resolve
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

NOT_A_LAYER = KeepRule(
    "no known layer", (), "in memory torch's own linear layers, convolutions, embeddings and fused experts are"
)
CONVOLUTION = KeepRule("convolutions", (), "no checkpoint holds them quantized; in memory a plan may")
EMBEDDING = KeepRule("embeddings", (), "looked up, not multiplied")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STORED_DTYPES = {getattr(torch, kind): name for name, kind in TORCH_DTYPES.items()}


@torch.no_grad()
def quantize(
    model: nn.Module,
    plan: str | os.PathLike[str] | Mapping[str, Any] | Callable[..., Any] | None = None,
    run_args: Any = (),
    inplace: bool = False,
    *,
    run_fn: Callable[..., Any] | None = None,
) -> nn.Module:
    """`model`, changed in place as `plan` says: each `nn.Linear` that the plan quantizes becomes a `QuantLinear`, and each
    convolution and embedding that it names, or says `keep: false` of, a `QuantConv` or `QuantEmbedding`.

    Patterns match the names of `model.named_modules()`, and the built-in keep rules apply. What a format or an engine can
    hold does not matter here. Fused experts (3-D parameters) are rounded to their grid and stay dense. Hooks on replaced
    layers are lost. A transformers model then saves with `save_pretrained` as a native checkpoint.

    A function in the place of the plan, or as `run_fn`, is seed 003's: see `quantize_static`, which takes the other arguments.

    Raises QuantplanError: a bad plan, with every problem at once; NaN or infinity in a weight (QP601).
    """
    calibrating = run_fn or plan
    if callable(calibrating):
        from quantplan.nn.workflows import quantize_static

        return quantize_static(model, calibrating, run_args, inplace)
    if plan is None:
        raise fail("QP105", "neither a plan nor a function to calibrate with", 'quantize(model, {"default": {"wq": "int8"}})')
    assert not callable(plan)
    resolution = resolve_in_memory(model, plan)
    _check_assignments(resolution.quantized)
    largest = _largest_magnitudes(model, resolution.quantized)
    found = holders(model)
    for assignment in resolution.quantized:
        if assignment.module.kind == "experts":
            for matrix in assignment.matrices:
                rounded = _solve(model, assignment, matrix, largest)
                _view(model, matrix).copy_(rounded.scheme.quantizer().dequantize(rounded))
            continue
        layer = model.get_submodule(assignment.name)
        made = quantized_layer(layer, _solve(model, assignment, assignment.matrices[0], largest), assignment.aq)
        for parent, name in found[id(layer)]:
            setattr(parent, name, made)
    note_quantization(model, [a for a in resolution.quantized if a.module.kind != "experts"])
    return model


def quantized_layer(layer: Any, solved: QuantizedTensor, aq: SchemeConfig | None, inputs: Params | None = None) -> StoredWeight:
    """The quantized layer in the place of a linear layer, a convolution or an embedding, with its very bias. `inputs`: what
    static activations need, as `Quantizer.fit_static` makes it."""
    made: StoredWeight
    if isinstance(layer, nn.Embedding):
        made = QuantEmbedding.from_quantized(solved, padding_idx=layer.padding_idx, dtype=layer.weight.dtype)
    elif isinstance(layer, nn.Linear):
        made = QuantLinear.from_quantized(solved, layer.bias, aq, dtype=layer.weight.dtype, inputs=inputs)
    else:
        made = QuantConv.from_quantized(solved, layer, layer.bias, aq, inputs=inputs)
    return made.train(layer.training)


def resolve_in_memory(model: nn.Module, plan: str | os.PathLike[str] | Mapping[str, Any]) -> Resolution:
    """`plan` bound to a model in memory. Raises QuantplanError: a bad plan, with every problem at once; QP222 for weights
    that are not there, and for a quantized key-value cache."""
    checkpoint = _inventory(model)
    resolution = resolve(load_plan(plan), checkpoint, _live_modules(model, checkpoint)).require()
    for assignment in resolution.quantized:
        if model.get_parameter(assignment.module.tensor.name).is_meta:
            raise fail("QP222", "the model has no weights: it is on the meta device", "load its weights first")
    if resolution.kv_cache is not None:
        raise fail("QP222", "scales of the key-value cache take calibration, and in memory there is none", "use quantplan.apply")
    return resolution


def note_quantization(model: nn.Module, packed: Sequence[Assignment]) -> None:
    """Writes into the config of a transformers model how these layers are quantized, so that it saves as a native checkpoint."""
    config: Any = getattr(model, "config", None)
    if hasattr(model, "save_pretrained"):
        config.quantization_config = dict(FORMATS.get("quantplan")().config(packed))


def _inventory(model: nn.Module) -> Checkpoint:
    """The model's parameters as a checkpoint would list them."""
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    tensors = {
        name: TensorInfo(name, _STORED_DTYPES.get(parameter.dtype, "U8"), tuple(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return Checkpoint(type(model).__name__, None, described, tensors)


def _live_modules(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Module]:
    """The modules of a checkpoint, corrected by what a model in memory tells: types, and which weights are shared."""
    seen: dict[int, str] = {}  # module -> the first of its names, the one patterns match
    embedded = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for name, module in find_modules(checkpoint).items():
        if module.kind == "experts":
            found[name] = module
            continue
        layer = model.get_submodule(name)
        if seen.setdefault(id(layer), name) != name:
            continue
        if type(layer) is nn.Linear:
            found[name] = replace(module, kind="linear", tied_to=embedded.get(id(layer.weight), ""))
        elif type(layer) in CONVOLUTIONS:
            rows, columns = module.tensor.shape[0], math.prod(module.tensor.shape[1:])
            matrix = Matrix(name, module.tensor.name, rows, columns)
            found[name] = replace(module, kind="linear", matrices=(matrix,), keep=CONVOLUTION)
        elif type(layer) is nn.Embedding:
            found[name] = replace(
                module, kind="linear", keep=module.keep or EMBEDDING, tied_to=multiplied.get(id(layer.weight), "")
            )
        else:
            found[name] = replace(module, kind="other", matrices=(), keep=NOT_A_LAYER)
    return found


def _check_assignments(assignments: Iterable[Assignment]) -> None:
    """What would stop the work half-way is found before it begins."""
    for assignment in assignments:
        if assignment.algorithm.takes_data:
            text = f"algorithm '{assignment.algorithm.name}' takes calibration, which models in memory are not given yet"
            raise fail("QP222", text, "use quantplan.apply, or an algorithm without calibration, such as rtn")
        if assignment.module.kind == "experts" and assignment.aq is not None:
            text = f"activations of fused experts cannot be quantized in memory: {assignment.name}"
            raise fail("QP222", text, "give them aq: null in an override")
        if assignment.observer is not None:
            text = f"static activations take calibration, and in memory there is none: {assignment.name}"
            raise fail("QP222", text, "use quantplan.apply, or leave out dynamic: false")


def _largest_magnitudes(model: nn.Module, assignments: Iterable[Assignment]) -> dict[str, Tensor]:
    """The largest magnitude of the matrices that share a tensor scale, for schemes that have one. Raises QP601."""
    found: dict[str, Tensor] = {}
    for assignment in assignments:
        for matrix in assignment.matrices:
            largest = _view(model, matrix).abs().amax().float()
            if not torch.isfinite(largest):
                advice = "mend the weight, or keep the module: keep: true"
                raise fail("QP601", "NaN or infinity in the weight", advice, tensor=matrix.name)
            if assignment.wq is not None and assignment.wq.needs_absmax:
                key = scale_group(matrix.name)
                found[key] = torch.maximum(found[key], largest) if key in found else largest
    return found


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Module -> every parent that holds it, and the name it has there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def _view(model: nn.Module, matrix: Matrix) -> Tensor:
    """A matrix of the model, sharing its memory."""
    parameter = model.get_parameter(matrix.tensor).detach()
    if matrix.index is None:
        return parameter.reshape(matrix.rows, matrix.columns)
    slab = parameter[matrix.index].t() if matrix.transposed else parameter[matrix.index]
    return slab[matrix.first : matrix.first + matrix.rows]


def _solve(model: nn.Module, assignment: Assignment, matrix: Matrix, largest: Mapping[str, Tensor]) -> QuantizedTensor:
    wq = assignment.wq
    assert wq is not None
    absmax = largest[scale_group(matrix.name)] if wq.needs_absmax else None
    weight = _view(model, matrix).float().contiguous()
    return assignment.algorithm.solve(weight, wq.quantizer(matrix.name), absmax)
