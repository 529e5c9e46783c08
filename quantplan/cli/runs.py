"""Commands that do the work: apply, calibrate, verify."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli import show
from quantplan.cli.interrupt import Stop, stoppable
from quantplan.cli.options import AsJson, Events, Overwrite, Quiet, Threads, TrustRemoteCode
from quantplan.errors import render

if TYPE_CHECKING:
    from quantplan.engine.apply import Report
    from quantplan.engine.progress import Step
    from quantplan.engine.verify import Verification

RESUME = "what is done is kept: repeat the same command to go on"


@contextmanager
def followed(quiet: bool, events: Path | None) -> Iterator[tuple[Callable[[Step], None], Stop]]:
    """What shows a step and logs it, and whether a signal has come."""
    with stoppable() as stop, show.phases(quiet) as advance, show.event_log(events) as record:

        def tell(step: Step) -> None:
            note = "" if step.block is None else f" ({step.block.summary})"
            advance(step.phase, step.done, step.total, step.name + note)
            record(step.as_event())

        yield tell, stop


def apply(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a checkpoint, or Hub id.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, JSON or YAML.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to make.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Stop after the estimate.")] = False,
    overwrite: Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an interrupted run instead of resuming it.")] = False,
    threads: Threads = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    stats: Annotated[
        Path | None, typer.Option("--stats", metavar="STATS", help="Statistics that `calibrate` collected, instead of data.")
    ] = None,
    events: Events = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write OUT.report.html beside OUT: sizes, errors per layer, the plan and why.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Quantize a checkpoint as a plan says.

    OUT is absent or whole at every moment. An interrupted run goes on when the command is repeated.
    """
    from quantplan.engine import apply as engine

    if report:
        from quantplan.report.charts import require_report

        require_report()  # before the work, not after it
    if dry_run:
        return _dry_run(model, plan, output, threads, revision, stats, as_json)
    with followed(quiet, events) as (tell, stop):

        def on_step(step: Step) -> None:
            tell(step)
            stop.check(RESUME)

        done = engine.apply(
            model,
            plan,
            output,
            overwrite=overwrite,
            restart=restart,
            workers=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
            statistics=stats,
            on_step=on_step,
        )
    page = _write_report(done) if report else None
    if as_json:
        show.document({**done.as_dict(), **({} if page is None else {"report": str(page)})})
    else:
        _show_report(done)
        if page is not None:
            print(f"report: {page}")
    return 0


def _write_report(done: Report) -> Path:
    """The report beside the output, so that the output stays as recorded."""
    from quantplan.report.applied import apply_page
    from quantplan.report.page import write_page

    out = Path(os.path.abspath(done.out))
    path = out.with_name(f"{out.name}.report.html")
    write_page(path, apply_page(out, done.resolution.checkpoint.require_path(), done))
    return path


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a checkpoint, or Hub id.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, JSON or YAML: its calibration settings.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STATS", help="Folder to make.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    events: Events = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Collect statistics of a model once, for any plan.

    `apply --stats STATS` takes them instead of data. STATS is absent or whole at every moment.
    """
    from quantplan.engine import collect as engine

    with followed(quiet, events) as (tell, stop):

        def on_step(step: Step) -> None:
            tell(step)
            stop.check("repeat the same command to start again")

        made = engine.collect(model, plan, output, revision=revision, trust_remote_code=trust_remote_code, on_step=on_step)
    if as_json:
        show.document(made.as_dict())
        return 0
    for note in made.notes:
        print(render(note), file=sys.stderr)
    counted = f"{made.tokens:,} tokens, {made.inputs} inputs of {made.matrices} matrices in {made.blocks} blocks"
    print(f"{made.out}: {counted}, {show.size(made.size)}")
    return 0


def _dry_run(
    model: str, plan: Path, output: Path, threads: int | None, revision: str | None, stats: Path | None, as_json: bool
) -> int:
    from quantplan.checkpoint.layout import output_layout
    from quantplan.cli.plans import show_estimate
    from quantplan.engine.apply import check_environment, check_target, prepare, with_statistics
    from quantplan.estimate import cores, estimate

    resolution = prepare(model, plan, revision)
    if resolution.checkpoint.path is not None:
        check_target(output, resolution.checkpoint.path)
        resolution, _ = with_statistics(resolution, stats)
    predicted = estimate(resolution, output_layout(resolution), threads or cores())
    check_environment(predicted, output)
    if as_json:
        show.document(predicted.as_dict())
    else:
        show_estimate(predicted)
    for note in resolution.notes:
        print(render(note), file=sys.stderr)
    return 0


def _show_report(report: Report) -> None:
    from quantplan.explain import totals

    for note in report.resolution.notes:
        print(render(note), file=sys.stderr)
    source = report.resolution.checkpoint.size
    rows = ((t, n, f"{w:,}") for t, n, w in totals(report.resolution))
    show.table(("treatment", "modules", "weights"), rows)
    again = f", {report.reused_files} files taken over from an interrupted run" if report.reused_files else ""
    print(
        f"\n{report.out}: {show.size(source)} → {show.size(report.written)} "
        f"({report.estimate.bits_per_weight:.3f} bits per quantized weight), "
        f"{report.seconds:.1f} s, peak memory {show.size(report.peak_memory)}{again}"
    )


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that quantplan wrote.")],
    source: Annotated[
        str | None,
        typer.Option("--source", "-s", metavar="MODEL", help="The checkpoint it was made from: errors per layer."),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", "-p", help="The plan it should have been made by.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Check an output: every byte, every tensor, every layer.

    Bytes against the recorded hashes; with --source, every tensor of the source and the error of each layer. Ends with 1 on a
    finding.
    """
    from quantplan.engine import verify as engine

    with show.progress("verifying", quiet) as advance:
        found = engine.verify(out, source, plan, lambda name, done, total: advance(done, total, name))
    if as_json:
        show.document(found.as_dict())
    else:
        _show_verification(found)
    return 0 if found.ok else 1


def _show_verification(found: Verification) -> None:
    for problem in found.problems:
        print(render(problem), file=sys.stderr)
    if found.layers:
        worst = sorted(found.layers, key=lambda layer: layer.snr)
        mean = sum(layer.snr for layer in found.layers) / len(found.layers)
        rows = ((e.name, e.scheme, f"{e.snr:.2f}", f"{e.largest:.6f}") for e in worst[:10])
        show.table(
            ("module", "scheme", "SNR dB", "max error"),
            rows,
            f"{len(worst)} quantized matrices, mean SNR {mean:.2f} dB; the worst:",
        )
        print()
    checked = "record and source" if found.source_checked else "record"
    if found.ok:
        print(f"{found.out}: {found.tensors} tensors, all as {checked} {'say' if found.source_checked else 'says'}")
    else:
        print(f"{found.out}: {len(found.problems)} problem{'s' * (len(found.problems) != 1)}")
