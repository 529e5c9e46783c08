"""Commands that show what there is: schemes, algorithms, transforms, codes, schema."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantplan.cli import show

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one with its options.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


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
