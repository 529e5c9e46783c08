"""Findings that need shapes: groups that do not divide, formats and engines that cannot hold a layer, fused siblings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from quantplan.assignment import Assignment
from quantplan.engines import ENGINES, Engine, is_expert
from quantplan.errors import Path, Problem, Severity, listing, printable
from quantplan.format import FORMATS
from quantplan.headers import Checkpoint
from quantplan.models.modules import fused_groups, text_config
from quantplan.plan.calibration import check_fit
from quantplan.plan.schema import Plan


def lint(plan: Plan, checkpoint: Checkpoint, assignments: Mapping[str, Assignment], in_memory: bool = False) -> Iterator[Problem]:
    """Every finding about assignments, one problem a cause with the modules it is about. `in_memory`: nothing is
    written, so formats and engines have no say."""
    yield from _source(checkpoint)
    if plan.calibration is not None:
        yield from check_fit(plan.calibration, checkpoint.config)
    treated = [a for a in assignments.values() if a.wq is not None]
    if not treated and plan.kv_cache is not None:
        return
    if not treated:
        yield _nothing(plan, assignments)
        return
    yield from _tied(treated)
    yield from _divisible(treated)
    if in_memory:
        return
    yield from _held(plan, treated)
    yield from _engines(plan, [a for a in assignments.values() if a.wq is not None or a.module.kind == "experts"])
    yield from _expert_schemes(plan, assignments)
    yield from _siblings(plan, assignments)


def _nothing(plan: Plan, assignments: Mapping[str, Assignment]) -> Problem:
    """QP119, with the built-in rules that left nothing to a plan that says what to do."""
    if plan.default.wq is None and not any(o.wq for o in plan.overrides):
        return Problem("QP119", "the plan quantizes nothing", "set default.wq, or an override's wq", ("default",))
    text, advice = f"the plan quantizes none of {len(assignments)} modules", "set default.wq, or an override's wq"
    rules = Counter(a.module.keep for a in assignments.values() if a.module.keep is not None)
    if rules:
        kept = (f"{count} of them as '{rule.name}' ({rule.why})" for rule, count in rules.most_common())
        text += f"; built-in rules keep {', '.join(kept)}"
        open_to = [a.name for a in assignments.values() if a.module.keep is not None and a.module.kind != "other"]
        if plan.default.wq is not None and sum(rules.values()) == len(assignments):
            advice = f"name one in an override with keep: false, as {open_to[0]}" if open_to else "none of them can be quantized"
    return Problem("QP119", text, advice, ("default",))


def _source(checkpoint: Checkpoint) -> Iterator[Problem]:
    config = checkpoint.config
    quantized = config.get("quantization_config") or text_config(config).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        advice = "start from the unquantized checkpoint"
        yield Problem(
            "QP212",
            f"the model is already quantized ({printable(str(method))}): {printable(checkpoint.source)}",
            advice,
        )
    code = [key for key in ("auto_map", "_attn_implementation_internal", "trust_remote_code") if key in config]
    if code:
        text = f"config.json names code to run ({', '.join(code)}); none of it is run here"
        yield Problem("QP302", text, "look at the code before you load the result with trust_remote_code", severity="note")


def _origin(a: Assignment, *fields: str) -> Path | None:
    """The plan's path of the first field that a line of the plan set."""
    return next((o.path for f in fields if (o := a.origin.get(f)) and o.path is not None), None)


class _Findings:
    """Collects modules per (code, message, help, path), so that a cause is said once."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], list[str]] = {}

    def add(self, a: Assignment, *key: Any) -> None:
        self.found.setdefault(key, []).append(a.name)

    def problems(self) -> Iterator[Problem]:
        for (code, text, advice, path, severity), names in self.found.items():
            yield Problem(code, f"{text}, in {listing(names)}", advice, path, severity=severity)


def _tied(treated: list[Assignment]) -> Iterator[Problem]:
    for a in treated:
        if a.module.tied_to:
            text = f"'{a.name}' is tied to {a.module.tied_to}, which is kept"
            yield Problem("QP118", text, "leave the pair in the source precision: keep: true", _origin(a, "wq.scheme"))


def _divisible(treated: list[Assignment]) -> Iterator[Problem]:
    misfits: dict[tuple[int, Path | None], dict[str, tuple[int, list[int]]]] = {}
    for a in treated:
        assert a.wq is not None
        for config, part in ((a.wq, "wq"), (a.aq, "aq")):
            misfit = config.misfit(a.module.columns) if config is not None else None
            if misfit:
                path = _origin(a, f"{part}.group_size", f"{part}.scheme")
                misfits.setdefault((misfit[0], path), {})[a.name] = (a.module.columns, misfit[1])
    for (size, path), names in misfits.items():
        columns = sorted({c for c, _ in names.values()})
        sizes = [s for s in next(iter(names.values()))[1] if all(s in fits for _, fits in names.values())]
        shown = " and ".join(map(str, columns[:4]))
        advice = f"groups of {', '.join(map(str, sizes))} divide them all" if sizes else "use granularity: channel there"
        yield Problem("QP114", f"groups of {size} do not divide {shown} columns, in {listing(names)}", advice, path)


def _held(plan: Plan, treated: list[Assignment]) -> Iterator[Problem]:
    output = FORMATS.get(plan.output.format)()
    findings, answers = _Findings(), {}
    for a in treated:
        # by identity: hashing schemes of 70,000 modules takes longer than all else here
        key = (id(a.wq), id(a.aq), a.module.kind, a.module.columns, ".experts." in a.name, a.module.conv1d)
        if key not in answers:
            answers[key] = output.refuse(a)
        if answers[key]:
            text = f"format '{output.name}' cannot hold this: {answers[key]}"
            findings.add(a, "QP115", text, "", _origin(a, "wq.scheme", "aq.scheme"), "error")
    yield from findings.problems()


def engines_of(plan: Plan) -> list[Engine]:
    """The engines a plan is checked against: those it lists, or those its format is for."""
    return [ENGINES[e] for e in (plan.engines if plan.engines is not None else FORMATS.get(plan.output.format).engines)]


def _engines(plan: Plan, treated: list[Assignment]) -> Iterator[Problem]:
    findings, answers = _Findings(), {}
    severity = _severity(plan)
    for index, engine in enumerate(engines_of(plan)):
        if plan.output.format not in engine.formats:
            text = f"engine '{engine.name}' does not read format '{plan.output.format}'"
            yield Problem("QP116", text, f"it reads {', '.join(engine.formats)}", ("engines", index))
            continue
        if FORMATS.get(plan.output.format).own_reader:
            continue
        for a in treated:
            part = a.name.rpartition(".")[2]  # engines fuse layers by it
            shape = (a.module.kind, a.module.tensor.shape, a.module.dtype, part, ".experts." in a.name)
            key = (engine.name, id(a.wq), id(a.aq), *shape)
            if key not in answers:
                dtype = plan.output.dtype or a.module.dtype
                refusal, remark = engine.refuse(a, dtype), engine.remark(a, dtype)
                answers[key] = (
                    refusal and f"{engine.name} cannot run this: {refusal}",
                    remark and f"{engine.name}: {remark}",
                )
            refusal, remark = answers[key]
            for code, finding, weight in (("QP116", refusal, severity), ("QP121", remark, "note")):
                if finding:
                    findings.add(a, code, finding, "", _origin(a, "wq.scheme", "aq.scheme"), weight)
    yield from findings.problems()


def _expert_schemes(plan: Plan, assignments: Mapping[str, Assignment]) -> Iterator[Problem]:
    """For engines that read all experts of a model with one scheme: the first one's, or that of the first layer at all."""
    output = FORMATS.get(plan.output.format)
    single = [e.name for e in engines_of(plan) if e.one_scheme_for_experts and output.name in e.formats]
    experts = [a for a in assignments.values() if a.module.matrices and is_expert(a)]
    if not experts or not single or output.own_reader:
        return
    first = next((a for a in experts if a.wq is not None), None)
    if first is None:
        leading = next(a.wq.name for a in assignments.values() if a.wq is not None)
        others = [a for a in experts if a.module.kind == "linear" and leading not in ("fp8", "mxfp8")]
        reason = f"float experts can be read where the first quantized layer is fp8 or mxfp8, and it is {leading}"
    else:
        alike = {(id(a.wq), id(a.aq)): (a.wq, a.aq) == (first.wq, first.aq) for a in experts}
        others = [a for a in experts if not alike[id(a.wq), id(a.aq)]]
        reason = f"all experts of a model are read as {first.name} is"
    if others:
        text = f"{' and '.join(single)} cannot run this: {reason}; wrong for {listing([a.name for a in others])}"
        paths = (_origin(a, "wq.scheme", "wq.group_size", "aq.scheme") for a in (others[0], first or others[0]))
        path = next((p for p in paths if p and p[0] == "overrides"), None)
        yield Problem("QP116", text, "give all experts one scheme", path, severity=_severity(plan))


def _severity(plan: Plan) -> Severity:
    """Engines the plan does not name are the reader's guess: what they cannot run is said, but no obstacle."""
    return "note" if plan.engines is None else "error"


def _siblings(plan: Plan, assignments: Mapping[str, Assignment]) -> Iterator[Problem]:
    fusing = [engine.name for engine in engines_of(plan) if engine.fuses]
    if not fusing:
        return
    treatable = [a.name for a in assignments.values() if a.module.matrices]
    found: dict[tuple[str, Path | None], list[str]] = {}
    for key, names in fused_groups(treatable).items():
        first = assignments[names[0]]
        alike = (first.wq, first.aq, first.observer)
        other = next((b for n in names if ((b := assignments[n]).wq, b.aq, b.observer) != alike), None)
        if other is not None:
            kinds = "experts" if key.endswith(".experts") else ", ".join(n.rpartition(".")[2] for n in names)
            fields = ("wq.scheme", "wq.group_size", "aq.scheme", "aq.observer")
            paths = (_origin(a, field) for a in (other, first) for field in fields)
            found.setdefault((kinds, next((p for p in paths if p and p[0] == "overrides"), None)), []).append(key)
    for (kinds, path), keys in found.items():
        text = f"{kinds} are computed as one layer by {' and '.join(fusing)} and have different schemes, in {listing(keys)}"
        yield Problem("QP113", text, "give them one scheme, or name engines that do not fuse them", path)
