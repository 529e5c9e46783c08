"""Commands on plans and headers: validate, explain, diff, estimate, shapes. They never import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli import show
from quantplan.cli.options import AsJson
from quantplan.errors import Problem, QuantplanError, errors_in

if TYPE_CHECKING:
    from quantplan.estimate import Estimate
    from quantplan.plan.resolve import Resolution

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file, JSON or YAML.")]
Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Directory, shapes file, or Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub id.")]
INDEPENDENT = {"QP109", "QP110", "QP111", "QP114", "QP115", "QP212", "QP302"}


def validate(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plan files, JSON or YAML.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Resolve every layer of this model too.")
    ] = None,
    output_format: Annotated[str, typer.Option(help="text, json, github, gitlab, sarif or junit.")] = "text",
    as_json: AsJson = False,
    revision: Revision = None,
) -> int:
    """Check plans: every mistake at once. Ends with 1 when there is an error."""
    from quantplan import __version__
    from quantplan.diagnostics import FORMATS, Checked, emit

    chosen = "json" if as_json else output_format
    if chosen not in FORMATS:
        raise typer.BadParameter(f"'{chosen}' is none of {', '.join(FORMATS)}", param_hint="--output-format")
    checked = [Checked(str(plan), problems_of(plan, model, revision)) for plan in plans]
    print(emit(checked, chosen, __version__).rstrip("\n"))
    return int(any(next(errors_in(c.problems), None) for c in checked))


def problems_of(plan: Path, model: str | None, revision: str | None) -> tuple[Problem, ...]:
    """Everything found in one plan, with a model or without. A bad checkpoint is raised, for it is not the plan's fault."""
    from quantplan.plan.load import in_order, read_plan

    try:
        loaded, problems = read_plan(plan)
    except QuantplanError as error:
        return error.problems
    if model is None:
        return tuple(problems)
    from quantplan.headers import read_checkpoint
    from quantplan.plan.resolve import resolve

    bound = resolve(loaded, read_checkpoint(model, revision)).problems
    # a plan with mistakes is resolved without them: what hangs on a field that was left out is not said
    return tuple(in_order([*problems, *(p for p in bound if not problems or p.code in INDEPENDENT)]))


def explain(
    plan: PlanFile,
    model: Model,
    modules: Annotated[list[str] | None, typer.Argument(metavar="[MODULE]...", help="Names or patterns; all by default.")] = None,
    as_json: AsJson = False,
    revision: Revision = None,
) -> int:
    """Show each module's treatment and the lines that set it.

    With modules or patterns: every field, its value, and the line of the plan (or the rule) that decided.
    """
    import json

    from quantplan.errors import did_you_mean, fail
    from quantplan.explain import chosen, explain_module, summary, totals, transform_text

    resolution = _resolved(plan, model, revision)
    found = chosen(resolution, modules or ())
    if not found:
        raise fail(
            "QP110",
            f"no module matches {', '.join(modules or ())}",
            did_you_mean((modules or [""])[0], resolution.assignments),
        )
    if as_json:
        fields = {a.name: [vars(f) for f in explain_module(resolution, a)] for a in found}
        show.document({
            "modules": [{"module": a.name, "treatment": summary(a), "fields": fields[a.name]} for a in found],
            "totals": [{"treatment": t, "modules": n, "weights": w} for t, n, w in totals(resolution)],
            "transforms": [{"name": t.name, **t.model_dump(mode="json")} for t in resolution.transforms],
            "problems": [p.as_dict() for p in resolution.problems],
        })  # fmt: skip
    elif modules:
        for a in found:
            show.table(
                ("field", "value", "set by"),
                ((f.name, json.dumps(f.value), f.origin) for f in explain_module(resolution, a)),
                a.name,
            )
    else:
        show.table(
            ("module", "treatment", "shape"),
            ((a.name, summary(a), "×".join(map(str, a.module.tensor.shape))) for a in found),
        )
        print()
        show.table(("treatment", "modules", "weights"), ((t, n, f"{w:,}") for t, n, w in totals(resolution)))
        for line in transform_text(resolution):
            print(f"transform {line}")
    return _say(resolution.problems)


def diff(
    before: Annotated[Path, typer.Argument(metavar="PLAN_A", help="Plan file.")],
    after: Annotated[Path, typer.Argument(metavar="PLAN_B", help="Plan file.")],
    model: Model,
    as_json: AsJson = False,
    revision: Revision = None,
) -> int:
    """Compare two plans on a model: modules and bytes."""
    from quantplan import explain as explaining
    from quantplan.headers import read_checkpoint
    from quantplan.plan.load import load_plan
    from quantplan.plan.resolve import resolve

    checkpoint = read_checkpoint(model, revision)
    a, b = (resolve(load_plan(plan), checkpoint).require() for plan in (before, after))
    changes = explaining.diff(a, b)
    delta = sum(c.bytes_after - c.bytes_before for c in changes)
    if as_json:
        transforms = [[{"name": t.name, **t.model_dump(mode="json")} for t in r.transforms] for r in (a, b)]
        show.document({"changes": [vars(c) for c in changes], "transforms": transforms, "bytes": delta})
        return 0
    if changes:
        rows = ((c.module, c.before, c.after, show.size(c.bytes_before), show.size(c.bytes_after)) for c in changes)
        show.table(("module", before.name, after.name, "bytes", "→ bytes"), rows)
        print()
    if a.transforms != b.transforms:  # they reach every module, and no single one's treatment says so
        before_text, after_text = (", ".join(explaining.transform_text(r)) or "none" for r in (a, b))
        print(f"transforms: {before_text} → {after_text}")
    print(f"{len(changes)} of {len(a.assignments)} modules change, {'+' if delta >= 0 else '−'}{show.size(abs(delta))}")
    return 0


def estimate(plan: PlanFile, model: Model, as_json: AsJson = False, revision: Revision = None) -> int:
    """Predict size, bits per weight, memory and time.

    The size is exact: what `apply` writes, to the byte.
    """
    from quantplan import estimate as estimating
    from quantplan.checkpoint.layout import output_layout

    resolution = _resolved(plan, model, revision).require()
    predicted = estimating.estimate(resolution, output_layout(resolution), estimating.cores())
    if as_json:
        show.document(predicted.as_dict())
    else:
        show_estimate(predicted)
    return _say(resolution.notes)


def show_estimate(predicted: Estimate) -> None:
    """The estimate as lines."""
    files = f"{predicted.files} file{'s' * (predicted.files != 1)}"
    rows = [
        ("source", f"{show.size(predicted.source_bytes)}"),
        ("output", f"{show.size(predicted.output_bytes)} ({predicted.output_bytes:,} bytes) in {files}"),
        ("bits per quantized weight", f"{predicted.bits_per_weight:.3f}, scales and zero points counted"),
        ("bits per weight, whole model", f"{predicted.bits_per_weight_whole:.3f}"),
        ("peak memory", f"about {show.size(predicted.peak_memory)}"),
        ("disk", f"{show.size(predicted.output_bytes)} free space while writing"),
        ("time", f"about {predicted.seconds:.0f} s"),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")


def shapes(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; standard output by default.")] = None,
    revision: Revision = None,
) -> int:
    """Write a model's names and shapes as a small file.

    Commit it, and CI validates plans against the model without its weights.
    """
    import json

    from quantplan.headers import read_checkpoint, shapes_document

    document = shapes_document(read_checkpoint(model, revision))
    tensors = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in document.pop("tensors").items())
    text = f'{json.dumps(document, indent=2, ensure_ascii=False)[:-2]},\n  "tensors": {{\n{tensors}\n  }}\n}}\n'
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, "utf-8")
    return 0


def _resolved(plan: Path, model: str, revision: str | None) -> Resolution:
    from quantplan.headers import read_checkpoint
    from quantplan.plan.load import load_plan
    from quantplan.plan.resolve import resolve

    return resolve(load_plan(plan), read_checkpoint(model, revision))


def _say(problems: Sequence[Problem]) -> int:
    """Problems on standard error; 3 when one of them is an error."""
    import sys

    from quantplan.errors import render

    for problem in problems:
        print(render(problem), file=sys.stderr)
    return 3 if next(errors_in(problems), None) else 0
