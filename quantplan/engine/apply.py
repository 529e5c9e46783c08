"""`apply`, read aloud: read the plan, read the headers, resolve, estimate, calibrate where the plan asks for it, stream, account
for every tensor, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint.layout import output_layout
from quantplan.checkpoint.provenance import UNKNOWN, fingerprint
from quantplan.checkpoint.reader import TensorReader, reading
from quantplan.checkpoint.side_files import side_files
from quantplan.checkpoint.writer import CheckpointWriter, staged_bytes
from quantplan.engine.output import Output
from quantplan.engine.progress import OnStep, Step, peak_memory
from quantplan.errors import Problem, QuantplanError, fail, listing
from quantplan.estimate import Estimate, cores, estimate
from quantplan.headers import Checkpoint, read_checkpoint
from quantplan.plan.load import LoadedPlan, load_plan
from quantplan.plan.resolve import Resolution, resolve

if TYPE_CHECKING:
    from quantplan.calibration.read import CalibrationSet
    from quantplan.engine.calibrated import Run
    from quantplan.engine.collected import CollectedStatistics
    from quantplan.engine.solved import SolvedBlocks


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
    resolution, collected = with_statistics(resolution, statistics)
    target = Path(out)
    check_target(target, source.require_path())
    with reading(source.source):
        layout = output_layout(resolution)
        predicted = estimate(resolution, layout, workers)
        copied = side_files(source)
        begun = fingerprint(resolution, layout)
    check_environment(predicted, target)
    if collected is not None:
        begun = {**begun, "calibration": collected.sha256}
    with contextlib.ExitStack() as stack:
        # refuses models before data are read, which may take long, or anything is written
        reader = stack.enter_context(reading_rewritten(resolution, trust_remote_code))
        run = data = None
        if resolution.takes_data and collected is None:
            run = _run(resolution, reader, workers, trust_remote_code)
            data = _calibration_data(resolution, trust_remote_code, tell)
            resolution = replace(resolution, problems=(*resolution.problems, *map(resolution.loaded.locate, data.notes)))
            begun = {**begun, "calibration": data.hash}
        writer = stack.enter_context(CheckpointWriter(target, layout, begun, overwrite, restart))
        reused = writer.reused
        if not writer.already_published:
            solved = None
            if run is not None and data is not None:
                from quantplan.engine.solved import SolvedBlocks

                solved = SolvedBlocks(writer.staging / "calibration")
                _solve(run, data, writer, solved, workers, tell)
                notes = [*unseen_experts(solved.named("unseen")), *unfollowed_tokens(solved.named("unfollowed"))]
                notes += _untuned(solved.named("untuned"))
                resolution = replace(resolution, problems=(*resolution.problems, *notes))
            sha256 = data.hash if data is not None else collected.data if collected is not None else UNKNOWN
            Output(resolution, layout, reader, writer, workers, solved, collected).write(begun, copied, sha256, tell=tell)
    written = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return Report(target, resolution, predicted, written, time.monotonic() - started, peak_memory(), reused)


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


def with_statistics(
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


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """While it is open, torch computes with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(resolution: Resolution, reader: TensorReader, threads: int, trust_remote_code: bool) -> Run:
    """The calibration, ready for data. Raises QP222 to QP226 where the model, or a transform, does not fit."""
    from quantplan.engine.calibrated import Run

    with _threads(threads):
        return Run(resolution, reader, trust_remote_code)


def _solve(run: Run, data: CalibrationSet, writer: CheckpointWriter, solved: SolvedBlocks, threads: int, tell: OnStep) -> None:
    from quantplan.engine.calibrated import solve_blocks

    try:
        with _threads(threads), contextlib.closing(solve_blocks(run, data, solved)) as blocks:
            for block in blocks:
                tell(Step("calibrating", block.name, block.number, block.total, block))
    except QuantplanError:
        if not solved.done and not writer.reused:  # the model was refused: another plan need not say --restart
            writer.forget()
        raise


def unseen_experts(names: Sequence[str]) -> list[Problem]:
    """A note on the experts that no token of the data came to."""
    if not names:
        return []
    text = f"no token came to some experts, which were rounded without data, in {listing(names)}"
    return [Problem("QP605", text, "give more data, or say calibration: {all_experts: true}", severity="note")]


def unfollowed_tokens(names: Sequence[str]) -> list[Problem]:
    """A note on matrices whose statistics padding and skipped tokens are in."""
    if not names:
        return []
    text = f"which tokens are given to them is not known, so that padding and skipped tokens count, in {listing(names)}"
    return [Problem("QP238", text, "use data whose sequences are all full, without skip_tokens", severity="note")]


def _untuned(names: Sequence[str]) -> list[Problem]:
    """A note on parts of fused parameters whose algorithm tunes whole ones."""
    if not names:
        return []
    text = f"parts of fused parameters are not tuned, and stay as the algorithm starts with them, in {listing(names)}"
    return [Problem("QP239", text, "name the algorithm they start with in an override, such as gptq", severity="note")]


def _calibration_data(resolution: Resolution, trust_remote_code: bool, tell: OnStep) -> CalibrationSet:
    """The plan's calibration data: read, packed, or written by the model itself."""
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


def check_target(out: Path, model: Path) -> None:
    """The output is not the model, nor inside it, nor around it. Raises QP503."""
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(model))
    if target == source or source in target.parents or target in source.parents:
        raise fail("QP503", f"the output and the model {model} lie in one another", "choose another output", file=str(out))


def check_environment(predicted: Estimate, out: Path) -> None:
    """Enough disk and memory for what is predicted. Raises QP401, QP404 before anything is written."""
    check_room(predicted.output_bytes, predicted.peak_memory, out)


def check_room(output_bytes: int, peak_memory: int, out: Path) -> None:
    """So many bytes are free in memory, and on the disk of `out` with what an interrupted run left. Raises QP401, QP404."""
    import psutil

    parent = next(p for p in (Path(os.path.abspath(out)).parent, *Path(os.path.abspath(out)).parents) if p.is_dir())
    free = shutil.disk_usage(parent).free + staged_bytes(Path(os.path.abspath(out)))
    if output_bytes > free:
        text = f"the output needs {output_bytes:,} bytes, {free:,} are free"
        raise fail("QP401", text, "free space, or choose another output", file=str(parent))
    available = psutil.virtual_memory().available
    if peak_memory > available:
        text = f"needs about {peak_memory:,} bytes of memory, {available:,} are available"
        raise fail("QP404", text, "use fewer --threads or calibration samples, or a larger machine")
