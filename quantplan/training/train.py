"""`train`, read aloud: make the plan's output, or take one; make of it a model that learns; train it beside the float model;
write its best state as `apply` writes outputs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint import durable
from quantplan.checkpoint.layout import OutputLayout, json_bytes, output_layout
from quantplan.checkpoint.provenance import NAME, UNKNOWN, fingerprint
from quantplan.checkpoint.reader import TensorReader
from quantplan.checkpoint.side_files import side_files
from quantplan.checkpoint.writer import CheckpointWriter
from quantplan.engine.apply import apply, check_target, prepare, with_weights
from quantplan.engine.output import Output
from quantplan.engine.progress import OnStep, Step, peak_memory
from quantplan.engine.verify import check_record, check_source, read_record
from quantplan.errors import Place, Problem, QuantplanError, errors_in, fail
from quantplan.estimate import cores
from quantplan.headers import read_checkpoint
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution
from quantplan.plan.schema import SELF, Calibration
from quantplan.training.settings import Training

if TYPE_CHECKING:
    from quantplan.calibration.read import CalibrationSet
    from quantplan.training.student import Student
    from quantplan.training.trainer import Distiller, Snapshots

RUN, START, BEST = "run.json", "start", "best.safetensors"
PARTS = 1000  # of the budget, as progress counts it


@dataclass(frozen=True)
class TrainReport:
    """What a finished training did. KL in nats per token, on the sequences held out; time in seconds; sizes in bytes.

    `best_step`: the snapshot that was written; 0: the start itself, which nothing beat. `history`: step and KL of each."""

    out: Path
    kl_start: float
    kl: float
    best_step: int
    steps: int
    history: Sequence[Sequence[float]]
    written: int
    seconds: float
    peak_memory: int
    notes: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`; JSON has no infinity, so a KL that is not finite is null."""
        return {
            "out": str(self.out),
            "kl_start": self.kl_start,
            "kl": self.kl,
            "best_step": self.best_step,
            "steps": self.steps,
            "history": [{"step": int(s), "kl": k if abs(k) < float("inf") else None} for s, k in self.history],
            "written_bytes": self.written,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory,
            "notes": [p.as_dict() for p in self.notes],
        }


def train(  # noqa: PLR0913 - what a command line may say
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    settings: Training | None = None,
    *,
    start: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    on_step: OnStep | None = None,
) -> TrainReport | None:
    """Quantizes `model` as `plan` says, trains what came of it, and writes its best state to `out`, as `apply` would have.

    `start`: an output that `apply` made by this plan, instead of making one. `data`: what to train on, as a plan's `calibration:
    source`; by default the plan's own. `out` is never worse than the start: snapshots are judged on sequences held out, and the
    start is one of them. Beside `out` stands `OUT.training` with a checkpoint while it goes on; `resume` takes it up, `restart`
    discards it. Under `torchrun` or `accelerate launch`, every process calls this; the first one writes.

    Returns None where `stopped` ended it, with a checkpoint, and in processes other than the first. Raises QuantplanError as
    `apply`, and: QP405 without accelerate or what `report_to` names, QP502 for an interrupted training, QP804 for a `start` of
    another plan or source, QP230 for too little data.
    """
    begun, tell = time.monotonic(), on_step or (lambda step: None)
    settings, target = settings or Training(), Path(os.path.abspath(out))
    require_training(settings)
    resolution = prepare(model, plan)
    source = with_weights(resolution.checkpoint)
    resolution = replace(resolution, checkpoint=source)
    check_target(target, source.require_path())
    if start is not None:
        check_start(Path(start), resolution)
    found = read_data(resolution, settings, data, trust_remote_code, tell)
    folder = target.with_name(f"{target.name}.training")

    import torch

    from quantplan.training.trainer import arguments

    torch.set_num_threads(threads or cores())
    args = arguments(settings, folder, len(found.input_ids))
    first = args.process_index == 0
    for transform in resolution.transforms:
        source = transform.stored(source)
    layout = output_layout(replace(resolution, checkpoint=source))
    run = {**fingerprint(resolution, layout), "training": settings.model_dump(mode="json"), "data": found.hash}
    run["start"] = _hash(Path(start)) if start is not None else ""
    with CheckpointWriter(target, layout, run, overwrite, restart=True) if first else contextlib.nullcontext() as writer:
        with args.main_process_first(local=False):
            if first:
                _open(folder, run, resume, restart)
            if start is None:
                start = folder / START
                if first and not start.exists():
                    apply(model, plan, start, workers=threads, trust_remote_code=trust_remote_code, on_step=tell)
        from quantplan.training.trained import Started, TrainedTensors

        resolution = replace(resolution, checkpoint=source)
        with TensorReader(Path(start), read_checkpoint(start).tensors) as reader:
            begin = Started(resolution, reader)
            trainer, student, snapshots = _trainer(
                resolution, begin, settings, found, args, folder, stopped, tell, trust_remote_code
            )
            if not _run(trainer, snapshots, folder, begin, settings, tell) or not first:
                return None
            assert writer is not None
            layers, floats = {}, {}
            if snapshots.step:
                from safetensors.torch import load_file

                student.load_state(load_file(folder / BEST))
                layers, floats = dict(student.layers), {n: p for n, (p, _) in student.floats.items()}
            _write(resolution, layout, run, writer, TrainedTensors(begin, layers, floats), read_record(Path(start)), {
                "settings": settings.model_dump(mode="json"),
                "data": {"source": found.source, "sha256": found.hash},
                "steps": trainer.state.global_step,
                "processes": args.world_size,
                "kl": {"start": snapshots.start, "best": snapshots.best, "step": snapshots.step},
            }, threads or cores(), tell)  # fmt: skip
    _tidy(folder, bool(settings.report_to))
    written = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    notes = (*resolution.notes, *(p for p in found.notes))
    return TrainReport(
        Path(out), snapshots.start, snapshots.best, snapshots.step, trainer.state.global_step, snapshots.history, written,
        time.monotonic() - begun, peak_memory(), notes,
    )  # fmt: skip


def require_training(settings: Training) -> None:
    """Raises QP405 where a package is missing, QP107 for an integration that transformers does not know."""
    if importlib.util.find_spec("accelerate") is None:
        raise fail("QP405", "training takes the package accelerate", "pip install 'quantplan[train]'")
    if not settings.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in settings.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise fail("QP107", f"no integration is called '{name}'", f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in get_available_reporting_integrations():
            raise fail("QP405", f"metrics for {name} take a package that is not installed", f"pip install {name}")


def check_start(start: Path, resolution: Resolution) -> None:
    """Raises QP804 for an output of another plan or source, QP220 for what is none, QP801 to QP803 where it is damaged."""
    record = read_record(start)
    problems = list(check_record(record, read_checkpoint(start)))
    if load_plan(record["plan"]).canonical() != resolution.loaded.canonical():
        place = Place(str(start))
        problems.append(
            Problem("QP804", "the start was made by another plan", "give the plan in its quantplan.json", place=place)
        )
    problems += check_source(record, resolution.checkpoint)
    if any(errors_in(problems)):
        raise QuantplanError(problems)


def read_data(
    resolution: Resolution, settings: Training, data: str | os.PathLike[str] | None, trust_remote_code: bool, tell: OnStep
) -> CalibrationSet:
    """The sequences to train on and to hold out, all of one length. Raises as `read_calibration`, and QP230 for too few."""
    from quantplan.calibration.read import read_calibration

    changes: dict[str, Any] = {"samples": settings.samples}
    if settings.sequence_length is not None:
        changes["sequence_length"] = settings.sequence_length
    base = Path(resolution.loaded.source.file).parent
    if data is not None:
        path = Path(data).expanduser()
        changes["source"], base = str(path.absolute() if path.exists() else data), Path()
    wanted: Calibration = resolution.calibration.model_copy(update=changes)
    found = read_calibration(
        wanted,
        resolution.checkpoint.require_path(),
        base,
        on_step=lambda done, total: tell(Step("reading", SELF, done, total)),
        trust_remote_code=trust_remote_code,
    )
    whole = int((found.lengths == found.length).sum())
    if whole <= settings.held_out:
        text = f"holds {whole} whole sequences of {found.length:,} tokens, and {settings.held_out} are held out"
        raise fail("QP230", text, "give more data, shorter sequences, or hold out fewer", file=found.source)
    full = found.lengths == found.length  # means over batches are means over tokens then
    return replace(found, input_ids=found.input_ids[full], mask=found.mask[full], lengths=found.lengths[full])


def _open(folder: Path, run: Mapping[str, Any], resume: bool, restart: bool) -> None:
    """The folder of this training: a new one, or that of an interrupted one. Raises QP502."""
    path, text = folder / RUN, json_bytes(json.loads(json.dumps(run)))
    other = path.exists() and path.read_bytes() != text
    begun = any(folder.glob("checkpoint-*"))
    if (restart and not resume) or (other and not begun):
        durable.remove(folder)
    elif begun and not resume:
        advice = "go on with --resume, or begin anew with --restart"
        raise fail("QP502", "an interrupted training of this output is there", advice, file=str(folder))
    elif other:
        text_of = "the interrupted training had another plan, source, data or settings"
        raise fail("QP502", text_of, "repeat its command, or begin anew with --restart", file=str(folder))
    with durable.named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_durably(path, text)


def _trainer(
    resolution: Resolution,
    start: Any,
    settings: Training,
    data: CalibrationSet,
    args: Any,
    folder: Path,
    stopped: Callable[[], bool],
    tell: OnStep,
    trust_remote_code: bool,
) -> tuple[Distiller, Student, Snapshots]:
    import transformers

    from quantplan.training.student import float_model, student_of
    from quantplan.training.trainer import Budget, Distiller, Snapshots, Telling

    transformers.utils.logging.disable_progress_bar()
    teacher = float_model(resolution.checkpoint.require_path(), trust_remote_code)
    student = student_of(resolution, start, teacher, settings, trust_remote_code)
    rows = list(data.input_ids)
    learnt, held = rows[: -settings.held_out], rows[-settings.held_out :]
    batch = settings.batch_size * args.world_size
    if len(learnt) < batch:
        text = f"holds {len(learnt)} sequences to train on, and a batch is {batch}"
        raise fail("QP230", text, "give more data, or a smaller batch_size", file=data.source)
    budget = Budget(settings, max(1, len(learnt) // (batch * settings.gradient_accumulation)))
    args.max_steps = budget.steps
    snapshots = Snapshots(student, folder / BEST)

    def told(share: float, logs: Mapping[str, Any]) -> None:
        known = {n: logs[n] for n in ("loss", "eval_loss") if n in logs}
        said = ", ".join(
            [f"step {logs['step']}", *(f"{n.replace('eval_loss', 'held-out KL')} {v:.4f}" for n, v in known.items())]
        )
        tell(Step("training", said, int(share * PARTS), PARTS, metrics=logs))

    callbacks = [budget, snapshots, Telling(budget, told, stopped)]
    trainer = Distiller(
        student, teacher, settings, budget, args=args, train_dataset=learnt, eval_dataset=held, callbacks=callbacks
    )
    return trainer, student, snapshots


def _run(trainer: Distiller, snapshots: Snapshots, folder: Path, start: Any, settings: Training, tell: OnStep) -> bool:
    """Trains; whether it came to its end, be it that weights are no numbers any more."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is None:
        model = trainer.student.model
        if settings.from_float:  # what is trained is not yet the start
            from quantplan.hf.load import load

            model = load(start.reader.folder, dtype=torch.float32).to(trainer.args.device)
        snapshots.begin(trainer.judge(model.eval()))
        tell(Step("training", f"held-out KL {snapshots.start:.4f}", 0, PARTS, metrics={"step": 0, "eval_loss": snapshots.start}))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except QuantplanError as error:
        if error.problems[0].code != "QP601":  # NaN: training diverged, and what is best is known
            raise
        return True
    return trainer.budget.share(trainer.state.global_step) >= 1


def _write(
    resolution: Resolution,
    layout: OutputLayout,
    run: Mapping[str, Any],
    writer: CheckpointWriter,
    tensors: Any,
    record: Mapping[str, Any],
    training: Mapping[str, Any],
    threads: int,
    tell: OnStep,
) -> None:
    checkpoint, calibration = resolution.checkpoint, record.get("calibration") or {}
    with TensorReader(checkpoint.require_path(), checkpoint.tensors) as reader:
        output = Output(resolution, layout, reader, writer, calibration.get("threads", threads), tensors)
        output.write(run, side_files(checkpoint), calibration.get("sha256", UNKNOWN), training, tell=tell)


def _tidy(folder: Path, logged: bool) -> None:
    """Removes what only the training needed; logs stay."""
    if not logged:
        durable.remove(folder)
        return
    for path in folder.iterdir():
        if path.name in (RUN, START, BEST) or path.name.startswith("checkpoint-"):
            durable.remove(path)


def _hash(start: Path) -> str:
    return durable.hash_file(start / NAME)
