"""`verify`: every tensor accounted for, every byte as recorded, every layer's error. Streams: one matrix at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint.durable import CHUNK, hash_file, hash_range
from quantplan.checkpoint.layout import OutputLayout, Unit, output_layout
from quantplan.checkpoint.provenance import NAME, source_of
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.difference import difference
from quantplan.errors import Place, Problem, QuantplanError, fail
from quantplan.format import FORMATS, Format
from quantplan.headers import Checkpoint, TensorInfo, read_checkpoint
from quantplan.models.modules import Matrix
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution, resolve

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1 << 20  # weights compared at a time


@dataclass(frozen=True)
class LayerError:
    """How far a quantized matrix is from its source: signal-to-noise ratio in dB (infinite when exact), largest difference, mean
    squared difference."""

    name: str
    scheme: str
    snr: float
    largest: float
    mse: float
    weights: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data; JSON has no infinity, so an exact matrix has no `snr_db`."""
        snr = round(self.snr, 3) if math.isfinite(self.snr) else None
        return {"module": self.name, "scheme": self.scheme, "snr_db": snr, "max_error": self.largest, "mse": self.mse}


@dataclass(frozen=True)
class Verification:
    """What was found: problems (none when all is well), and layer errors when the source was given."""

    out: str
    tensors: int
    problems: tuple[Problem, ...]
    layers: tuple[LayerError, ...] = ()
    source_checked: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "out": self.out,
            "ok": self.ok,
            "tensors": self.tensors,
            "source_checked": self.source_checked,
            "problems": [p.as_dict() for p in self.problems],
            "layers": [layer.as_dict() for layer in self.layers],
        }


def verify(
    out: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Checks an output directory against its own record; with `source`, also that every source tensor is there as the plan
    says, and how far each layer is off; with `plan`, that it was made by that plan.

    Findings are returned, not raised. Raises QuantplanError when there is nothing to check (QP220) or `source` or `plan`
    itself is bad.
    """
    record = read_record(Path(out))
    recorded = load_plan(record["plan"])
    problems: list[Problem] = []
    if plan is not None and load_plan(plan).canonical() != recorded.canonical():
        problems.append(
            Problem(
                "QP804",
                "the output was made by another plan",
                "compare with the plan in quantplan.json",
                place=Place(str(out)),
            )
        )
    try:
        written = read_checkpoint(out)
    except QuantplanError as error:
        return Verification(str(out), 0, (*problems, *error.problems))
    problems += check_record(record, written)
    layers: list[LayerError] = []
    if source is not None:
        resolution = resolve(recorded, read_checkpoint(source)).require()
        problems += check_source(record, resolution.checkpoint)
        layout = output_layout(resolution)
        problems += check_names(layout, written)
        if not problems:
            for layer in compare(resolution, layout, written, on_step, changed_tensors(record)):
                if isinstance(layer, Problem):
                    problems.append(layer)
                else:
                    layers.append(layer)
    return Verification(str(out), len(written.tensors), tuple(problems), tuple(layers), source is not None)


def read_record(out: Path) -> dict[str, Any]:
    """quantplan.json. Raises QP220 when it is missing or not one."""
    try:
        record = json.loads((out / NAME).read_text("utf-8"))
        if not {"plan", "files", "tensors", "source", "other_files"} <= record.keys():
            raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise fail("QP220", f"no readable {NAME}: {reason}", "give a directory that quantplan wrote", file=str(out)) from None
    return record


def check_record(record: Mapping[str, Any], written: Checkpoint) -> Iterator[Problem]:
    """Hashes of headers, tensors and the other files against the record; tensors missing or too many."""
    folder = written.require_path()
    for name, recorded in record["files"].items():
        if written.header_hashes.get(name) not in (None, recorded["header_sha256"]):
            yield Problem("QP801", "the header is not the one recorded", place=Place(name))
    for name, expected in record["other_files"].items():
        path = folder / name
        if not path.is_file():
            yield Problem("QP802", "the file is missing", place=Place(name))
        elif hash_file(path) != expected:
            yield Problem("QP801", "the file is not the one recorded", place=Place(name))
    tensors = record["tensors"]
    yield from _names(tensors.keys(), written, "the record")
    common = [info for name, info in written.tensors.items() if name in tensors]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for info, found in zip(common, pool.map(lambda info: _hash_tensor(folder, info), common), strict=True):
            if found != tensors[info.name]:
                yield Problem(
                    "QP801",
                    "the data is not what was recorded",
                    "copy it again, or repeat the run",
                    place=Place(info.file, tensor=info.name),
                )


def check_source(record: Mapping[str, Any], source: Checkpoint) -> Iterator[Problem]:
    """Whether the source given is the one recorded, by its files' sizes and headers."""
    recorded, found = record["source"]["files"], source_of(source)["files"]
    if recorded != found:
        names = sorted(n for n in recorded.keys() | found.keys() if recorded.get(n) != found.get(n))
        text = f"the output was made from another source: {', '.join(names[:3])} differ"
        yield Problem("QP804", text, "give the checkpoint it was made from", place=Place(source.source))


def check_names(layout: OutputLayout, written: Checkpoint) -> Iterator[Problem]:
    """Tensors that source and plan demand, against those there, with dtypes and shapes."""
    yield from _names(layout.tensors.keys(), written, "source and plan")
    for name, planned in layout.tensors.items():
        found = written.tensors.get(name)
        if found is not None and (found.dtype, found.shape) != (planned.dtype, planned.shape):
            text = f"is {found.dtype} {list(found.shape)}, the plan makes it {planned.dtype} {list(planned.shape)}"
            yield Problem("QP804", text, place=Place(found.file, tensor=name))


def _names(expected: Any, written: Checkpoint, by: str) -> Iterator[Problem]:
    for name in sorted(expected - written.tensors.keys()):
        yield Problem("QP802", f"demanded by {by}, and missing", place=Place(written.source, tensor=name))
    for name in sorted(written.tensors.keys() - expected):
        yield Problem("QP803", f"not in {by}", place=Place(written.tensors[name].file, tensor=name))


def changed_tensors(record: Mapping[str, Any]) -> frozenset[str]:
    """The tensors that transforms changed on their way, as recorded."""
    digits = str((record.get("transforms") or {}).get("changed", ""))
    return frozenset(name for name, digit in zip(record["tensors"], digits, strict=False) if digit == "1")


def compare(
    resolution: Resolution,
    layout: OutputLayout,
    written: Checkpoint,
    on_step: Callable[[str, int, int], None] | None,
    changed: frozenset[str] = frozenset(),
) -> Iterator[LayerError | Problem]:
    """Each unit of the output against the source: errors of quantized matrices, problems where a copy is not exact. What
    transforms `changed` is not there to compare with: its hash alone is checked."""
    output = FORMATS.get(resolution.plan.output.format)()
    source = resolution.checkpoint
    units = [u for f in layout.files for u in f.units]
    with (
        TensorReader(source.require_path(), source.tensors) as old,
        TensorReader(written.require_path(), written.tensors) as new,
    ):
        for done, unit in enumerate(units):
            if any(t.name in changed for t in unit.outputs):
                pass
            elif unit.matrix is not None:
                yield layer_error(unit, output, old, new)
            elif unit.kind == "copy" and not _same_bytes(unit.source, written.tensors[unit.source.name], old, new):
                yield Problem(
                    "QP801",
                    "the copy differs from the source",
                    place=Place(unit.outputs[0].file, tensor=unit.source.name),
                )
            if on_step is not None:
                on_step(unit.name, done + 1, len(units))


def layer_error(unit: Unit, output: Format, old: TensorReader, new: TensorReader) -> LayerError:
    """The error of one matrix: the signal-to-noise ratio, largest and mean squared difference of `Difference`."""
    matrix, assignment = unit.matrix, unit.assignment
    assert matrix is not None and assignment is not None and assignment.wq is not None
    stored = output.decode(matrix, assignment.wq, assignment.aq, new.read)
    restored = assignment.wq.quantizer().dequantize(stored)
    found = difference((w, restored[at : at + len(w)]) for at, w in row_pieces(matrix, old))
    return LayerError(matrix.name, assignment.wq.name, found.snr, found.largest, found.squared, matrix.rows * matrix.columns)


def row_pieces(matrix: Matrix, reader: TensorReader) -> Iterator[tuple[int, Tensor]]:
    """A stored matrix piece by piece: the first row, and rows from there, float32."""
    rows = max(1, ROWS // matrix.columns)
    for first in range(0, matrix.rows, rows):
        yield first, reader.read_rows(matrix, first, min(first + rows, matrix.rows)).float()


def _same_bytes(before: TensorInfo, after: TensorInfo, old: TensorReader, new: TensorReader) -> bool:
    if before.size != after.size:
        return False
    pieces = range(0, before.size, CHUNK)
    return all(
        old.read_bytes(before, at, min(CHUNK, before.size - at)) == new.read_bytes(after, at, min(CHUNK, before.size - at))
        for at in pieces
    )


def _hash_tensor(folder: Path, info: TensorInfo) -> str:
    with open(folder / info.file, "rb", buffering=0) as file:
        return hash_range(file.fileno(), info.start, info.size)
