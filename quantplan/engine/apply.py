"""`apply`, read aloud: read the plan, read the headers, resolve, estimate, calibrate where the plan asks for it, stream, account
for every tensor, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantplan.checkpoint.durable import CHUNK
from quantplan.checkpoint.layout import OutputLayout, Unit, output_layout
from quantplan.checkpoint.provenance import NAME, UNKNOWN, fingerprint, other_hashes, provenance
from quantplan.checkpoint.reader import TensorReader, reading
from quantplan.checkpoint.side_files import output_config, side_files
from quantplan.checkpoint.writer import CheckpointWriter, staged_bytes
from quantplan.errors import Problem, QuantplanError, fail, listing
from quantplan.estimate import Estimate, cores, estimate
from quantplan.format import FORMATS
from quantplan.headers import Checkpoint, read_checkpoint
from quantplan.plan.load import LoadedPlan, load_plan
from quantplan.plan.resolve import Resolution, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.calibration.read import CalibrationSet
    from quantplan.engine.calibrated import SolvedBlock
    from quantplan.engine.collected import CollectedStatistics
    from quantplan.engine.solved import Solved, SolvedBlocks


@dataclass(frozen=True)
class Step:
    """Progress. `reading`: calibration data are made, in tokens; `calibrating`: a block is solved; `quantizing`: a unit is
    written, in bytes of the source; `training`: a step of it is done, in thousandths of the budget."""

    phase: Literal["reading", "calibrating", "quantizing", "training"]
    name: str
    done: int
    total: int
    block: SolvedBlock | None = None
    metrics: Mapping[str, Any] | None = None

    def as_event(self) -> dict[str, Any]:
        """Plain data, for a log."""
        event: dict[str, Any] = {"phase": self.phase, "name": self.name, "done": self.done, "total": self.total}
        event |= {} if self.metrics is None else {"metrics": dict(self.metrics)}
        return event if self.block is None else {**event, **self.block.as_event(), "memory_bytes": peak_memory()}


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Report:
    """What a finished run did. Sizes in bytes, time in seconds."""

    out: Path
    resolution: Resolution
    estimate: Estimate
    written: int
    seconds: float
    peak_memory: int
    reused_files: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "out": str(self.out),
            "modules_quantized": len(self.resolution.quantized),
            "modules_kept": len(self.resolution.assignments) - len(self.resolution.quantized),
            "source_bytes": self.resolution.checkpoint.size,
            "predicted_bytes": self.estimate.output_bytes,
            "written_bytes": self.written,
            "bits_per_weight": self.estimate.bits_per_weight,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory,
            "predicted_memory_bytes": self.estimate.peak_memory,
            "reused_files": self.reused_files,
            "notes": [p.as_dict() for p in self.resolution.notes],
        }


def prepare(
    model: str | os.PathLike[str], plan: str | os.PathLike[str] | Mapping[str, Any], revision: str | None = None
) -> Resolution:
    """A plan resolved against a model, or every problem at once. No weights are read, no torch is imported."""
    loaded: LoadedPlan = load_plan(plan)
    return resolve(loaded, read_checkpoint(model, revision)).require()


def apply(  # noqa: PLR0913 - what a command line may say
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    restart: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    statistics: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Report:
    """Quantizes `model` as `plan` says into the directory `out`, which is absent or whole at every moment.

    `statistics`: a folder that `collect` made, instead of calibration.

    `trust_remote_code`: calibration may run Python code that the checkpoint brings.

    Raises QuantplanError: bad plan or checkpoint (QP1xx to QP3xx), environment (QP4xx), output exists or is locked (QP5xx),
    NaN or infinity (QP601). An interrupted run goes on when called again.
    """
    started = time.monotonic()
    tell: OnStep = on_step or (lambda step: None)
    workers = workers or cores()
    resolution = prepare(model, plan, revision)
    source = with_weights(resolution.checkpoint)
    for transform in resolution.transforms:
        source = transform.stored(source)
    resolution = replace(resolution, checkpoint=source)
    resolution, collected = _with_statistics(resolution, statistics)
    target = Path(out)
    check_target(target, source.require_path())
    with reading(source.source):
        layout = output_layout(resolution)
        predicted = estimate(resolution, layout, workers)
        copied = side_files(source)
        begun = fingerprint(resolution, layout)
    check_environment(predicted, target)
    data = _calibration_data(resolution, trust_remote_code, tell) if collected is None else None
    if collected is not None:
        begun = {**begun, "calibration": collected.sha256}
    if data is not None:
        resolution = replace(resolution, problems=(*resolution.problems, *map(resolution.loaded.locate, data.notes)))
        begun = {**begun, "calibration": data.hash}
    with (
        reading_rewritten(resolution, trust_remote_code) as reader,  # refuses models before anything is written
        CheckpointWriter(target, layout, begun, overwrite, restart) as writer,
    ):
        reused = writer.reused
        if not writer.already_published:
            solved = None
            if data is not None:
                from quantplan.engine.solved import SolvedBlocks

                solved = SolvedBlocks(writer.staging / "calibration")
                _solve(resolution, data, reader, writer, solved, workers, trust_remote_code, tell)
                resolution = replace(resolution, problems=(*resolution.problems, *unseen_experts(solved.unseen)))
            sha256 = data.hash if data is not None else collected.data if collected is not None else UNKNOWN
            write_output(resolution, layout, reader, writer, begun, copied, workers, solved, collected, sha256, tell=tell)
    written = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return Report(target, resolution, predicted, written, time.monotonic() - started, peak_memory(), reused)


def write_output(  # noqa: PLR0913 - all that an output is made of
    resolution: Resolution,
    layout: OutputLayout,
    reader: TensorReader,
    writer: CheckpointWriter,
    begun: Mapping[str, Any],
    copied: Mapping[str, Path],
    workers: int,
    solved: Solved | None,
    collected: CollectedStatistics | None = None,
    sha256: str = UNKNOWN,
    *,
    training: Mapping[str, Any] | None = None,
    tell: OnStep,
) -> None:
    """Writes every tensor, accounts for all of them, and publishes the directory. `begun`: the source's fingerprint, which must
    still hold; `copied`: side files; `sha256`: of calibration data; `training`: what the record says of it."""
    source = resolution.checkpoint
    with contextlib.closing(write_units(resolution, layout, reader, writer, workers, solved, collected)) as steps:
        for step in steps:
            tell(step)
    changed = reader.changed | (solved.changed if solved is not None else frozenset())
    account(resolution, layout, writer)
    config = {"config.json": output_config(resolution)}  # the last to be written: without it nothing loads
    documents = layout.side_documents()
    with reading(source.source):
        check_unchanged(begun, fingerprint(resolution, layout))
        others = other_hashes({**documents, **config}, copied)
    record = {NAME: provenance(resolution, layout, writer.hashes, others, workers, sha256, changed, training)}
    writer.publish(copied, {**documents, **record, **config})


@contextlib.contextmanager
def reading_rewritten(resolution: Resolution, trust_remote_code: bool = False) -> Iterator[TensorReader]:
    """The source's tensors, as the plan's transforms rewrite them. Raises QP222 to QP226 where these do not fit the model."""
    checkpoint = resolution.checkpoint
    with TensorReader(checkpoint.require_path(), checkpoint.tensors) as plain:
        if not any(t.rewrites for t in resolution.transforms):
            yield plain
            return
        from quantplan.engine.rewriting import rewritten

        yield rewritten(resolution, plain, trust_remote_code)


def _with_statistics(
    resolution: Resolution, statistics: str | os.PathLike[str] | None
) -> tuple[Resolution, CollectedStatistics | None]:
    """Statistics collected before, where the plan has a use for any, and the resolution with their settings and notes."""
    if statistics is None or not resolution.takes_data:
        return resolution, None
    from quantplan.engine.collected import CollectedStatistics

    collected = CollectedStatistics(statistics)
    known = [p for p in resolution.problems if p.code not in ("QP134", "QP237")]  # no data are read
    problems = (*known, *unseen_experts(collected.check(resolution)))
    return replace(resolution, problems=problems, collected=collected.settings), collected


def _solve(
    resolution: Resolution,
    data: CalibrationSet,
    reader: TensorReader,
    writer: CheckpointWriter,
    solved: SolvedBlocks,
    threads: int,
    trust_remote_code: bool,
    tell: OnStep,
) -> None:
    import torch

    from quantplan.engine.calibrated import solve_blocks

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with contextlib.closing(solve_blocks(resolution, data, reader, solved, trust_remote_code)) as blocks:
            for block in blocks:
                tell(Step("calibrating", block.name, block.number, block.total, block))
    except QuantplanError:
        if not solved.done and not writer.reused:  # the model was refused: another plan need not say --restart
            writer.forget()
        raise
    finally:
        torch.set_num_threads(before)


def unseen_experts(names: Sequence[str]) -> list[Problem]:
    """A note on the experts that no token of the data came to."""
    if not names:
        return []
    text = f"no token came to some experts, which were rounded without data, in {listing(names)}"
    return [Problem("QP605", text, "give more data, or say calibration: {all_experts: true}", severity="note")]


def _calibration_data(resolution: Resolution, trust_remote_code: bool, tell: OnStep) -> CalibrationSet | None:
    """The plan's calibration data where an assignment needs any: read, packed, or written by the model itself."""
    if not resolution.takes_data:
        return None
    from quantplan.calibration.read import read_calibration

    settings, loaded = resolution.calibration, resolution.loaded
    try:
        return read_calibration(
            settings,
            resolution.checkpoint.require_path(),
            Path(loaded.source.file).parent,
            on_step=lambda done, total: tell(Step("reading", settings.source, done, total)),
            trust_remote_code=trust_remote_code,
        )
    except QuantplanError as error:
        raise QuantplanError(loaded.locate(p) for p in error.problems) from None


def with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint on local disk: itself, or a snapshot fetched from the Hub, of the commit whose headers were read."""
    if checkpoint.path is not None or not checkpoint.revision:
        checkpoint.require_path()
        return checkpoint
    from quantplan.hub import fetch

    path, commit = fetch(checkpoint.source, checkpoint.revision)
    return replace(read_checkpoint(path), source=checkpoint.source, revision=commit)


def write_units(
    resolution: Resolution,
    layout: OutputLayout,
    reader: TensorReader,
    writer: CheckpointWriter,
    workers: int,
    solved: Solved | None = None,
    collected: CollectedStatistics | None = None,
) -> Generator[Step, None, None]:
    """Writes every unit of files that are not done yet, yielding after each."""
    from quantplan.engine.stream import quantized

    output = FORMATS.get(resolution.plan.output.format)()
    todo = [u for f in layout.files if not writer.is_done(f.name) for u in f.units]
    total = sum(_share(u) for f in layout.files for u in f.units)
    done = total - sum(_share(u) for u in todo)
    cached = frozenset(resolution.kv_cache.modules if resolution.kv_cache is not None else ())
    stream = quantized([u for u in todo if u.kind == "quantize"], reader, workers, solved, collected)
    try:
        for unit in todo:
            if unit.kind == "quantize":
                same, tensor = next(stream)
                assert same is unit and unit.matrix is not None and unit.assignment is not None
                encoded = output.encode(unit.matrix, tensor, unit.assignment.aq)
                if solved is not None and unit.assignment.observer is not None:
                    encoded |= output.encode_inputs(unit.matrix, solved.inputs(unit.matrix.name))
                for info in unit.outputs:
                    if info.name in encoded:
                        writer.write(info, _bytes(encoded[info.name]))
            elif (replacement := solved.replacement(unit.source.name) if solved is not None else None) is not None:
                writer.write(unit.outputs[0], _bytes(_cast(replacement, unit)))
            elif unit.kind == "cast" or unit.source.name in reader.changed:
                writer.write(unit.outputs[0], _bytes(_cast(reader.read(unit.source.name), unit)))
            else:
                writer.write_chunks(unit.outputs[0], _chunks(reader, unit))
            for info in unit.outputs:
                module, _, scale = info.name.rpartition(".")
                if module in cached and solved is not None:
                    writer.write(info, _bytes(solved.inputs(module)[scale]))
            done += _share(unit)
            yield Step("quantizing", unit.name, done, total)
    finally:
        stream.close()


def _share(unit: Unit) -> int:
    """The part of the source a unit accounts for, in bytes."""
    return unit.elements * unit.source.size // max(1, _elements(unit)) if unit.matrix else unit.source.size


def _elements(unit: Unit) -> int:
    import math

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


def account(resolution: Resolution, layout: OutputLayout, writer: CheckpointWriter) -> None:
    """Every source tensor is quantized, cast or copied, and every planned tensor is written. A gap is a bug: it stops the run."""
    used = {u.source.name for f in layout.files for u in f.units}
    lost = resolution.checkpoint.tensors.keys() - used
    unwritten = layout.tensors.keys() - writer.hashes.keys()
    if lost or unwritten:
        name = sorted(lost or unwritten)[0]
        raise fail("QP602", "a tensor is not accounted for", "please report this", tensor=name)


def check_unchanged(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """No source file was touched since the run began. Raises QP210: what was read may be half old, half new."""
    changed = sorted(name for name, time in now["times"].items() if begun["times"][name] != time)
    if changed:
        raise fail("QP210", "the file was changed while it was read", "repeat with --restart", file=changed[0])


def check_target(out: Path, model: Path) -> None:
    """The output is not the model, nor inside it, nor around it. Raises QP503."""
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(model))
    if target == source or source in target.parents or target in source.parents:
        raise fail("QP503", f"the output and the model {model} lie in one another", "choose another output", file=str(out))


def check_environment(predicted: Estimate, out: Path) -> None:
    """Enough disk and memory for what is predicted, less what an interrupted run wrote. Raises QP401, QP404 before anything is
    written."""
    import psutil

    parent = next(p for p in (Path(os.path.abspath(out)).parent, *Path(os.path.abspath(out)).parents) if p.is_dir())
    free = shutil.disk_usage(parent).free + staged_bytes(Path(os.path.abspath(out)))
    if predicted.output_bytes > free:
        text = f"the output needs {predicted.output_bytes:,} bytes, {free:,} are free"
        raise fail("QP401", text, "free space, or choose another output", file=str(parent))
    available = psutil.virtual_memory().available
    if predicted.peak_memory > available:
        text = f"needs about {predicted.peak_memory:,} bytes of memory, {available:,} are available"
        raise fail("QP404", text, "use fewer --threads or calibration samples, or a larger machine")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; on Linux without that of the process that started it, which
    `getrusage` counts in."""
    import resource

    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
