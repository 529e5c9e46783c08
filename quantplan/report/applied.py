"""The report of an `apply`: what the plan decided and why, what it saved, and what it cost in each layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint.durable import hash_file
from quantplan.checkpoint.provenance import NAME as RECORD
from quantplan.engine.verify import read_record
from quantplan.errors import render, size
from quantplan.explain import explain_module, summary, transform_text
from quantplan.headers import read_checkpoint
from quantplan.inspection.inspect import Inspection, inspect_checkpoint
from quantplan.inspection.layers import LayerInspection
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution, resolve
from quantplan.report.charts import Bar, bar_chart, grid_chart
from quantplan.report.charts import Cell as GridCell
from quantplan.report.layers import drawings, layer_table
from quantplan.report.machine import machine
from quantplan.report.page import (
    Cell,
    Column,
    Drawing,
    Facts,
    Figure,
    Heading,
    Listing,
    Section,
    Table,
    Text,
    number,
    render_page,
    rounded,
    signed,
)
from quantplan.report.sizes import TreatmentSize, treatment_sizes

if TYPE_CHECKING:
    from quantplan.engine.apply import Report

MODULES = 3  # examples of each treatment whose names are said


def apply_page(
    out_dir: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, report: Report | None = None
) -> str:
    """The report of the output `out_dir` as one HTML file. `source`, the checkpoint it was made from: with it, sizes before,
    the origin of each field, and the error of each layer, computed as `verify` does. `report`: of the run that made it; its
    time and memory, and places in the plan's own file.

    Raises QP220 (not an output of quantplan), QP405 (jinja2 or matplotlib is missing), and what reading either may.
    """
    out = Path(out_dir)
    record = read_record(out)
    resolution = _resolution(record, source, report)
    inspection = inspect_checkpoint(out, source)
    sizes = None if resolution is None else treatment_sizes(resolution)
    quantized = [layer for layer in inspection.layers if layer.quantized]
    name = record["source"]["name"]
    plan_file = Path(report.resolution.loaded.source.file).name if report is not None else ""
    by = f" by {plan_file}" if plan_file else ""
    return render_page(
        title=f"{out.resolve().name}",
        subtitle=f"Quantized from {name}{by} as {record['format']}, with quantplan {record['versions']['quantplan']}.",
        figures=list(_figures(out, sizes, quantized)),
        sections=[
            Section("Size", list(_size_parts(sizes))),
            Section("Treatments", list(_treatment_parts(record, sizes, inspection))),
            Section("Layers", list(_layer_parts(inspection))),
            Section("Static activations", list(_input_parts(quantized))),
            Section("Plan", list(_plan_parts(resolution, record, report))),
            Section("Run", list(_run_parts(out, record, report))),
        ],
        footer=f"Every byte of the weights can be checked: quantplan verify {out.name} --source {name}",
    )


def _resolution(record: Mapping[str, Any], source: Any, report: Report | None) -> Resolution | None:
    if report is not None:
        return report.resolution
    return None if source is None else resolve(load_plan(record["plan"]), read_checkpoint(source)).require()


def _figures(out: Path, sizes: Sequence[TreatmentSize] | None, quantized: Sequence[LayerInspection]) -> Iterator[Figure]:
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if sizes:
        before, after = sum(t.before for t in sizes), sum(t.after for t in sizes)
        yield Figure("tensors", size(after), f"{size(before)} before, {signed(100 * (after / before - 1))} %")
    yield Figure("directory", size(whole), "tokenizer and all")
    weights = sum(layer.rows * layer.columns for layer in quantized)
    if weights:
        bits = 8 * sum(layer.size for layer in quantized) / weights
        yield Figure("bits per weight", f"{bits:.3f}", "of the quantized ones, scales counted")
    known = [layer for layer in quantized if layer.error is not None]
    if known:
        worst = min(known, key=lambda layer: layer.error.snr if layer.error else 0)
        assert worst.error is not None
        yield Figure("lowest SNR", f"{worst.error.snr:.1f} dB", worst.name)


def _size_parts(sizes: Sequence[TreatmentSize] | None) -> Iterator[Text | Drawing]:
    if not sizes:
        yield Text("The source tells where the bytes went.")
        return
    before, after = sum(t.before for t in sizes), sum(t.after for t in sizes)
    kept = sum(t.after for t in sizes if not t.quantized)
    bars = [Bar("source", before, size(before), colour="quiet")]
    at = before
    for t in (t for t in sizes if t.before != t.after):
        bars.append(Bar(_counted(t), at + t.after - t.before, _signed(t.after - t.before), at))
        at += t.after - t.before
    bars.append(Bar("output", after, size(after), colour="quiet"))
    bars.append(Bar("of which kept as it was", kept, size(kept), colour="quiet"))
    words = f"{size(before)} in the source, {size(after)} in the output, {size(kept)} of it kept as it was"
    yield Drawing(lambda width: bar_chart(bars, f"Size, step by step: {words}.", width), f"Tensors only: {words}.")


def _counted(t: TreatmentSize) -> str:
    return f"{t.treatment}, {t.modules} module{'s' * (t.modules != 1)}"


def _signed(change: int) -> str:
    return f"{'+' if change > 0 else '−'}{size(abs(change))}"


def _treatment_parts(
    record: Mapping[str, Any], sizes: Sequence[TreatmentSize] | None, inspection: Inspection
) -> Iterator[Text | Table]:
    errors: dict[str, list[float]] = {}
    for layer in inspection.layers:
        if layer.quantized and layer.error is not None:
            errors.setdefault(layer.treatment, []).append(layer.error.snr)
    if sizes is None:
        found: dict[str, list[LayerInspection]] = {}
        for layer in inspection.layers:
            found.setdefault(layer.treatment, []).append(layer)
        rows = [
            (
                Cell(name),
                number(len(each), ",.0f"),
                number(sum(x.rows * x.columns for x in each), ",.0f"),
                _size(sum(x.size for x in each)),
            )
            for name, each in found.items()
        ]
        plain = (Column("treatment", False), Column("matrices"), Column("weights"), Column("stored"))
        yield Table("Treatments", plain, rows)
        return
    columns = (
        Column("treatment", False), Column("modules"), Column("weights"), Column("before"), Column("stored"),
        Column("bits per weight"),
        *([Column("mean SNR dB")] if errors else []),
    )  # fmt: skip
    table: list[list[Cell]] = []
    for t in sizes:
        cells = [
            Cell(t.treatment),
            number(t.modules, ",.0f"),
            number(t.weights, ",.0f"),
            _size(t.before),
            _size(t.after),
            number(t.bits, ".3f"),
        ]
        matching = [
            snr for name, found_errors in errors.items() if t.quantized and _same(t.treatment, name) for snr in found_errors
        ]
        table.append([*cells, *([number(sum(matching) / len(matching) if matching else None)] if errors else [])])
    yield Table("Treatments", columns, table)


def _same(treatment: str, stored: str) -> bool:
    """Whether a treatment, which may name its algorithm last, is what is said of a stored matrix."""
    return treatment == stored or (treatment.startswith(f"{stored}, ") and "activations" not in treatment[len(stored) :])


def _size(count: int) -> Cell:
    return Cell(size(count), count)


def _layer_parts(inspection: Inspection) -> Iterator[Any]:
    rewritten = sum(layer.rewritten for layer in inspection.layers if layer.quantized)
    if rewritten:
        yield Text(
            f"{rewritten} quantized matrices were rewritten by a transform first, so they have no source to be compared with, "
            "layer by layer; the model's outputs have: quantplan eval.",
            note=True,
        )
    if inspection.against is None:
        yield Text("Errors need the source.")
    yield from drawings(inspection)
    yield layer_table(inspection)


def _input_parts(quantized: Sequence[LayerInspection]) -> Iterator[Any]:
    static = [layer for layer in quantized if layer.inputs is not None]
    if not static:
        return
    yield Text("Ranges that calibration found for the inputs of each matrix; what lies outside of them saturates.")
    reach = {x.name: max(-x.inputs.low, x.inputs.high) for x in static if x.inputs and x.inputs.low is not None and x.inputs.high}
    if reach:
        cells = [GridCell(name, math.log10(value), f"±{value:.4g}") for name, value in reach.items() if value > 0]
        ends = (rounded(min(reach.values())), rounded(max(reach.values())))
        words = f"Largest input each matrix can hold, from {ends[0]} to {ends[1]}, shaded by its logarithm."
        yield Drawing(lambda width: grid_chart(cells, words, ends, False, width), f"{words} The strongest colours are outliers.")
    columns = (Column("module", False), Column("lowest"), Column("highest"), Column("parameters", False))
    rows = [
        (
            Cell(layer.name), number(layer.inputs.low, ".4g"), number(layer.inputs.high, ".4g"),
            Cell(", ".join(f"{n} {v:.5g}" for n, v in layer.inputs.parameters.items())),
        )
        for layer in static if layer.inputs is not None
    ]  # fmt: skip
    yield Table("Ranges of static activations", columns, rows)


def _plan_parts(resolution: Resolution | None, record: Mapping[str, Any], report: Report | None) -> Iterator[Any]:
    if resolution is None:
        yield Text("As recorded in the output; the source tells which line decided what.")
        yield Listing("plan", json.dumps(record["plan"], indent=2, ensure_ascii=False).splitlines())
        return
    source = resolution.loaded.source
    if report is None:
        yield Text("As recorded in the output, which keeps the plan's meaning and not its spelling.")
    yield Listing(Path(source.file).name, "\n".join(source.lines).rstrip().splitlines())
    for line in transform_text(resolution):
        yield Text(f"Transform {line}.")
    shown: dict[str, list[Any]] = {}
    for a in resolution.quantized:
        shown.setdefault(json.dumps([vars(f) for f in explain_module(resolution, a)]), []).append(a)
    for assignments in shown.values():
        names = [a.name for a in assignments]
        more = f", … {len(names)} modules" if len(names) > MODULES else ""
        yield Heading(summary(assignments[0]))
        yield Text(f"{', '.join(names[:MODULES])}{more}")
        rows = [
            (Cell(f.name), Cell(json.dumps(f.value)), Cell(_placed(f.origin, source.file)))
            for f in explain_module(resolution, assignments[0])
        ]
        yield Table(
            f"Fields of {summary(assignments[0])}",
            (Column("field", False), Column("value", False), Column("set by", False)),
            rows,
        )


def _placed(origin: str, file: str) -> str:
    """A place in the plan by the plan's name: where it lay is nobody's matter."""
    return origin.replace(f"{file}:", f"{Path(file).name}:", 1) if origin.startswith(f"{file}:") else origin


def _run_parts(out: Path, record: Mapping[str, Any], report: Report | None) -> Iterator[Any]:
    rows: list[tuple[str, str]] = []
    if report is not None:
        for note in report.resolution.notes:
            yield Text(_placed(render(note), report.resolution.loaded.source.file), note=True)
        rows += [
            ("time", f"{report.seconds:.1f} s"),
            ("peak memory", f"{size(report.peak_memory)} ({size(report.estimate.peak_memory)} predicted)"),
            *machine(),
        ]
        yield Facts(rows)
    source = record["source"]
    rows = [("source", str(source["name"]) + (f" at {source['revision']}" if source["revision"] else ""))]
    rows += [(f"header of source {name}", info["header_sha256"]) for name, info in source["files"].items()]
    rows += [(f"header of {name}", info["header_sha256"]) for name, info in record["files"].items()]
    if "calibration" in record:
        rows.append(("calibration data", str(record["calibration"].get("sha256", ""))))
    rows.append((RECORD, hash_file(out / RECORD)))
    yield Heading("Versions")
    yield Facts([(name, str(version)) for name, version in record["versions"].items()])
    yield Heading("Hashes, sha256")
    yield Facts(rows, names=True)
