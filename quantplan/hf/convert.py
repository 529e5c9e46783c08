"""Where stored matrices go in a transformers model, and decoding those it rearranges while loading.

transformers renames and merges checkpoint tensors with conversions (regular expressions with operations); per-expert matrices
become one 3-D parameter, for one. A matrix no conversion touches stays packed in a `QuantLinear`. For the others the model's
own conversion is wrapped: it collects codes and parameters instead of weights, and decodes them before its operations run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.headers import TensorInfo
from quantplan.hf.plugin import Treatment, Treatments
from quantplan.models.modules import EXPERT_PARTS, Matrix, module_of, natural_key
from quantplan.numerics import packed_bytes

_EXPERT = re.compile(r"\.experts\.\d+\.([^.]+)$")


class _Renamed:
    """Where the conversions of a model take the weight of a stored matrix: `key`, by way of `pattern` (None: renamed only)."""

    def __init__(self, model: Any, conversions: Iterable[Any]) -> None:
        conversions = list(conversions)
        self._model, self.state = model, model.state_dict()
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def __call__(self, name: str) -> tuple[str, str | None]:
        stored = f"{name}.weight"
        prefix = self._model.base_model_prefix
        key, pattern = rename_source_key(stored, self.renamings, self._converters, prefix, self.state)
        return (stored, None) if key not in self.state and stored in self.state else (key, pattern)


def find_places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Stored matrix -> the `nn.Linear` or `Conv1D` it belongs to, for those that no conversion touches. `model` may be on
    meta."""
    renamed = _Renamed(model, get_model_conversion_mapping(model))
    found = {}
    for name in names:
        key, pattern = renamed(name)
        module = key.removesuffix(".weight")
        if pattern is None and key in renamed.state and type(model.get_submodule(module)) in (nn.Linear, Conv1D):
            found[name] = module
    return found


def find_attentions(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Attention module as the checkpoint names it -> as the model does. `model` may be on meta. Raises QP222 for one that is not
    there."""
    renamed, modules = _Renamed(model, get_model_conversion_mapping(model)), dict(model.named_modules())
    found = {}
    for name in names:
        place = renamed(f"{name}.k_proj")[0].rpartition(".")[0].rpartition(".")[0]
        if place not in modules:
            raise fail("QP222", f"the model has no attention '{name}', whose cache is quantized", "copy the checkpoint again")
        found[name] = place
    return found


def decoding_conversions(conversions: list[Any], model: Any, treatments: Treatments) -> list[Any]:
    """`conversions`, changed so that the matrices `treatments` names arrive dequantized. Matrices without a place in the
    model are left to transformers, which reports them. Raises QP222 for what cannot be decoded on the way."""
    renamed = _Renamed(model, conversions)
    parts = _parts(treatments.values())
    touched: set[str] = set()
    whole: list[StoredMatrices] = []
    projections: set[str] = set()
    for name, (_, aq) in treatments.items():
        key, pattern = renamed(name)
        expert = _EXPERT.search(name)
        if pattern is not None:
            touched.add(pattern)
        elif key in renamed.state:
            source = apply_renamings(f"{name}.weight", renamed.renamings)
            whole.append(StoredMatrices([source], [key], [_AsItIs()], treatments=treatments, parts=parts))
        elif expert:
            projections.add(expert[1])
        else:
            continue
        if aq is not None:
            text = f"transformers rearranges {name} while loading, and its activations cannot be quantized then"
            raise fail("QP222", text, "quantize it with aq: null")
    wrapped = [_wrap(c, treatments, parts) if _is_touched(c, touched) else c for c in conversions]
    return wrapped + whole + list(_fusing(model, renamed.state, projections, treatments, parts))


def _is_touched(conversion: Any, patterns: set[str]) -> bool:
    return isinstance(conversion, WeightConverter) and not patterns.isdisjoint(conversion.source_patterns)


def _parts(treatments: Iterable[Treatment]) -> list[str]:
    """What the last part of a stored name can be, for these schemes."""
    schemes = {wq for wq, _ in treatments}
    named = {f"weight_{n}" for wq in schemes for n in wq.param_layout(1, wq.group or 1)}
    return ["weight", "weight_codes", *sorted(named)]


def _wrap(conversion: Any, treatments: Treatments, parts: list[str]) -> StoredMatrices:
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    if not all(source.endswith(".weight") for source in sources):
        text = f"transformers rearranges {' and '.join(sources)} while loading, in a way packed weights cannot follow"
        raise fail("QP222", text, "keep these modules: keep: true")
    made = StoredMatrices(
        list(sources),
        list(targets),
        list(conversion.operations),
        conversion.force_cpu,
        treatments=treatments,
        parts=parts,
        original=conversion,
    )
    made.scope_prefix, made.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return made


def _fusing(
    model: Any, state: Mapping[str, Tensor], projections: set[str], treatments: Treatments, parts: list[str]
) -> Iterator[StoredMatrices]:
    """Conversions for models that store their experts fused and so have none: ours are stored one by one."""
    config, done = model.config.to_dict(), set()
    for name, tensor in state.items():
        fused = name.rpartition(".")[2]
        if tensor.dim() != 3 or fused in done or not set(EXPERT_PARTS.get(fused, ("",))) <= projections:
            continue
        module = module_of(TensorInfo(name, "BF16", tuple(tensor.shape)), config)
        if module is None or module.kind != "experts":
            continue
        done.add(fused)
        subs = EXPERT_PARTS[fused]
        operations: list[ConversionOps] = [MergeModulelist(dim=0)]
        operations += [Concatenate(dim=1)] if len(subs) > 1 else []
        operations += [Transpose(1, 2)] if module.matrices[0].transposed else []
        sources = [f"experts.*.{sub}.weight" for sub in subs]
        yield StoredMatrices(sources, [f"experts.{fused}"], operations, treatments=treatments, parts=parts)


class _AsItIs(ConversionOps):
    """A conversion must have an operation; one matrix that is merely decoded needs none."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: list[str], **others: Any) -> Any:
        return {target_patterns[0]: next(iter(input_dict.values()))}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class StoredMatrices(WeightConverter):
    """A conversion of weights, fed with stored matrices: for every pattern `….weight` it also collects the parts of the
    native format, and hands the operations what they stand for."""

    def __init__(
        self,
        source_patterns: list[str],
        target_patterns: list[str],
        operations: list[ConversionOps],
        force_cpu: bool = False,
        *,
        treatments: Treatments,
        parts: list[str],
        original: Any = None,
    ) -> None:
        """`source_patterns` end with `.weight`. `original`: the model's own conversion, which saving goes back through."""
        collected = [source.removesuffix("weight") + part for source in source_patterns for part in parts]
        super().__init__(collected, target_patterns, operations, force_cpu)
        self.treatments, self.original = treatments, original
        self.arrived: dict[str, list[str]] = {}  # pattern -> stored names, in the order of the collected tensors
        self.like: Tensor | None = None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.arrived.setdefault(source_pattern, []).append(source_key)

    def convert(self, layer_name: str, model: Any = None, *arguments: Any, **options: Any) -> Any:
        self.like = model.get_parameter(layer_name)
        return super().convert(layer_name, model, *arguments, **options)

    def materialize_tensors(self) -> dict[str, list[Tensor]]:
        """Pattern `….weight` -> weights in the parameter's dtype, in natural order of their names."""
        matrices: dict[str, dict[str, dict[str, Tensor]]] = {}
        for pattern, tensors in super().materialize_tensors().items():
            base = pattern.rpartition(".")[0] + ".weight"
            for key, tensor in zip(self.arrived[pattern], tensors, strict=True):
                name, _, part = key.rpartition(".")
                matrices.setdefault(base, {}).setdefault(name, {})[part] = tensor
        return {
            base: [self._weight(name, named[name]) for name in sorted(named, key=natural_key)] for base, named in matrices.items()
        }

    @torch.no_grad()
    def _weight(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        assert self.like is not None
        if "weight" in parts:
            return parts["weight"].to(self.like.dtype)
        wq, aq = self.treatments[name]

        def read(stored: str) -> Tensor:
            part = stored.rpartition(".")[2]
            if part not in parts:
                raise fail("QP221", "tensor is missing", "copy the checkpoint again", tensor=stored)
            return parts[part]

        rows, width = read(f"{name}.weight_codes").shape
        # rows of codes are padded to whole words, so their width leaves a few lengths open: the parameter decides
        turned = any(isinstance(operation, Transpose) for operation in self.operations)
        lengths = self.like.shape[-2:] if turned else reversed(self.like.shape[-2:])
        fitting = (n for n in lengths if packed_bytes(n, wq.bits) == width)
        matrix = Matrix(name, "", rows, next(fitting, width * 8 // wq.bits))
        quantized = FORMATS.get("quantplan")().decode(matrix, wq, aq, read)
        return wq.quantizer().dequantize(quantized).to(self.like.dtype)

    def was_used(self) -> bool:
        """Whether saving goes back through it: what has no conversion of the model's own is saved as it is in memory."""
        return self.original is not None and super().was_used()

    def reverse_transform(self) -> Any:
        return self.original.reverse_transform()
