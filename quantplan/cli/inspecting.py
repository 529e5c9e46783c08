"""The command that looks into checkpoints: inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli import show

if TYPE_CHECKING:
    from quantplan.inspection.activations import ActivationInspection
    from quantplan.inspection.inspect import Inspection
    from quantplan.inspection.layers import LayerInspection

SHOWN = 20


def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory or Hub id, float or made by quantplan.")],
    against: Annotated[
        str | None, typer.Option("--against", "-s", metavar="OTHER", help="Another of the same model: the error of each layer.")
    ] = None,
    activations: Annotated[bool, typer.Option("--activations", "-a", help="Activations too, on --data.")] = False,
    data: Annotated[Path | None, typer.Option("--data", "-d", metavar="FILE", help="Text for --activations.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="How many windows.")] = 4,
    everything: Annotated[bool, typer.Option("--all", help=f"Every layer, not the worst {SHOWN}.")] = False,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Write charts there, as SVG.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report, as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Show ranges, scales, saturation and outliers, layer by layer.

    Worst first: by error with --against, else by outliers. Weights are read one matrix at a time.
    """
    import os

    from quantplan.inspection.inspect import inspect_checkpoint

    if activations != (data is not None):
        missing = "--data" if activations else "--activations"
        raise typer.BadParameter("give both, or neither", param_hint=missing)
    if plots is not None or html is not None:
        from quantplan.report.charts import require_report

        require_report()  # before the work, not after it
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' own bars; ours is enough
    with show.phases(quiet) as advance:
        found = inspect_checkpoint(
            checkpoint, against, data, length, windows, lambda phase, name, done, total: advance(phase, done, total, name)
        )
    if plots is not None:
        from quantplan.report.inspected import write_plots

        write_plots(found, plots)
    if html is not None:
        from quantplan.report.inspected import inspection_page
        from quantplan.report.page import write_page

        write_page(html, inspection_page(found))
    if as_json:
        show.document(found.as_dict())
    else:
        _show(found, None if everything else SHOWN)
    return 0


def _show(found: Inspection, limit: int | None) -> None:
    layers = found.worst()
    quantized = [layer for layer in layers if layer.quantized]
    _show_layers(layers[:limit], found.against is not None, _heading(len(layers), limit, "matrices"))
    if quantized:
        print()
        title = _heading(len(quantized), limit, "quantized matrices: steps of their grids, and codes at its ends")
        columns = ("module", "scale min", "median", "max", "spread", "at low end", "at high end", "inputs")
        show.table(columns, (_grid(layer) for layer in quantized[:limit]), title)
    if found.activations:
        print()
        _show_activations(sorted(found.activations, key=lambda a: a.badness), limit)
    outliers = sum(layer.values.outlier for layer in layers)
    print(f"\n{found.checkpoint}: {len(layers)} matrices, {len(quantized)} quantized, {outliers} with outliers (over 6 σ)")
    rewritten = sum(layer.rewritten for layer in layers)
    if found.against is not None and rewritten:
        print(f"{rewritten} matrices were rewritten by transforms: their weights have nothing to be compared with")
    if found.unmatched:
        print(f"{len(found.unmatched)} matrices are not in {found.against}: {', '.join(found.unmatched[:3])}")


def _heading(count: int, limit: int | None, what: str) -> str:
    return f"the worst {limit} of {count} {what}" if limit is not None and count > limit else f"{count} {what}"


def _show_layers(layers: Sequence[LayerInspection], errors: bool, title: str) -> None:
    columns = ("SNR dB", "rel. error", "max error", "cosine") if errors else ()
    columns = ("module", "treatment", "bits", *columns, "min", "max", "absmax", "rms", "outlier σ", "beyond 6 σ")
    rows = (
        (
            layer.name,
            layer.treatment,
            f"{layer.bits:.2f}",
            *(_error(layer) if errors else ()),
            *(f"{v:.4g}" for v in (layer.values.minimum, layer.values.maximum, layer.values.absmax, layer.values.rms)),
            f"{layer.values.sigmas:.1f}",
            f"{100 * layer.outliers:.4f} %",
        )
        for layer in layers
    )
    show.table(columns, rows, title)


def _error(layer: LayerInspection) -> tuple[str, ...]:
    error = layer.error
    if error is None:
        return ("", "", "", "")
    snr = "exact" if error.largest == 0 else f"{error.snr:.2f}"
    return (snr, f"{error.relative:.4f}", f"{error.largest:.5f}", f"{error.cosine:.5f}")


def _grid(layer: LayerInspection) -> tuple[str, ...]:
    assert layer.scales is not None and layer.saturation is not None
    held = "" if layer.inputs is None else ", ".join(f"{name} {value:.4g}" for name, value in layer.inputs.parameters.items())
    return (
        layer.name,
        *(f"{v:.3g}" for v in (layer.scales.minimum, layer.scales.median, layer.scales.maximum)),
        f"{layer.scales.spread:.1f}",
        f"{100 * layer.saturation.low:.3f} %",
        f"{100 * layer.saturation.high:.3f} %",
        held,
    )


def _show_activations(found: Sequence[ActivationInspection], limit: int | None) -> None:
    for kind in ("block", "linear"):
        chosen = [a for a in found if a.kind == kind]
        if not chosen:
            continue
        errors = chosen[0].error is not None
        columns = ("SNR dB", "rel. error", "max error", "cosine") if errors else ()
        rows = (
            (
                a.name,
                *(
                    (f"{a.error.snr:.2f}", f"{a.error.relative:.4f}", f"{a.error.largest:.4g}", f"{a.error.cosine:.5f}")
                    if a.error
                    else ()
                ),
                f"{a.inputs.values.absmax:.4g}",
                f"{a.inputs.values.peak:.1f}",
                f"{a.inputs.kurtosis_max:.0f}",
                f"{a.inputs.channel}",
                f"{a.outputs.values.peak:.1f}",
            )
            for a in chosen[:limit]
        )
        shown = ("input absmax", "absmax / rms", "kurtosis", "channel", "output absmax / rms")
        show.table((kind, *columns, *shown), rows, _heading(len(chosen), limit, f"{kind}s, activations"))
        if kind == "block":
            print()
