"""The graph route: a model whose layers are function calls, as one whose layers are modules, by `torch.export`.

Exported, every linear layer, convolution and embedding is a call with its weight as an argument, wherever it stood in the code.
Each becomes a module called like the parameter it takes, and then plans, `prepare`, `prepare_qat` and `convert` know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantplan.errors import fail
from quantplan.nn.fusion import NORMS, fold
from quantplan.nn.prepare import convert, prepare, prepare_qat
from quantplan.nn.qconfig import QConfig, QConfigMapping

_aten = torch.ops.aten


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> torch.fx.GraphModule:
    """`model` as a graph with a module for every layer, its parameters the very ones; in the mode it is in. `dynamic_shapes`: see
    `torch.export.export`; without, the first axis of every tensor may have any length where the model allows it.

    A parameter `fc.weight` makes the module `fc`, a bare one `w` the module `w`. A BatchNorm in evaluation that follows a
    layer is folded into it. Layers that share a weight, and calls with a computed one, stay calls. Raises QuantplanError QP222
    for a model that cannot be exported.
    """
    exported = _exported(model, example_inputs, dynamic_shapes)
    graph = exported.graph
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    for node in list(graph.nodes):
        layer = _LAYERS.get(node.target) if node.op == "call_function" else None
        if layer is None:
            continue
        at = 0 if node.target is _aten.embedding.default else 1
        weight = node.args[at]
        if not isinstance(weight, torch.fx.Node) or weight.op != "get_attr" or uses[str(weight.target)] != 1:
            continue
        made = layer(exported, node)
        if made is None:
            continue
        name = _free_name(exported, str(weight.target))
        exported.add_submodule(name, made.train(model.training))
        with graph.inserting_before(node):
            call = graph.call_module(name, (node.args[1 - at],))
            call.meta = node.meta
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    _fold_norms(exported)
    graph.eliminate_dead_code()
    exported.delete_all_unused_submodules()
    _drop_unused(exported)
    graph.lint()
    exported.recompile()
    return exported


def prepare_fx(
    model: nn.Module, qconfig_mapping: QConfigMapping | dict[str, QConfig], example_inputs: tuple[Any, ...]
) -> nn.Module:
    """`capture`, then `prepare` with the QConfigs of the mapping (seed 003). Raises QuantplanError QP222, QP105."""
    return prepare(_with_mapping(capture(model, example_inputs), qconfig_mapping), inplace=True)


def prepare_qat_fx(
    model: nn.Module, qconfig_mapping: QConfigMapping | dict[str, QConfig], example_inputs: tuple[Any, ...]
) -> nn.Module:
    """`capture`, then `prepare_qat` with the QConfigs of the mapping. Raises QuantplanError QP222, QP105."""
    return prepare_qat(_with_mapping(capture(model, example_inputs), qconfig_mapping), inplace=True)


def convert_fx(model: nn.Module) -> nn.Module:
    """torch.ao's word for `convert`."""
    return convert(model)


def _exported(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> torch.fx.GraphModule:
    """The model's graph, with a free first axis where it has one."""
    free = [{0: torch.export.Dim.AUTO} if isinstance(x, torch.Tensor) and x.dim() else None for x in example_inputs]
    try:
        program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes or tuple(free), strict=False)
    except Exception as error:
        text = f"torch.export cannot capture the model: {str(error).splitlines()[0]}"
        raise fail("QP222", text, "prepare it as it is: layers that are modules need no graph") from error
    made = program.module(check_guards=False)
    assert isinstance(made, torch.fx.GraphModule)
    return made


def _parameter(owner: nn.Module, node: Any) -> Any:
    """The parameter a node reads; None where there is none."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    found: Any = owner
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _argument(node: torch.fx.Node, place: int, otherwise: Any) -> Any:
    return node.args[place] if len(node.args) > place else otherwise


def _filled(made: Any, weight: Any, bias: Any) -> Any:
    made.weight = weight
    if bias is not None or hasattr(made, "bias"):
        made.register_parameter("bias", bias)
    return made


def _linear(owner: nn.Module, node: torch.fx.Node) -> nn.Module | None:
    weight, bias = _parameter(owner, node.args[1]), _parameter(owner, _argument(node, 2, None))
    if weight.dim() != 2:
        return None
    made: nn.Module = _filled(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), weight, bias)
    return made


def _convolution(dims: int) -> Callable[[nn.Module, torch.fx.Node], nn.Module | None]:
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]

    def make(owner: nn.Module, node: torch.fx.Node) -> nn.Module | None:
        weight, bias = _parameter(owner, node.args[1]), _parameter(owner, _argument(node, 2, None))
        stride, dilation = _argument(node, 3, 1), _argument(node, 5, 1)
        padding, groups = _argument(node, 4, 0), _argument(node, 6, 1)
        whole = [
            tuple(v) * (dims if len(v) == 1 else 1) if isinstance(v, list | tuple) else v for v in (stride, padding, dilation)
        ]
        made = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), *whole, groups=groups, bias=False, device="meta"
        )
        filled: nn.Module = _filled(made, weight, bias)
        return filled

    return make


def _embedding(owner: nn.Module, node: torch.fx.Node) -> nn.Module | None:
    weight, padding = _parameter(owner, node.args[0]), _argument(node, 2, -1)
    rows, columns = weight.shape
    made = nn.Embedding(rows, columns, padding_idx=None if padding < 0 else padding, device="meta")
    made.weight = weight
    return made


_LAYERS: dict[Any, Callable[[nn.Module, torch.fx.Node], nn.Module | None]] = {
    _aten.linear.default: _linear,
    _aten.conv1d.default: _convolution(1),
    _aten.conv1d.padding: _convolution(1),
    _aten.conv2d.default: _convolution(2),
    _aten.conv2d.padding: _convolution(2),
    _aten.conv3d.default: _convolution(3),
    _aten.conv3d.padding: _convolution(3),
    _aten.embedding.default: _embedding,
}


def _free_name(owner: nn.Module, parameter: str) -> str:
    """A module's name for the layer with this parameter."""
    name = parameter.removesuffix(".weight")
    held = dict(owner.named_modules())
    taken = name in dict(owner.named_parameters()) or (name in held and any(held[name].named_children()))
    return f"{name}_layer" if taken else name


def _fold_norms(graph_module: torch.fx.GraphModule) -> None:
    """In place: a BatchNorm in evaluation is folded into the layer whose output it alone takes."""
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _aten.batch_norm.default or node.args[5]:
            continue
        before = node.args[0]
        layer = modules.get(before.target) if before.op == "call_module" and len(before.users) == 1 else None
        if layer is None or isinstance(layer, nn.Embedding):
            continue
        gamma, beta, mean, variance = (_parameter(graph_module, argument) for argument in node.args[1:5])
        norm = NORMS[0](len(mean), eps=node.args[7], affine=gamma is not None).eval()
        norm.running_mean, norm.running_var = mean, variance
        if gamma is not None:
            norm.weight, norm.bias = gamma, beta
        folded = fold(layer, norm)
        parent, _, last = str(before.target).rpartition(".")
        setattr(graph_module.get_submodule(parent), last, folded)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)


def _drop_unused(graph_module: torch.fx.GraphModule) -> None:
    """In place: parameters and buffers that no node reads any more, and that are no layer's, go."""
    read = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
    for name, module in list(graph_module.named_modules()):
        if name in called:
            continue
        for held in (module._parameters, module._buffers):
            for own in list(held):
                if (f"{name}.{own}" if name else own) not in read:
                    del held[own]


def _with_mapping(model: nn.Module, mapping: QConfigMapping | dict[str, QConfig]) -> nn.Module:
    """`model`, in place, with the `qconfig`s of a mapping; a dictionary has names, "" for the whole."""
    if isinstance(mapping, dict):
        given = QConfigMapping().set_global(mapping.get(""))
        for name, qconfig in mapping.items():
            given.set_module_name(name, qconfig)
        mapping = given
    for name, module in model.named_modules():
        above = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1, 0, -1)]
        named = next((mapping.names[n] for n in above if n in mapping.names), mapping)
        module.qconfig = mapping.types.get(type(module), mapping.everything) if named is mapping else named
    return model
