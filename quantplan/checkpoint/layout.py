"""Where every byte of the output goes, known before any weight is read: files, headers, offsets. Torch-free.

Because sizes follow from headers alone, the estimate is exact, tensors are written to their place in any order, and the same
plan and source give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from quantplan.assignment import Assignment
from quantplan.errors import fail, printable
from quantplan.format import FORMATS, Format
from quantplan.headers import DTYPE_BITS, FLOAT_DTYPES, INDEX, TensorInfo
from quantplan.models.modules import Matrix
from quantplan.plan.kv_cache import projections
from quantplan.plan.resolve import Resolution
from quantplan.scheme import SAFETENSORS_DTYPES

METADATA = {"format": "pt"}  # one key only: with two, safetensors' own writer gives their order to chance


@dataclass(frozen=True)
class Unit:
    """What is read and written in one go: a tensor copied or cast, or a matrix quantized. `outputs` are its tensors,
    with the scales of the key-value cache that belong to it last."""

    kind: Literal["copy", "cast", "quantize"]
    source: TensorInfo
    outputs: tuple[TensorInfo, ...]
    matrix: Matrix | None = None
    assignment: Assignment | None = None

    @property
    def name(self) -> str:
        return self.matrix.name if self.matrix else self.source.name

    @property
    def size(self) -> int:
        """Bytes written."""
        return sum(t.size for t in self.outputs)

    @property
    def elements(self) -> int:
        """Weights it holds: the measure of work."""
        return self.matrix.rows * self.matrix.columns if self.matrix else 0


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file: its header (with the length before it) and the units that fill it."""

    name: str
    header: bytes
    size: int
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class OutputLayout:
    """All safetensors files of an output, and their index."""

    files: tuple[OutputFile, ...]

    @property
    def size(self) -> int:
        """Bytes of the safetensors files."""
        return sum(f.size for f in self.files)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every output tensor with its file and absolute offsets."""
        return {t.name: t for f in self.files for u in f.units for t in u.outputs}

    def index(self) -> bytes | None:
        """The index file, when there are several shards."""
        if len(self.files) == 1:
            return None
        data = sum(t.size for t in self.tensors.values())
        weight_map = {name: info.file for name, info in sorted(self.tensors.items())}
        return json_bytes({"metadata": {"total_size": data}, "weight_map": weight_map})

    def side_documents(self) -> Mapping[str, bytes]:
        """The documents that belong to the safetensors files: the index, if any."""
        index = self.index()
        return {} if index is None else {INDEX: index}


def json_bytes(document: object) -> bytes:
    """JSON as it is written everywhere: indented, in the given order, with a newline at the end."""
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a config or a file's name: only as an escape
        return (json.dumps(document, indent=2) + "\n").encode()


def output_layout(resolution: Resolution) -> OutputLayout:
    """The layout of everything `resolution` writes. Units keep the order of the source files, so reading is sequential."""
    output = FORMATS.get(resolution.plan.output.format)()
    units = list(_units(resolution, output))
    _refuse_twice(units)
    shards: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if shards[-1] and filled + unit.size > resolution.plan.output.shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += unit.size
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return OutputLayout(tuple(_file(name, shard) for name, shard in zip(names, shards, strict=True)))


def _units(resolution: Resolution, output: Format) -> Iterator[Unit]:
    scales = _cache_scales(resolution)
    treated = {a.module.tensor.name: a for a in resolution.assignments.values() if a.wq is not None}
    wanted = SAFETENSORS_DTYPES.get(resolution.plan.output.dtype or "")
    for tensor in sorted(resolution.checkpoint.tensors.values(), key=lambda t: (t.file, t.start, t.name)):
        assignment = treated.get(tensor.name)
        if assignment is None:
            cast = wanted and tensor.dtype in FLOAT_DTYPES and tensor.dtype != wanted
            out = TensorInfo(tensor.name, wanted if cast and wanted else tensor.dtype, tensor.shape)
            yield Unit("cast" if cast else "copy", tensor, (out, *scales.get(tensor.name, ())))
            continue
        assert assignment.wq is not None
        for i, matrix in enumerate(assignment.matrices):
            layout = output.layout(matrix, assignment.wq, assignment.aq)
            outputs = tuple(TensorInfo(name, dtype, shape) for name, (dtype, shape) in layout.items())
            outputs += () if i else scales.get(tensor.name, ())
            yield Unit("quantize", tensor, outputs, matrix, assignment)


def _cache_scales(resolution: Resolution) -> dict[str, tuple[TensorInfo, ...]]:
    """Source tensor -> the scales of the key-value cache that are written with it: those of what it projects to."""
    found: dict[str, tuple[TensorInfo, ...]] = {}
    cache = resolution.kv_cache
    if cache is not None:
        for name, module, scales in projections({a.name: a.module for a in resolution.assignments.values()}):
            layout = cache.layout(name)
            found[module.tensor.name] = tuple(TensorInfo(f"{name}.{s}", *layout[f"{name}.{s}"]) for s in scales)
    return found


def _refuse_twice(units: Sequence[Unit]) -> None:
    """Raises QP207 when two units write a tensor of the same name: the source has one that quantizing would make."""
    makers: dict[str, Unit] = {}
    for unit in units:
        for tensor in unit.outputs:
            other = makers.setdefault(tensor.name, unit)
            if other is not unit:
                copied, made = sorted((other, unit), key=lambda u: u.kind == "quantize")
                text = f"the source holds it, and quantizing {printable(made.name)} makes it too"
                raise fail("QP207", text, "keep that module, or remove the tensor", file=copied.source.file, tensor=tensor.name)


def _file(name: str, units: Sequence[Unit]) -> OutputFile:
    """Offsets: widest elements first, so that every tensor is aligned to its own element."""
    placed: dict[str, TensorInfo] = {}
    at = 0
    for info in sorted((t for u in units for t in u.outputs), key=lambda t: -DTYPE_BITS[t.dtype]):
        placed[info.name] = TensorInfo(info.name, info.dtype, info.shape, name, at, at + info.size)
        at += info.size
    entries = {
        info.name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
        for info in placed.values()
    }
    text = json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    final = [
        Unit(u.kind, u.source, tuple(_shifted(placed[t.name], base) for t in u.outputs), u.matrix, u.assignment) for u in units
    ]
    return OutputFile(name, len(text).to_bytes(8, "little") + text, base + at, tuple(final))


def _shifted(info: TensorInfo, base: int) -> TensorInfo:
    return TensorInfo(info.name, info.dtype, info.shape, info.file, base + info.start, base + info.end)
