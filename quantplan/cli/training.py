"""The command that trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplan.cli import show
from quantplan.cli.options import AsJson, Events, Overwrite, Quiet, Threads, TrustRemoteCode
from quantplan.cli.runs import RESUME, followed
from quantplan.errors import render

if TYPE_CHECKING:
    from quantplan.engine.progress import Step


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a checkpoint, or Hub id: the teacher.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, JSON or YAML.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to make.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="DATA", help="What to train on; by default the plan's calibration.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--start", metavar="START", help="An output of `apply` by this plan, instead of making one.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="scales, weights, lsq, standard or progressive; scales by default.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in time.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget in passes over the data; 1 where there is no budget.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="A share of what is trained.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences computed at once; 4 by default.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="More options of training, JSON or YAML.")
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", help="Where metrics go: tensorboard, wandb, mlflow, ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted training.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an interrupted training.")] = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    events: Events = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Quantize a checkpoint and train it to predict what the float model predicts.

    OUT is as `apply` writes it, and never worse than what `apply` makes, judged by sequences held out of the data. On several
    GPUs or machines: torchrun -m quantplan train ..., or accelerate launch -m quantplan train ...
    """
    from quantplan.training import train as training
    from quantplan.training.settings import training_settings

    given: dict[str, Any] = {
        "recipe": recipe,
        "minutes": minutes,
        "steps": steps,
        "epochs": epochs,
        "learning_rate": learning_rate,
    }
    given |= {"batch_size": batch_size, "report_to": report_to or None}
    settings = training_settings({name: value for name, value in given.items() if value is not None}, config)
    first = os.environ.get("RANK", "0") == "0"
    with followed(quiet or not first, events if first else None) as (tell, stop):

        def on_step(step: Step) -> None:
            tell(step)
            if step.phase != "training":  # there, a step ends with a checkpoint
                stop.check(RESUME)

        done = training.train(
            model,
            plan,
            output,
            settings,
            start=start,
            data=data,
            overwrite=overwrite,
            resume=resume,
            restart=restart,
            threads=threads,
            trust_remote_code=trust_remote_code,
            stopped=lambda: stop.number is not None,
            on_step=on_step,
        )
        if done is None:
            stop.check("a checkpoint is kept: repeat the command with --resume to go on")
            return 0
    if as_json:
        show.document(done.as_dict())
        return 0
    for note in done.notes:
        print(render(note), file=sys.stderr)
    show.table(("step", "held-out KL"), ((int(step), f"{kl:.4f}") for step, kl in done.history))
    kept = f"of step {done.best_step}" if done.best_step else "of the start, which no snapshot beat"
    print(
        f"\n{done.out}: held-out KL {done.kl_start:.4f} → {done.kl:.4f} ({kept}), {done.steps} steps, "
        f"{show.size(done.written)}, {done.seconds:.1f} s, peak memory {show.size(done.peak_memory)}"
    )
    return 0
