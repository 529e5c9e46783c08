"""Commands that show what there is: schemes, algorithms, transforms, codes, schema."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from quantplan.cli import show
from quantplan.cli.options import AsJson

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one with its options.")]


class DType(str, Enum):
    """Dtypes of activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def schemes(name: Name = None, as_json: AsJson = False) -> int:
    """List number formats, or one with its options."""
    from quantplan.format import FORMATS
    from quantplan.scheme import SCHEMES

    if name is not None:
        return _one(SCHEMES.get(name), as_json)
    rows = [
        {
            "scheme": s.name,
            "bits": s.bits,
            "granularities": list(s.granularities),
            "default": _default(s),
            "summary": _first_line(s),
        }
        for s in SCHEMES
    ]
    if as_json:
        show.document({"schemes": rows, "formats": FORMATS.names()})
    else:
        show.table(
            ("scheme", "bits", "default", "what it is"),
            ((r["scheme"], r["bits"], r["default"], r["summary"]) for r in rows),
        )
    return 0


def algorithms(name: Name = None, as_json: AsJson = False) -> int:
    """List algorithms, or one with its options."""
    from quantplan.algorithm import ALGORITHMS

    if name is not None:
        return _one(ALGORITHMS.get(name), as_json)
    rows = [{"algorithm": a.name, "summary": _first_line(a)} for a in ALGORITHMS]
    if as_json:
        show.document({"algorithms": rows})
    else:
        show.table(("algorithm", "what it does"), ((r["algorithm"], r["summary"]) for r in rows))
    return 0


def transforms(name: Name = None, as_json: AsJson = False) -> int:
    """List transforms, or one with its options."""
    from quantplan.transform import TRANSFORMS

    if name is not None:
        return _one(TRANSFORMS.get(name), as_json)
    rows = [{"transform": t.name, "needs_data": t().needs_data, "summary": _first_line(t)} for t in TRANSFORMS]
    if as_json:
        show.document({"transforms": rows})
    else:
        show.table(("transform", "what it does"), ((r["transform"], r["summary"]) for r in rows))
    return 0


def kernels(
    name: Annotated[str | None, typer.Argument(metavar="[SCHEME]", help="Why each kernel serves it or not.")] = None,
    activations: Annotated[
        str | None,
        typer.Option("--activations", "-a", metavar="SCHEME", help="Of the inputs; without it none, and the weights' own."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Output features of the layer.")] = 2048,
    columns: Annotated[int, typer.Option(min=1, help="Input features.")] = 2048,
    group_size: Annotated[int | None, typer.Option(min=1, help="Of the weights; the scheme's own by default.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the inputs.")] = DType.bfloat16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; cuda by default where there is one.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show which kernel computes which scheme here, and why not another.

    `reference` dequantizes the weight for every batch.
    """
    import torch

    from quantplan.kernel import Job, refusals
    from quantplan.scheme import SCHEMES, SchemeConfig

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise typer.BadParameter(f"no device is called '{device}'", param_hint="--device") from None

    def job(weights: type[SchemeConfig], inputs: type[SchemeConfig] | None) -> Job:
        wq = weights() if group_size is None or weights.fixed_group_size else weights(group_size=group_size)
        return Job(wq, None if inputs is None else inputs(), rows, columns, where, getattr(torch, dtype.value))

    given = None if activations is None else SCHEMES.get(activations)
    if name is not None:
        reasons = dict(refusals(job(SCHEMES.get(name), given)))
        serves = next((kernel for kernel, reason in reasons.items() if reason is None), "reference")
        if as_json:
            show.document({"scheme": name, "activations": activations, "kernel": serves, "refusals": reasons})
            return 0
        said = {k: "serves" if k == serves else reason or f"would serve, after {serves}" for k, reason in reasons.items()}
        show.table(
            ("kernel", "for this layer"), [*said.items(), ("reference", "serves" if serves == "reference" else "always serves")]
        )
        return 0
    found = []
    for weights in SCHEMES:
        for inputs in (given,) if given else (None, weights):
            reasons = dict(refusals(job(weights, inputs)))
            kernel = next((k for k, reason in reasons.items() if reason is None), "reference")
            found.append({"weights": weights.name, "activations": inputs and inputs.name, "kernel": kernel, "refusals": reasons})
    if as_json:
        show.document({"device": str(where), "dtype": dtype.value, "rows": rows, "columns": columns, "kernels": found})
        return 0
    shown = ((f["weights"], f["activations"] or "", f["kernel"]) for f in found)
    print(f"{rows} x {columns}, {dtype.value} inputs, {where}:\n")
    show.table(("weights", "activations", "kernel"), shown)
    return 0


def codes(
    code: Annotated[str | None, typer.Argument(metavar="[CODE]", help="A code, such as QP110, to show its page.")] = None,
    as_json: AsJson = False,
) -> int:
    """List problem codes, or show one's page."""
    from quantplan.errors import code_pages, did_you_mean

    pages = code_pages()
    if code is None:
        rows = [{"code": p.code, "exit_status": p.exit_status, "title": p.title} for p in pages.values()]
        if as_json:
            show.document({"codes": rows})
        else:
            show.table(("code", "exit", "title"), ((r["code"], r["exit_status"], r["title"]) for r in rows))
        return 0
    page = pages.get(code.upper())
    if page is None:
        raise typer.BadParameter(f"no code '{code}'; {did_you_mean(code.upper(), pages)}", param_hint="CODE")
    if as_json:
        show.document({"code": page.code, "title": page.title, "exit_status": page.exit_status, "text": page.text})
    else:
        print(f"{page.code} {page.title} (exit status {page.exit_status})\n\n{page.text}")
    return 0


def schema() -> int:
    """Print the plan's JSON Schema, for editors and CI."""
    from quantplan.plan.json_schema import plan_schema

    show.document(plan_schema())
    return 0


def _one(member: Any, as_json: bool) -> int:
    fields = {n: f for n, f in member.plan_options().items()}
    if as_json:
        made = member.model_json_schema()
        show.document(
            {"name": member.name, "summary": _first_line(member), "options": {n: made["properties"][n] for n in fields}}
        )
        return 0
    print(f"{member.name}: {_first_line(member)}\n")
    described = member.model_json_schema()["properties"]
    rows = (
        (n, _values(described[n]), "" if f.default is None else f.default, " ".join((f.description or "").split()))
        for n, f in fields.items()
    )
    show.table(("option", "values", "default", "meaning"), rows)
    return 0


def _values(described: dict[str, Any]) -> str:
    kinds = described.get("anyOf", [described])
    shown = [", ".join(map(str, k["enum"])) if "enum" in k else str(k.get("const", k.get("type", ""))) for k in kinds]
    return " or ".join(s for s in shown if s != "null")


def _default(scheme: Any) -> str:
    config = scheme()
    return f"group {config.group}" if config.group else str(config.strategy)


def _first_line(member: Any) -> str:
    return (member.__doc__ or "").strip().split("\n")[0].rstrip(".")
