"""Commands that measure models: eval."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli import show
from quantplan.errors import render

if TYPE_CHECKING:
    from quantplan.evaluation.gates import Gate
    from quantplan.evaluation.metrics import Evaluation

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Windows = Annotated[int | None, typer.Option(min=1, help="How many windows; all by default.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a window.")]
WORST = 10  # layers shown


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories to measure.")],
    data: Annotated[Path, typer.Option("--data", "-d", metavar="FILE", help="Text: .txt or .jsonl.")],
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", metavar="MODEL", help="The float model: KL and agreement with it.")
    ] = None,
    windows: Windows = None,
    length: Length = 1024,
    layers: Annotated[
        bool, typer.Option("--layers", help="Errors of every block's and linear's output, beside --reference.")
    ] = False,
    max_perplexity: Annotated[float | None, typer.Option(min=0, help="Gate: end with 1 above it.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(min=0, help="Gate: of perplexity over the reference's.")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Gate: end with 1 above it.")] = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: end with 1 below it.")] = None,
    min_top5: Annotated[float | None, typer.Option(min=0, max=1, help="Gate: end with 1 below it.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Measure perplexity, KL divergence and agreement.

    KL (nats per token), top-1 and top-5 agreement and the ratio of perplexities are against --reference, the float model; ± is
    half a 95 % confidence interval. Ends with 1 when a gate fails.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' own bars; ours is enough
    limits = {
        "--max-perplexity": max_perplexity,
        "--max-perplexity-ratio": max_perplexity_ratio,
        "--max-kl": max_kl,
        "--min-top1": min_top1,
        "--min-top5": min_top5,
    }
    if layers and reference is None:
        raise typer.BadParameter("errors of layers are measured beside --reference", param_hint="--layers")
    gates = list(_gates(limits, reference is not None))

    from quantplan.evaluation import metrics
    from quantplan.evaluation.gates import failures

    with show.progress("evaluating", quiet, in_bytes=False) as advance:
        found = metrics.evaluate(
            models,
            data,
            reference,
            windows,
            length,
            layers=layers,
            on_step=lambda name, done, total: advance(done, total, name),
        )
    failed = list(failures(gates, found))
    if as_json:
        show.document({"evaluations": [e.as_dict() for e in found], "failed_gates": [p.as_dict() for p in failed]})
    else:
        _show_figures(found)
        for each in found:
            _show_layers(each)
    for problem in failed:
        print(render(problem), file=sys.stderr)
    return 1 if failed else 0


def _gates(limits: dict[str, float | None], reference: bool) -> Iterator[Gate]:
    """A gate for every limit given. Raises BadParameter where its figure is not measured."""
    from quantplan.evaluation.gates import Gate

    for option, limit in limits.items():
        if limit is None:
            continue
        gate = Gate(option, option[6:].replace("-", "_"), limit, least=option.startswith("--min"))
        if gate.takes_reference and not reference:
            raise typer.BadParameter("it is measured against --reference alone, and none is given", param_hint=option)
        yield gate


def figure(value: float | None, margin: float | None, digits: int) -> str:
    """`0.51784 ± 0.02101`; empty for what was not measured."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if margin is None else f" ± {margin:.{digits}f}")


def _show_figures(found: Iterable[Evaluation]) -> None:
    digits = {"perplexity": 3, "perplexity_ratio": 4, "kl": 5, "top1": 4, "top5": 4}
    headings = {"perplexity": "perplexity", "perplexity_ratio": "ratio", "kl": "KL", "top1": "top-1", "top5": "top-5"}
    found = list(found)
    measured = [name for name in digits if any(getattr(e, name) is not None for e in found)]
    rows = (
        (e.model, *(figure(getattr(e, n), e.margin(n), digits[n]) for n in measured), f"{e.tokens:,}", f"{e.seconds:.0f} s")
        for e in found
    )
    show.table(("model", *(headings[n] for n in measured), "tokens", "time"), rows)


def _show_layers(found: Evaluation) -> None:
    for kind in ("block", "linear"):
        worst = sorted((e for e in found.layers if e.kind == kind), key=lambda e: -e.error)
        if worst:
            print()
            title = f"{found.model}: relative error of the outputs of {len(worst)} {kind}s; the worst:"
            show.table((kind, "error"), ((e.name, f"{e.error:.5f}") for e in worst[:WORST]), title)
