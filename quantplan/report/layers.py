"""Layers of an inspection, as charts and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from quantplan.inspection.inspect import Inspection
from quantplan.inspection.layers import LayerInspection
from quantplan.report.charts import Cell as GridCell
from quantplan.report.charts import grid_chart
from quantplan.report.page import Cell, Column, Drawing, Table, Text, number
from quantplan.report.svg import Chart


def error_chart(layers: Sequence[LayerInspection], width: int) -> Chart | None:
    """Signal-to-noise ratio of each matrix that has one, darker where it is lower."""
    known = [layer for layer in layers if layer.error is not None and math.isfinite(layer.error.snr)]
    cells = [GridCell(x.name, x.error.snr, f"{x.error.snr:.2f} dB, {x.treatment}") for x in known if x.error is not None]
    if not cells:
        return None
    low, high = min(cells, key=lambda c: c.value), max(cells, key=lambda c: c.value)
    text = f"Signal-to-noise ratio by layer, from {low.value:.1f} dB in {low.name} to {high.value:.1f} dB in {high.name}."
    return grid_chart(cells, text, (f"{high.value:.1f} dB", f"{low.value:.1f} dB"), True, width)


def bits_chart(layers: Sequence[LayerInspection], width: int) -> Chart | None:
    """Stored bits per weight of each quantized matrix, darker where they are more."""
    cells = [GridCell(x.name, x.bits, f"{x.bits:.3f} bits, {x.treatment}") for x in layers if x.quantized]
    if not cells:
        return None
    low, high = min(c.value for c in cells), max(c.value for c in cells)
    text = f"Stored bits per weight by layer, from {low:.2f} to {high:.2f}."
    return grid_chart(cells, text, (f"{low:.2f} bits", f"{high:.2f} bits"), False, width)


def outlier_chart(layers: Sequence[LayerInspection], width: int) -> Chart | None:
    """How many standard deviations the largest weight of each matrix is from the mean, darker where they are more."""
    cells = [GridCell(x.name, x.values.sigmas, f"{x.values.sigmas:.1f} σ, {x.treatment}") for x in layers]
    if not cells:
        return None
    low, high = min(c.value for c in cells), max(c.value for c in cells)
    text = f"Largest weight of each layer, in standard deviations from the mean: from {low:.1f} to {high:.1f}."
    return grid_chart(cells, text, (f"{low:.0f} σ", f"{high:.0f} σ"), False, width)


def scale_chart(layers: Sequence[LayerInspection], width: int) -> Chart | None:
    """Seed 003's plot of scales by layer: the median step of each quantized matrix, shaded by its logarithm."""
    found = {x.name: x.scales for x in layers if x.scales is not None and x.scales.median > 0}
    if not found:
        return None
    cells = [
        GridCell(n, math.log10(s.median), f"median {s.median:.3g}, {s.minimum:.3g} to {s.maximum:.3g}") for n, s in found.items()
    ]
    low, high = min(s.median for s in found.values()), max(s.median for s in found.values())
    text = f"Median scale by layer, from {low:.3g} to {high:.3g}, shaded by its logarithm."
    return grid_chart(cells, text, (f"{low:.2g}", f"{high:.2g}"), False, width)


def drawings(inspection: Inspection) -> Iterator[Drawing | Text]:
    """Errors, bits and outliers, where there is anything to see."""
    layers = inspection.layers
    if any(layer.error is not None and math.isfinite(layer.error.snr) for layer in layers):
        caption = "Signal-to-noise ratio of each matrix; 6 dB more is half the error. The stronger the colour, the more was lost."
        yield Drawing(lambda width: error_chart(layers, width), caption)
    bits = sorted({round(layer.bits, 1) for layer in layers if layer.quantized})
    if len(bits) > 1:
        caption = "Stored bits per weight, scales and zero points counted. The stronger the colour, the more bits."
        yield Drawing(lambda width: bits_chart(layers, width), caption)
    elif bits:
        low, high = min(x.bits for x in layers if x.quantized), max(x.bits for x in layers if x.quantized)
        span = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
        yield Text(f"Every quantized matrix takes {span} bits per weight, scales and zero points counted.")
    caption = "Largest weight of each matrix in standard deviations from the mean; over 6 it counts as an outlier."
    yield Drawing(lambda width: outlier_chart(layers, width), caption)


def layer_table(inspection: Inspection) -> Table:
    """Every layer, worst first."""
    errors = inspection.against is not None
    columns = [
        Column("module", False),
        Column("treatment", False),
        Column("bits", hint="stored bits per weight"),
        *(
            [Column("SNR dB", sorted="ascending"), Column("relative error"), Column("max error"), Column("cosine")]
            if errors
            else []
        ),
        Column("absmax"),
        Column("rms"),
        Column(
            "outlier σ", sorted="none" if errors else "descending", hint="largest weight, in standard deviations from the mean"
        ),
        Column("scale, median"),
        Column("spread", hint="largest scale over smallest"),
        Column("saturated", hint="share of codes at the ends of the grid"),
    ]
    return Table("Layers, worst first", columns, [_row(layer, errors) for layer in inspection.worst()])


def _row(x: LayerInspection, errors: bool) -> list[Cell]:
    e = x.error
    known = [number(e.snr), number(e.relative, ".4f"), number(e.largest, ".4g"), number(e.cosine, ".5f")] if e else [Cell("")] * 4
    return [
        Cell(x.name),
        Cell(x.treatment),
        number(x.bits, ".2f"),
        *(known if errors else []),
        number(x.values.absmax, ".4g"),
        number(x.values.rms, ".4g"),
        number(x.values.sigmas, ".1f"),
        number(x.scales.median if x.scales else None, ".3g"),
        number(x.scales.spread if x.scales else None, ".1f"),
        number(100 * x.saturation.total if x.saturation else None, ".2f", " %"),
    ]
