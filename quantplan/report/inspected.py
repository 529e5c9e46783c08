"""The report of an inspection: its charts as files, or all of it as a page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantplan.checkpoint.durable import named_errors, write_durably
from quantplan.inspection.activations import ActivationInspection
from quantplan.inspection.inspect import Inspection
from quantplan.report.charts import Cell as GridCell
from quantplan.report.charts import grid_chart
from quantplan.report.layers import bits_chart, drawings, error_chart, layer_table, outlier_chart, scale_chart
from quantplan.report.page import Cell, Column, Drawing, Figure, Section, Table, Text, number, render_page, rounded
from quantplan.report.svg import Chart, standalone


def activation_chart(found: Sequence[ActivationInspection], width: int) -> Chart | None:
    """Relative error of each linear layer's outputs, darker where it is higher."""
    cells = [
        GridCell(a.name, a.error.relative, f"relative error {a.error.relative:.4f}")
        for a in found
        if a.kind == "linear" and a.error is not None
    ]
    if not cells:
        return None
    low, high = min(c.value for c in cells), max(c.value for c in cells)
    text = f"Relative error of each linear layer's outputs, from {low:.3f} to {high:.3f}."
    return grid_chart(cells, text, (f"{low:.3f}", f"{high:.3f}"), False, width)


def peak_chart(found: Sequence[ActivationInspection], width: int) -> Chart | None:
    """Largest input of each linear layer over their root mean square, darker where it is higher."""
    peaks = {a.name: a.inputs.values.peak for a in found if a.kind == "linear" and a.inputs.values.peak > 0}
    if not peaks:
        return None
    cells = [GridCell(name, math.log10(peak), f"absmax / rms {peak:.1f}") for name, peak in peaks.items()]
    low, high = rounded(min(peaks.values())), rounded(max(peaks.values()))
    text = f"Largest input of each linear layer over the root mean square, from {low} to {high}, shaded by its logarithm."
    return grid_chart(cells, text, (low, high), False, width)


def write_plots(found: Inspection, folder: Path) -> list[Path]:
    """Every chart there is something for, as an SVG file in `folder`. Raises QP402 where it cannot be written, QP405 without
    matplotlib."""
    made = {
        "error": error_chart(found.layers, 680),
        "bits": bits_chart(found.layers, 680),
        "scales": scale_chart(found.layers, 680),
        "outliers": outlier_chart(found.layers, 680),
        "activation-error": activation_chart(found.activations, 680),
        "activation-outliers": peak_chart(found.activations, 680),
    }
    paths = []
    for name, chart in made.items():
        if chart is not None:
            path = folder / f"{name}.svg"
            with named_errors(path):
                write_durably(path, standalone(chart).encode())
            paths.append(path)
    return paths


def inspection_page(found: Inspection) -> str:
    """An inspection as one HTML file. Raises QP405 where jinja2 or matplotlib are missing."""
    quantized = [layer for layer in found.layers if layer.quantized]
    against = "" if found.against is None else f", against {found.against}"
    worst = next(iter(found.worst()), None)
    figures = [Figure("matrices", f"{len(found.layers):,}", f"{len(quantized):,} quantized")]
    if worst is not None and worst.error is not None and quantized:
        figures.append(Figure("lowest SNR", f"{worst.error.snr:.1f} dB", worst.name))
    outliers = [layer for layer in found.layers if layer.values.outlier]
    figures.append(Figure("with outliers", f"{len(outliers):,}", "a weight over 6 standard deviations"))
    layers = [*drawings(found), layer_table(found)]
    name = re.split(r"[/\\]", found.checkpoint.rstrip("/\\"))[-1] or found.checkpoint
    sections = [Section("Layers", layers), Section("Activations", list(_activations(found)))]
    return render_page(name, f"What is in {found.checkpoint}{against}.", figures, sections, "Made by quantplan inspect.")


def _activations(found: Inspection) -> Iterator[Text | Drawing | Table]:
    if not found.activations:
        return
    yield Text("Both models on the same tokens, each layer with the inputs its own model gives it: errors add up along the way.")
    caption = "Relative error of each linear layer's outputs. The stronger the colour, the further from the other model."
    yield Drawing(lambda width: activation_chart(found.activations, width), caption)
    caption = "Largest input of each linear layer over the root mean square, shaded by its logarithm: what a grid must reach."
    yield Drawing(lambda width: peak_chart(found.activations, width), caption)
    errors = any(a.error is not None for a in found.activations)
    columns = [
        Column("module", False),
        Column("kind", False),
        *([Column("relative error"), Column("cosine"), Column("max error")] if errors else []),
        Column("input absmax"),
        Column("absmax / rms"),
        Column("kurtosis", hint="largest of any channel, over the tokens"),
        Column("channel", hint="the one with the largest magnitude"),
        Column("output absmax / rms"),
    ]
    rows = []
    for a in sorted(found.activations, key=lambda a: a.badness):
        e, x = a.error, a.inputs
        known = [number(e.relative, ".4f"), number(e.cosine, ".5f"), number(e.largest, ".4g")] if e else [Cell("")] * 3
        rows.append([
            Cell(a.name), Cell(a.kind), *(known if errors else []), number(x.values.absmax, ".4g"), number(x.values.peak, ".1f"),
            number(x.kurtosis_max, ",.0f"), number(x.channel, "d"), number(a.outputs.values.peak, ".1f"),
        ])  # fmt: skip
    yield Table("Activations, worst first", columns, rows)
