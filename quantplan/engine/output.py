"""Writing an output: every tensor of the source once, quantized, cast or copied; all accounted for; then published."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint.durable import CHUNK
from quantplan.checkpoint.layout import OutputLayout, Unit
from quantplan.checkpoint.provenance import NAME, UNKNOWN, fingerprint, other_hashes, provenance
from quantplan.checkpoint.reader import TensorReader, reading
from quantplan.checkpoint.side_files import output_config
from quantplan.checkpoint.writer import CheckpointWriter
from quantplan.engine.progress import OnStep, Step
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.plan.resolve import Resolution

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.engine.collected import CollectedStatistics
    from quantplan.engine.solved import Solved


@dataclass(frozen=True)
class Output:
    """What an output is written from. `reader`: the source's tensors, as transforms rewrite them; `solved`: what calibration or
    training made; `collected`: statistics to quantize the rest by."""

    resolution: Resolution
    layout: OutputLayout
    reader: TensorReader
    writer: CheckpointWriter
    workers: int
    solved: Solved | None = None
    collected: CollectedStatistics | None = None

    def write(
        self,
        begun: Mapping[str, Any],
        copied: Mapping[str, Path],
        data: str = UNKNOWN,
        training: Mapping[str, Any] | None = None,
        *,
        tell: OnStep,
    ) -> None:
        """Writes every tensor, accounts for all of them, and publishes the directory. `begun`: the source's fingerprint, which
        must still hold; `copied`: side files; `data`: SHA-256 of calibration data; `training`: what the record says of it.

        Raises QP210 for a source that changed meanwhile, QP601 for NaN and infinity, QP602 for a gap, which is a bug.
        """
        with contextlib.closing(self._units()) as steps:
            for step in steps:
                tell(step)
        changed = self.reader.changed | (self.solved.changed if self.solved is not None else frozenset())
        self._account()
        config = {"config.json": output_config(self.resolution)}  # the last to be written: without it nothing loads
        documents = self.layout.side_documents()
        with reading(self.resolution.checkpoint.source):
            _check_unchanged(begun, fingerprint(self.resolution, self.layout))
            others = other_hashes({**documents, **config}, copied)
        hashes = self.writer.hashes
        record = {NAME: provenance(self.resolution, self.layout, hashes, others, self.workers, data, changed, training)}
        self.writer.publish(copied, {**documents, **record, **config})

    def _units(self) -> Generator[Step, None, None]:
        """Writes every unit of files that are not done yet, yielding after each."""
        from quantplan.engine.stream import quantized

        files = self.layout.files
        todo = [u for f in files if not self.writer.is_done(f.name) for u in f.units]
        total = sum(_share(u) for f in files for u in f.units)
        done = total - sum(_share(u) for u in todo)
        to_quantize = [u for u in todo if u.kind == "quantize"]
        stream = quantized(to_quantize, self.reader, self.workers, self.solved, self.collected)
        with contextlib.closing(stream):
            for unit in todo:
                if unit.kind == "quantize":
                    self._write_quantized(unit, next(stream))
                else:
                    self._write_plain(unit)
                self._write_cache_scales(unit)
                done += _share(unit)
                yield Step("quantizing", unit.name, done, total)

    def _write_quantized(self, unit: Unit, made: tuple[Unit, Any]) -> None:
        same, tensor = made
        assert same is unit and unit.matrix is not None and unit.assignment is not None
        output = FORMATS.get(self.resolution.plan.output.format)()
        encoded = output.encode(unit.matrix, tensor, unit.assignment.aq)
        if unit.assignment.observer is not None:
            if self.collected is not None:
                found = self.collected.inputs(unit.matrix, unit.assignment)
            else:
                assert self.solved is not None
                found = self.solved.inputs(unit.matrix.name)
            encoded |= output.encode_inputs(unit.matrix, found)
        for info in unit.outputs:
            if info.name in encoded:
                self.writer.write(info, _bytes(encoded[info.name]))

    def _write_plain(self, unit: Unit) -> None:
        replacement = self.solved.replacement(unit.source.name) if self.solved is not None else None
        if replacement is not None:
            self.writer.write(unit.outputs[0], _bytes(_cast(replacement, unit)))
        elif unit.kind == "cast" or unit.source.name in self.reader.changed:
            self.writer.write(unit.outputs[0], _bytes(_cast(self.reader.read(unit.source.name), unit)))
        else:
            self.writer.write_chunks(unit.outputs[0], _chunks(self.reader, unit))

    def _write_cache_scales(self, unit: Unit) -> None:
        cache = self.resolution.kv_cache
        if cache is None or self.solved is None:
            return
        for info in unit.outputs:
            module, _, scale = info.name.rpartition(".")
            if module in cache.modules:
                self.writer.write(info, _bytes(self.solved.inputs(module)[scale]))

    def _account(self) -> None:
        """Every source tensor is quantized, cast or copied, and every planned tensor is written. A gap is a bug."""
        used = {u.source.name for f in self.layout.files for u in f.units}
        lost = self.resolution.checkpoint.tensors.keys() - used
        unwritten = self.layout.tensors.keys() - self.writer.hashes.keys()
        if lost or unwritten:
            name = sorted(lost or unwritten)[0]
            raise fail("QP602", "a tensor is not accounted for", "please report this", tensor=name)


def _share(unit: Unit) -> int:
    """The part of the source a unit accounts for, in bytes."""
    return unit.elements * unit.source.size // max(1, _elements(unit)) if unit.matrix else unit.source.size


def _elements(unit: Unit) -> int:
    return math.prod(unit.source.shape)


def _chunks(reader: TensorReader, unit: Unit) -> Iterator[bytearray]:
    size = unit.source.size
    for start in range(0, size, CHUNK):
        yield reader.read_bytes(unit.source, start, min(CHUNK, size - start))


def _cast(tensor: Tensor, unit: Unit) -> Tensor:
    """The tensor in the output's dtype. Raises QP601 when a number becomes infinite: float16 ends at 65504."""
    import torch

    from quantplan.checkpoint.reader import TORCH_DTYPES

    name = TORCH_DTYPES[unit.outputs[0].dtype]
    cast = tensor.to(getattr(torch, name))
    lost = int(cast.isinf().sum()) - int(tensor.isinf().sum())
    if lost:
        text = f"{lost} of {tensor.numel()} values are too large for {name}"
        raise fail("QP601", text, "choose another output.dtype", file=unit.source.file, tensor=unit.source.name)
    return cast


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _check_unchanged(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """No source file was touched since the run began. Raises QP210: what was read may be half old, half new."""
    changed = sorted(name for name, time in now["times"].items() if begun["times"][name] != time)
    if changed:
        raise fail("QP210", "the file was changed while it was read", "repeat with --restart", file=changed[0])
