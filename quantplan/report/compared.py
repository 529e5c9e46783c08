"""The report of a comparison of models: what each costs in bytes, time and memory, and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from quantplan.errors import fail, size
from quantplan.evaluation.interval import margin
from quantplan.report.charts import Bar, bar_chart, pareto, pareto_chart
from quantplan.report.page import Cell, Column, Drawing, Facts, Figure, Heading, Section, Table, Text, number, render_page, signed

Model = Mapping[str, Any]
Measure = Callable[[Model], float | None]
MEGABYTE = 1e6


def comparison_page(data: Mapping[str, Any]) -> str:
    """The comparison `data`, as `quantplan compare --json` prints it, as one HTML file; what is null was not measured.

    Raises QP105 for data without models, QP405 where jinja2 or matplotlib are missing.
    """
    models: Sequence[Model] = data.get("models") or ()
    if not models:
        raise fail("QP105", "a comparison without models", "compare one model at least")
    reference = next((m for m in models if m["name"] == data.get("reference")), None)
    others = [m for m in models if m is not reference]
    against = f" against {reference['name']}" if reference is not None else ""
    machine = data.get("machine") or {}
    text = f" on {PurePath(str(data['data'])).name}" if data.get("data") else ""
    return render_page(
        title=f"{len(others)} model{'s' * (len(others) != 1)} compared",
        subtitle=f"Size, speed, memory and accuracy{against}{text}.",
        figures=list(_figures(reference, others)),
        sections=[
            Section("Accuracy for its size", list(_accuracy(reference, others))),
            Section("Speed", list(_speed(models))),
            Section("Memory", list(_memory(models))),
            Section("All figures", [_table(models, data.get("windows") or 0)]),
            Section("Measured on", [Facts([(str(name), str(value)) for name, value in machine.items() if value is not None])]),
        ],
        footer="Made by quantplan compare. Latencies are medians; ± is a 95 % confidence interval over windows of text.",
    )


def _figures(reference: Model | None, others: Sequence[Model]) -> Iterator[Figure]:
    smallest = min(others, key=lambda m: m["size"], default=None)
    if smallest is not None:
        share = f", {signed(100 * (smallest['size'] / reference['size'] - 1))} %" if reference else ""
        yield Figure("smallest", size(smallest["size"]), f"{smallest['name']}{share}")
    for label, field, form in (("lowest KL, nats a token", "kl", ".4f"), ("lowest perplexity", "perplexity", ".3f")):
        known = [m for m in others if m.get(field) is not None]
        if known:
            best = min(known, key=lambda m: m[field])
            yield Figure(label, f"{best[field]:{form}}", best["name"])
    timed = [m for m in others if _of(m, "decode", "tokens_per_second") is not None]
    if timed:
        fastest = max(timed, key=lambda m: m["decode"]["tokens_per_second"])
        yield Figure("fastest decoding", f"{fastest['decode']['tokens_per_second']:,.1f} tokens/s", fastest["name"])


def _of(model: Model, phase: str, field: str) -> float | None:
    found = (model.get(phase) or {}).get(field)
    return None if found is None else float(found)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _measure(phase: str, field: str) -> Measure:
    return lambda model: _of(model, phase, field)


def _accuracy(reference: Model | None, others: Sequence[Model]) -> Iterator[Text | Drawing]:
    field, words = ("kl", "KL divergence from the reference, nats a token")
    known = [m for m in others if m.get(field) is not None]
    if not known:
        field, words = "perplexity", "perplexity"
        known = [m for m in others if m.get(field) is not None]
    if not known:
        yield Text("Nothing was measured: give text with --data.")
        return
    points = pareto([(m["name"], m["size"] / MEGABYTE, m[field]) for m in known])
    best = ", ".join(p.label for p in points if p.best)
    line = None if reference is None else (f"{reference['name']}, {size(reference['size'])}", reference["size"] / MEGABYTE)
    text = f"{words.capitalize()}, against size: {'; '.join(f'{p.label} {p.x:.1f} MB, {p.y:.4g}' for p in points)}."
    yield Drawing(
        lambda width: pareto_chart(points, text, ("size in MB", words), line, width),
        f"Lower and further left is better. On the front, where nothing is both smaller and closer: {best}.",
    )


def _bars(
    models: Sequence[Model],
    title: str,
    text: str,
    value: Measure,
    shown: Callable[[float], str],
    ends: tuple[Measure, Measure] | None = None,
) -> Iterator[Heading | Drawing]:
    """Bars of one figure of every model that has it, the first model (the reference) in grey; `ends`: a range around it."""
    known = [(m, found) for m in models if (found := value(m)) is not None]
    bars = [
        Bar(
            str(m["name"]),
            found,
            shown(found),
            colour="quiet" if m is models[0] else "accent",
            low=ends[0](m) if ends else None,
            high=ends[1](m) if ends else None,
        )
        for m, found in known
    ]
    if bars:
        words = f"{title}: {'; '.join(f'{b.label} {b.value}' for b in bars)}."
        yield Heading(title)
        yield Drawing(lambda width: bar_chart(bars, words, width), text)


def _speed(models: Sequence[Model]) -> Iterator[Heading | Drawing]:
    for phase, what in (("prefill", "Reading a prompt"), ("decode", "Writing, token by token")):
        done: Mapping[str, Any] = next((m[phase] for m in models if m.get(phase)), {})
        of = f"{_counted(done['tokens'], 'token')}, {_counted(done['runs'], 'run')}: " if done else ""
        text = f"{of}longer is better."
        yield from _bars(
            models, f"{what}: throughput", text, _measure(phase, "tokens_per_second"), lambda v: f"{v:,.1f} tokens/s"
        )
        text = f"{of}shorter is better. Bars are medians, lines the 10th to the 90th percentile."
        ends = (_measure(phase, "p10_ms"), _measure(phase, "p90_ms"))
        yield from _bars(models, f"{what}: latency", text, _measure(phase, "median_ms"), lambda v: f"{v:,.1f} ms", ends)


def _memory(models: Sequence[Model]) -> Iterator[Heading | Drawing]:
    yield from _bars(
        models, "Once loaded", "What the process holds with the model in it.", lambda m: m.get("memory_loaded"), size
    )
    yield from _bars(models, "Peak", "The most it held while it was measured.", lambda m: m.get("peak_memory"), size)


def _table(models: Sequence[Model], windows: int) -> Table:
    columns = [
        Column("model", False),
        Column("scheme", False),
        Column("size"),
        Column("bits per weight"),
        Column("bits per quantized weight"),
        Column("KL", hint="nats a token, against the reference"),
        Column("perplexity"),
        Column("top-1", hint="share of positions with the reference's first choice"),
        Column("top-5"),
        Column("weight MSE"),
        Column("prefill tokens/s"),
        Column("decode tokens/s"),
        Column("prefill ms"),
        Column("decode ms"),
        Column("load s"),
        Column("memory loaded"),
        Column("peak memory"),
    ]
    rows = [_cells(m, windows) for m in models]
    measured = [i for i in range(len(columns)) if any(row[i].text for row in rows)]
    return Table("Models", [columns[i] for i in measured], [[row[i] for i in measured] for row in rows])


def _cells(m: Model, windows: int) -> list[Cell]:
    def bytes_cell(count: float | None) -> Cell:
        return Cell("") if count is None else Cell(size(count), count)

    def with_error(field: str, form: str, factor: float = 1, unit: str = "") -> Cell:
        value, half = m.get(field), margin(m.get(f"{field}_error"), windows)
        if value is None:
            return Cell("")
        shown = number(factor * value, form, unit)
        return Cell(f"{shown.text} ± {factor * half:{form}}{unit}", shown.value) if half else shown

    return [
        Cell(m["name"]),
        Cell(m.get("scheme") or ""),
        bytes_cell(m["size"]),
        number(m.get("bits_per_weight"), ".3f"),
        number(m.get("bits_per_quantized_weight"), ".3f"),
        with_error("kl", ".5f"),
        with_error("perplexity", ".3f"),
        with_error("top1", ".2f", 100, " %"),
        with_error("top5", ".2f", 100, " %"),
        number(m.get("weight_mse"), ".3g"),
        number(_of(m, "prefill", "tokens_per_second"), ",.1f"),
        number(_of(m, "decode", "tokens_per_second"), ",.1f"),
        number(_of(m, "prefill", "median_ms"), ",.1f"),
        number(_of(m, "decode", "median_ms"), ",.1f"),
        number(m.get("load_seconds"), ".2f"),
        bytes_cell(m.get("memory_loaded")),
        bytes_cell(m.get("peak_memory")),
    ]
