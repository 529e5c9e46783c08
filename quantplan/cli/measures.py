"""Commands that measure models: eval, compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplan.cli import show
from quantplan.cli.options import AsJson, Quiet
from quantplan.errors import QuantplanError, render

if TYPE_CHECKING:
    from quantplan.comparison.compare import Comparison
    from quantplan.evaluation.gates import Gate
    from quantplan.evaluation.metrics import Evaluation
    from quantplan.evaluation.tasks import TaskFigure

Windows = Annotated[int | None, typer.Option(min=1, help="How many windows; all by default.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens a window.")]


class Dtype(str, Enum):
    """What a model may compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


WORST = 10  # layers shown


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories to measure.")],
    data: Annotated[Path | None, typer.Option("--data", "-d", metavar="FILE", help="Text: .txt or .jsonl.")] = None,
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
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="TASK", help="Task of lm-eval: a name, or a YAML file; repeatable."),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", metavar="DIR", help="Folder of task files; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a task that run at once.")] = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Measure perplexity, KL divergence and agreement.

    KL (nats per token), top-1 and top-5 agreement and the ratio of perplexities are against --reference, the float model; ± is
    half a 95 % confidence interval. --task measures on tasks of lm-eval, with --data or without. Ends with 1 when a gate fails.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' own bars; ours is enough
    limits = {
        "--max-perplexity": max_perplexity,
        "--max-perplexity-ratio": max_perplexity_ratio,
        "--max-kl": max_kl,
        "--min-top1": min_top1,
        "--min-top5": min_top5,
    }
    if data is None and not task:
        raise typer.BadParameter("there is nothing to measure on", param_hint="--data or --task")
    if data is None and reference is not None:
        raise typer.BadParameter("it is compared with on a text", param_hint="--reference without --data")
    if layers and reference is None:
        raise typer.BadParameter("errors of layers are measured beside --reference", param_hint="--layers")
    gates = list(_gates(limits, data is not None, reference is not None))

    from quantplan.evaluation import metrics
    from quantplan.evaluation.gates import failures

    found: list[Evaluation] = []
    scores: list[tuple[TaskFigure, ...]] = []
    with show.phases(quiet, in_bytes=(), still=("running tasks on",)) as advance:
        if task:
            from quantplan.evaluation.tasks import run_tasks

            scores = run_tasks(
                models,
                task,
                include_path or (),
                limit,
                batch_size,
                on_step=lambda name, done, total: advance("running tasks on", done, total, name),
                bars=not quiet and sys.stderr.isatty(),
            )
        if data is not None:
            found = metrics.evaluate(
                models,
                data,
                reference,
                windows,
                length,
                layers=layers,
                on_step=lambda name, done, total: advance("evaluating", done, total, name),
            )
    failed = list(failures(gates, found))
    if as_json:
        documents = [e.as_dict() for e in found] or [{"model": model} for model in models]
        for document, figures in zip(documents, scores, strict=False):
            document["tasks"] = [f.as_dict() for f in figures]
        show.document({"evaluations": documents, "failed_gates": [p.as_dict() for p in failed]})
    else:
        if found:
            _show_figures(found)
        for each in found:
            _show_layers(each)
        _show_tasks(models, scores, below=bool(found))
    for problem in failed:
        print(render(problem), file=sys.stderr)
    return 1 if failed else 0


def _gates(limits: dict[str, float | None], data: bool, reference: bool) -> Iterator[Gate]:
    """A gate for every limit given. Raises BadParameter where its figure is not measured."""
    from quantplan.evaluation.gates import Gate

    for option, limit in limits.items():
        if limit is None:
            continue
        gate = Gate(option, option[6:].replace("-", "_"), limit, least=option.startswith("--min"))
        if not data:
            raise typer.BadParameter("it is measured on --data, and none is given", param_hint=option)
        if gate.takes_reference and not reference:
            raise typer.BadParameter("it is measured against --reference alone, and none is given", param_hint=option)
        yield gate


def figure(value: float | None, margin: float | None, digits: int) -> str:
    """`0.51784 ± 0.02101`; empty for what was not measured. A model beside itself has no error to show."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {margin:.{digits}f}" if margin else "")


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


def _show_tasks(models: Sequence[str], scores: Sequence[Sequence[TaskFigure]], below: bool) -> None:
    rows = [
        (f.task, f.metric, model, figure(f.value, f.margin, 4), "" if f.documents is None else f"{f.documents:,}")
        for model, figures in zip(models, scores, strict=False)
        for f in figures
    ]
    if rows:
        print(end="\n" if below else "")
        show.table(("task", "metric", "model", "value", "documents"), sorted(rows, key=lambda row: (row[0], row[1])))


def _show_layers(found: Evaluation) -> None:
    for kind in ("block", "linear"):
        worst = sorted((e for e in found.layers if e.kind == kind), key=lambda e: -e.error)
        if worst:
            print()
            title = f"{found.model}: relative error of the outputs of {len(worst)} {kind}s; the worst:"
            show.table((kind, "error"), ((e.name, f"{e.error:.5f}") for e in worst[:WORST]), title)


def compare(
    reference: Annotated[str, typer.Argument(metavar="REF", help="The float model: a directory, or a Hub id.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models made from it.")],
    data: Annotated[
        Path | None, typer.Option("--data", "-d", metavar="FILE", help="Text: perplexity, KL and agreement, as `eval` does.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for report.json and report.html.")
    ] = None,
    windows: Windows = None,
    length: Length = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose prefill is timed.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it, greedily.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs, after a warm-up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; as many as torch takes by default.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What models compute in while they are timed.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Compare models with the one they were made from.

    Size, memory, latency and speed, each model in a fresh process, one after the other; with --data also accuracy. Ends with 3
    when a model could not be measured; the others' figures are shown.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from quantplan.checkpoint.durable import named_errors
    from quantplan.comparison.compare import compare as measured
    from quantplan.comparison.measure import Settings

    if output is not None:  # not found out after minutes
        with named_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    settings = Settings(prompt_tokens, new_tokens, runs, threads, dtype.value, device)
    with show.phases(quiet, still=("measuring",)) as advance:

        def on_step(phase: str, name: str, done: int, total: int) -> None:
            advance(phase, done, total, name)

        found = measured(reference, models, data, windows, length, settings, on_step)
    if as_json:
        show.document(found.as_dict())
    else:
        _show_comparison(found)
    for problem in found.problems:
        print(render(problem), file=sys.stderr)
    status = 3 if found.problems else 0
    try:
        for path in _write_report(output, found.as_dict()) if output is not None else ():
            print(f"{path} written", file=sys.stderr)
    except QuantplanError as error:  # the figures are shown already, and stand
        for problem in error.problems:
            print(render(problem), file=sys.stderr)
        return status or error.exit_status
    return status


def _write_report(folder: Path, document: dict[str, Any]) -> Iterator[Path]:
    """report.json in `folder`, then report.html. Raises QP401 to QP403, QP405 where a package is missing."""
    from quantplan.checkpoint.durable import named_errors, write_durably
    from quantplan.checkpoint.layout import json_bytes
    from quantplan.report.compared import comparison_page

    with named_errors(folder):
        write_durably(folder / "report.json", json_bytes(document))
        yield folder / "report.json"
        write_durably(folder / "report.html", comparison_page(document).encode())
        yield folder / "report.html"


def _show_comparison(found: Comparison) -> None:
    """Three tables: what models take, how fast they are, how near the reference."""
    documents = [m.as_dict() for m in found.models]
    machine = found.machine
    threads = f"{machine['threads']} of {machine['cores']} cores" if machine["threads"] > 1 else "1 core"
    headings = ("model", "scheme", "size", "bits/weight", "bits/quantized", "load", "memory", "peak")
    rows: Iterable[tuple[object, ...]] = (
        (
            *(m["name"], m["scheme"], show.size(m["size"]), f"{m['bits_per_weight']:.2f}"),
            "" if m["bits_per_quantized_weight"] is None else f"{m['bits_per_quantized_weight']:.3f}",
            *(f"{m['load_seconds']:.1f} s", show.size(m["memory_loaded"]), show.size(m["peak_memory"])),
        )
        for m in documents
    )
    show.table(headings, rows, f"{machine['processor']}, {threads}, torch {machine['torch']}")
    print()
    first = documents[0]
    title = f"a prompt of {first['prefill']['tokens']} tokens, then {first['decode']['tokens']}, {first['prefill']['runs']} runs"
    rows = ((m["name"], *_speed(m["prefill"]), *_speed(m["decode"])) for m in documents)
    names = [f"{phase}{name}" for phase in ("prefill", "decode") for name in ("", " p10–p90", " tokens/s")]
    show.table(("model", *names), rows, title)
    if found.data is None and all(m["weight_mse"] is None for m in documents):
        return
    print()
    digits = {"perplexity": 3, "kl": 5, "top1": 4, "top5": 4}
    rows = (
        (
            m["name"],
            *(figure(m[n], each.margin(n), digits[n]) for n in digits if found.data is not None),
            "" if m["weight_mse"] is None else f"{m['weight_mse']:.3e}",
        )
        for m, each in zip(documents, found.models, strict=True)
    )
    titles = ("perplexity", "KL", "top-1", "top-5") if found.data is not None else ()
    show.table(("model", *titles, "weight MSE"), rows, "" if found.data is None else f"{found.data}, {found.windows} windows")


def _speed(phase: dict[str, float]) -> tuple[str, str, str]:
    spread = f"{phase['p10_ms']:.1f}–{phase['p90_ms']:.1f} ms"
    return f"{phase['median_ms']:.1f} ms", spread, f"{phase['tokens_per_second']:.1f}"
