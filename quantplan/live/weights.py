"""Which stored tensors each parameter of a live model is made of, the reverse, and loading them one module at a time.

transformers renames, merges and splits checkpoint tensors while it loads them; its own conversions are applied here to the
tensors of one module, so that parameters equal those of `from_pretrained` bit for bit and nothing else is in memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import fail
from quantplan.headers import Checkpoint
from quantplan.live.skeleton import owner_of
from quantplan.models.modules import Matrix, find_modules

RTN_DOES_WITHOUT = "keep it, or use an algorithm without calibration, such as rtn"


@dataclass(frozen=True)
class Origin:
    """What makes `parameters`: stored `tensors`, each with the pattern of `conversion` that it answers to; None: one tensor
    that is one parameter, as it is."""

    parameters: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]
    conversion: WeightConverter | None = None


@dataclass(frozen=True)
class Place:
    """Where rows of a stored matrix are in a live model: rows `first` to `first + rows` of slab `index` (None: 2-D) of
    `parameter` are its rows from `of`. `transposed`: the slab is `[in, out]`, so that rows are its columns."""

    parameter: str
    index: int | None
    first: int
    rows: int
    of: int = 0
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module that computes with it."""
        return self.parameter.rpartition(".")[0]

    def view(self, model: nn.Module) -> Tensor:
        """The rows themselves, `[rows, columns]`: a view of the loaded parameter, so that `copy_` changes the model."""
        slab: Tensor = model.get_parameter(self.parameter)
        slab = slab if self.index is None else slab[self.index]
        return (slab.t() if self.transposed else slab)[self.first : self.first + self.rows]


class Weights:
    """The names of a checkpoint and of its model, joined. `model` is one of `skeleton`'s, and stays its caller's: `load` and
    `release` change its parameters, nothing else.

    `device`: where parameters are loaded to; buffers go there at once.
    `origins`: parameter or persistent buffer -> what it is made of. `places`: name of a stored matrix -> where its rows are.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, torch.device(device)
        for name, buffer in list(model.named_buffers(remove_duplicate=False)):
            owner, last = owner_of(model, name)
            owner._buffers[last] = buffer.to(self.device)
        self._empty: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        self._state: tuple[str, ...] = tuple(model.state_dict())
        self.origins: dict[str, Origin] = {}
        for origin in _find_origins(model, checkpoint):
            self.origins.update(dict.fromkeys(origin.parameters, origin))
        self._tie()
        self.places: dict[str, tuple[Place, ...]] = _find_places(checkpoint, self.origins)

    def _tie(self) -> None:
        """Parameters that are in no file share the weight of one that is."""
        tied = self.model.all_tied_weights_keys
        families: dict[str, list[str]] = {}
        for target, source in tied.items():
            families.setdefault(source, [source]).append(target)
        for members in families.values():
            known = next((m for m in members if m in self.origins), None)
            for member in members:
                if known is not None and member not in self.origins and self.origins[known].conversion is None:
                    self.origins[member] = replace(self.origins[known], parameters=(member,))

    def place_of(self, matrix: Matrix) -> tuple[Place, ...]:
        """Where a matrix's rows are: one place nearly always, several for a tied one.
        Raises QP223 when the model does not hold it as a matrix."""
        found = self.places.get(matrix.name, ())
        if not found:
            text = f"the model's code has no matrix that is {matrix.name}"
            raise fail("QP223", text, RTN_DOES_WITHOUT, file=self.checkpoint.source, tensor=matrix.tensor)
        return found

    @cached_property
    def matrices_at(self) -> dict[tuple[str, int | None], list[str]]:
        """(parameter, slab) -> the stored matrices that are in it, in order: what an input seen there is the input of."""
        found: dict[tuple[str, int | None], list[str]] = {}
        for name, places in self.places.items():
            for place in places:
                found.setdefault((place.parameter, place.index), []).append(name)
        return found

    def matrices_in(self, module: str) -> dict[tuple[str, int | None], list[str]]:
        """`matrices_at`, for the parameters of one module."""
        return {point: names for point, names in self.matrices_at.items() if point[0].startswith(f"{module}.")}

    def sharing(self, name: str) -> list[str]:
        """The other parameters made of the same stored tensors as parameter `name`: whoever changes one changes them all."""
        tensors = {tensor for tensor, _ in self.origins[name].tensors}
        same = (n for n, o in self.origins.items() if n != name and any(tensor in tensors for tensor, _ in o.tensors))
        return [n for n in same if n not in self.origins[name].parameters or self.origins[name].conversion is None]

    def under(self, prefix: str) -> list[str]:
        """The parameters and persistent buffers of the module called `prefix` ('' is the model)."""
        start = f"{prefix}." if prefix else ""
        return [name for name in self._state if name.startswith(start)]

    def load(self, prefix: str, reader: TensorReader, dtype: torch.dtype | None = None) -> None:
        """Makes the parameters and persistent buffers of one module real; those that are real already stay. `dtype`: of
        floats; None leaves them in the skeleton's, as `from_pretrained` does.

        Raises QP221 for a parameter in no file, QP223 for one of another shape.
        """
        self.load_parameters([n for n in self.under(prefix) if n not in self._empty or self._current(n).is_meta], reader, dtype)

    @torch.no_grad()
    def load_parameters(self, names: Iterable[str], reader: TensorReader, dtype: torch.dtype | None = None) -> None:
        """As `load`, for single parameters and persistent buffers."""
        left = dict.fromkeys(names)
        while left:
            name = next(iter(left))
            origin = self.origins.get(name)
            if origin is None:
                del left[name]
                self._compute(name)
                continue
            made = self._make(name, origin, reader, dtype)
            for target in [n for n in made if n in left]:
                self._set(target, made[target])
                del left[target]
            if name in left:
                raise fail("QP223", f"transformers makes no '{name}' of the tensors for it", RTN_DOES_WITHOUT)

    def _compute(self, name: str) -> None:
        """What is in no file: buffers have their values; parameters that transformers says may be missing (sinusoids) are made
        by the model's own initialization, everything else about their module being marked as done."""
        if name not in self._empty:
            return
        if not any(re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_missing or ()):
            text = f"no file has a tensor for the model's parameter '{name}'"
            raise fail("QP221", text, "is the checkpoint complete?", file=self.checkpoint.source, tensor=name)
        owner, last = owner_of(self.model, name)
        owner._parameters[last] = nn.Parameter(torch.empty_like(self._empty[name], device=self.device), requires_grad=False)
        owner._is_hf_initialized = False  # type: ignore[assignment]
        self.model.initialize_weights()

    def _current(self, name: str) -> Tensor:
        owner, last = owner_of(self.model, name)
        return getattr(owner, last)

    def _make(self, name: str, origin: Origin, reader: TensorReader, dtype: torch.dtype | None) -> dict[str, Tensor]:
        like = self._empty[name] if name in self._empty else self._current(name)
        kind = dtype if dtype is not None and like.is_floating_point() else like.dtype
        if origin.conversion is None:
            return {name: self._read(reader, origin.tensors[0][0], kind)}
        conversion = copy.deepcopy(origin.conversion)
        for tensor, pattern in origin.tensors:
            read: Any = partial(self._read, reader, tensor, kind)
            conversion.add_tensor(origin.parameters[0], tensor, pattern, read)
        made = conversion.convert(origin.parameters[0], model=self.model, config=self.model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}

    def _read(self, reader: TensorReader, tensor: str, kind: torch.dtype) -> Tensor:
        return reader.read(tensor).to(self.device, kind)

    def _set(self, name: str, value: Tensor) -> None:
        owner, last = owner_of(self.model, name)
        current = getattr(owner, last)
        if current.shape != value.shape:
            text = f"the model's '{name}' is {list(current.shape)}, the stored one {list(value.shape)}"
            raise fail("QP223", text, "is config.json that of these weights?", file=self.checkpoint.source, tensor=name)
        if last in owner._parameters:
            owner._parameters[last] = parameter = nn.Parameter(value, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark, see `_compute`
        else:
            owner._buffers[last] = value

    def release(self, prefix: str) -> None:
        """Puts the parameters of one module back on the meta device."""
        self.release_parameters(self.under(prefix))

    def release_parameters(self, names: Iterable[str]) -> None:
        """As `release`, for single parameters. Buffers stay: they are small."""
        for name in names:
            if name in self._empty:
                owner, last = owner_of(self.model, name)
                owner._parameters[last] = self._empty[name]

    def empty(self, prefix: str = "") -> dict[str, nn.Parameter]:
        """The meta parameters of one module by name, as the skeleton was made with them."""
        start = f"{prefix}." if prefix else ""
        return {name: p for name, p in self._empty.items() if name.startswith(start)}


def parameters_of(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """For each parameter and persistent buffer of a model the checkpoint's tensors that make it; empty where none do."""
    origins = Weights(model, checkpoint).origins
    return {name: tuple(t for t, _ in origins[name].tensors) if name in origins else () for name in model.state_dict()}


def _find_origins(model: Any, checkpoint: Checkpoint) -> Iterator[Origin]:
    """As transformers collects tensors, step by step, with names alone."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, list[tuple[str, str]]] = {}
    conversion_of: dict[str, WeightConverter] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if key not in state:
            continue
        if pattern is None:
            yield Origin((key,), ((name, name),))
            continue
        collected.setdefault(key, []).append((name, pattern))
        conversion_of.setdefault(key, by_pattern[pattern])
    for key, tensors in collected.items():
        conversion = conversion_of[key]
        first, *others = conversion.target_patterns
        yield Origin((key, *(key.replace(first, other) for other in others)), tuple(tensors), conversion)


@dataclass(frozen=True)
class _Box:
    """Where rows of one stored tensor are while conversions are followed: as `Place`, in an array of shape `[.., a, b]`."""

    tensor: str
    of: int
    rows: int
    index: int | None = None
    first: int = 0
    transposed: bool = False
    whole: bool = True  # nothing was merged with it or cut from it


@dataclass(frozen=True)
class _Array:
    """An array of which only the shape is known, and where the rows of stored tensors are in it."""

    shape: tuple[int, ...]
    boxes: tuple[_Box, ...] = field(default=())


def _find_places(checkpoint: Checkpoint, origins: Mapping[str, Origin]) -> dict[str, tuple[Place, ...]]:
    followed: dict[str, list[tuple[str, _Box]]] = {}
    done: set[int] = set()
    for origin in origins.values():
        if id(origin) in done:
            continue
        done.add(id(origin))
        for parameter, array in _follow(checkpoint, origin).items():
            for box in array.boxes:
                followed.setdefault(box.tensor, []).append((parameter, box))
    found = {}
    for module in find_modules(checkpoint).values():
        for matrix in module.matrices:
            places = (_place(matrix, p, box) for p, box in followed.get(matrix.tensor, ()))
            found[matrix.name] = tuple(sorted((p for p in places if p is not None), key=lambda p: (p.of, p.parameter)))
    return {name: places for name, places in found.items() if places}


def _place(matrix: Matrix, parameter: str, box: _Box) -> Place | None:
    if matrix.transposed:  # its rows are the columns of what is stored, and conversions that cut those are not followed
        return Place(parameter, matrix.index, matrix.first, matrix.rows, 0, not box.transposed) if box.whole else None
    start, stop = max(matrix.first, box.of), min(matrix.first + matrix.rows, box.of + box.rows)
    if start >= stop:
        return None
    index = box.index if matrix.index is None else matrix.index
    first = box.first + start - box.of
    return Place(parameter, index, first, stop - start, start - matrix.first, box.transposed)


def _follow(checkpoint: Checkpoint, origin: Origin) -> dict[str, _Array]:
    """The parameters of an origin as arrays; nothing for conversions that do more than move matrices as wholes."""
    tensors = {name: checkpoint.tensors[name] for name, _ in origin.tensors}
    held: dict[str, list[_Array]] = {}
    for name, pattern in origin.tensors:
        shape = tensors[name].shape
        rows = shape[-2] if len(shape) > 1 else 0
        held.setdefault(pattern, []).append(_Array(shape, (_Box(name, 0, rows),)))
    if origin.conversion is None:
        return {origin.parameters[0]: held[origin.tensors[0][1]][0]}
    for operation in origin.conversion.operations:
        step = next((f for kind, f in _STEPS.items() if type(operation) is kind), None)
        moved = step(operation, held, origin.conversion) if step is not None else None
        if moved is None:
            return {}
        held = moved
    return {p: a[0] for p, a in zip(origin.parameters, held.values(), strict=False) if len(a) == 1}


_Held = dict[str, list[_Array]]


def _merge(operation: Any, held: _Held, conversion: Any) -> _Held | None:
    if operation.dim != 0 or any(len(a.shape) != 2 for arrays in held.values() for a in arrays):
        return None
    merged = {}
    for pattern, arrays in held.items():
        boxes = tuple(replace(box, index=i, whole=False) for i, a in enumerate(arrays) for box in a.boxes)
        merged[pattern] = [_Array((len(arrays), *arrays[0].shape), boxes)]
    return merged


def _concatenate(operation: Any, held: _Held, conversion: Any) -> _Held | None:
    arrays = [a for pattern in conversion.source_patterns if pattern in held for a in held[pattern]]
    axis = operation.dim % len(arrays[0].shape) - len(arrays[0].shape)  # -2: rows as they are stored, -1: columns
    boxes, at = [], 0
    for array in arrays:
        for box in array.boxes:
            if axis != (-1 if box.transposed else -2):
                return None  # the columns of one matrix come from several: no matrix of the checkpoint is here as a whole
            boxes.append(replace(box, first=box.first + at, whole=False))
        at += array.shape[axis]
    shape = list(arrays[0].shape)
    shape[axis] = at
    return {conversion.target_patterns[0]: [_Array(tuple(shape), tuple(boxes))]}


def _transpose(operation: Any, held: _Held, conversion: Any) -> _Held | None:
    moved = {}
    for pattern, arrays in held.items():
        rank = len(arrays[0].shape)
        if operation.check_dims or {operation.dim0 % rank, operation.dim1 % rank} != {rank - 1, rank - 2}:
            return None
        moved[pattern] = [
            _Array((*a.shape[:-2], a.shape[-1], a.shape[-2]), tuple(replace(b, transposed=not b.transposed) for b in a.boxes))
            for a in arrays
        ]
    return moved


def _chunk(operation: Any, held: _Held, conversion: Any) -> _Held | None:
    (array,) = next(iter(held.values()))
    count, axis = len(conversion.target_patterns), operation.dim % len(array.shape) - len(array.shape)
    if operation.num_shards_attribute is not None or any(axis != (-1 if b.transposed else -2) for b in array.boxes):
        return None
    width = -(-array.shape[axis] // count)
    chunks = {}
    for i, target in enumerate(conversion.target_patterns):
        start, stop = i * width, min((i + 1) * width, array.shape[axis])
        shape = list(array.shape)
        shape[axis] = stop - start
        cut = (_cut(box, start, stop) for box in array.boxes)
        chunks[target] = [_Array(tuple(shape), tuple(box for box in cut if box is not None))]
    return chunks


def _cut(box: _Box, start: int, stop: int) -> _Box | None:
    low, high = max(box.first, start), min(box.first + box.rows, stop)
    return replace(box, of=box.of + low - box.first, rows=high - low, first=low - start, whole=False) if low < high else None


_STEPS: dict[type, Any] = {MergeModulelist: _merge, Concatenate: _concatenate, Transpose: _transpose, Chunk: _chunk}
