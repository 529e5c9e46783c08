"""Plan + checkpoint headers -> assignments, with every finding at once. Pure: no weights, no files, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.assignment import Assignment, Origin
from quantplan.errors import Path, Problem, QuantplanError, did_you_mean, errors_in, listing, printable
from quantplan.headers import Checkpoint
from quantplan.models.keep import STRUCTURAL, KeepRule
from quantplan.models.modules import INTERLEAVED, Module, find_modules
from quantplan.plan.cascade import State, cascade, lifts, live_overrides, options, origins
from quantplan.plan.lint import lint
from quantplan.plan.load import LoadedPlan, in_order, schema_problems
from quantplan.plan.pattern import match_names
from quantplan.plan.schema import Override, Plan
from quantplan.scheme import SCHEMES, SchemeConfig

SOURCE_DTYPE = Origin(label="dtype of the source")
UNTREATABLE = {rule.name for rule in (*STRUCTURAL, INTERLEAVED)}


@dataclass(frozen=True)
class Resolution:
    """A plan bound to a checkpoint: an assignment for every module, and what was found."""

    loaded: LoadedPlan
    checkpoint: Checkpoint
    assignments: Mapping[str, Assignment]
    problems: tuple[Problem, ...] = ()
    matches: Mapping[int, int] = field(default_factory=dict)  # override -> how many modules it matches

    @property
    def plan(self) -> Plan:
        return self.loaded.plan

    @property
    def quantized(self) -> list[Assignment]:
        """The assignments that change a weight."""
        return [a for a in self.assignments.values() if a.wq is not None]

    @property
    def notes(self) -> list[Problem]:
        return [p for p in self.problems if p.severity == "note"]

    def require(self) -> Resolution:
        """Itself, when nothing stops the work. Raises QuantplanError with every problem."""
        stopping = tuple(errors_in(self.problems))
        if stopping:
            raise QuantplanError(stopping)
        return self


@dataclass(frozen=True)
class _Treatment:
    """What modules with the same matching overrides, keep rule and dtype share."""

    wq: SchemeConfig | None
    aq: SchemeConfig | None
    algorithm: Algorithm
    origin: Mapping[str, Origin]
    live: frozenset[int]
    state: State
    problems: tuple[Problem, ...] = ()


def resolve(loaded: LoadedPlan, checkpoint: Checkpoint) -> Resolution:
    """Every module's treatment, and every problem: overrides that match nothing or never have the last word, options that
    do not go together, groups that do not divide, what the format or an engine cannot hold, fused siblings that differ."""
    plan, modules = loaded.plan, find_modules(checkpoint)
    names = list(modules)
    problems: list[Problem] = []
    matched: list[list[int]] = []
    untried: set[int] = set()  # overrides whose expression took too long: what they match is not known
    for index, override in enumerate(plan.overrides):
        try:
            matched.append(sorted({i for pattern in override.pattern for i in match_names(pattern, names)}))
        except QuantplanError as error:
            matched.append([])
            untried.add(index)
            problems += [Problem(p.code, p.message, p.help, ("overrides", index, "pattern")) for p in error.problems]
    problems += (p for p in _check_matches(plan, matched, names) if p.path and p.path[1] not in untried)
    masks: dict[int, list[int]] = {}
    for index, found in enumerate(matched):
        for i in found:
            masks.setdefault(i, []).append(index)
    shared: dict[tuple[Any, ...], _Treatment] = {}
    assignments: dict[str, Assignment] = {}
    words: dict[int, set[int]] = {}  # override -> overrides that had the last word where it matched
    for i, module in enumerate(modules.values()):
        mask = tuple(masks.get(i, ()))
        lifted = module.keep is not None and module.kind != "other" and any(lifts(plan.overrides[o], module.name) for o in mask)
        keep = None if lifted else module.keep
        key = (mask, keep.name if keep else None, module.dtype)
        if key not in shared:
            shared[key] = _treat(plan, mask, keep, module.dtype)
            problems += shared[key].problems
        treatment = shared[key]
        for o in mask:
            words.setdefault(o, set()).update(treatment.live)
        assignments[module.name] = Assignment(module, treatment.wq, treatment.aq, treatment.algorithm, treatment.origin)
    problems += _check_shadowed(plan, matched, shared, words, [modules[n] for n in names])
    problems += lint(plan, checkpoint, assignments)
    return Resolution(
        loaded, checkpoint, assignments, _placed(loaded, problems), {i: len(found) for i, found in enumerate(matched)}
    )


def _placed(loaded: LoadedPlan, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(in_order(dict.fromkeys(loaded.locate(p) for p in problems)))


def _treat(plan: Plan, mask: tuple[int, ...], keep: KeepRule | None, dtype: str) -> _Treatment:
    rules = [(plan.default, ("default",)), *((plan.overrides[o], ("overrides", o)) for o in mask)]
    state = cascade(rules, keep)
    live = live_overrides(state, keep)
    if keep is not None:  # an override that keeps what is kept anyway is right, if redundant
        live |= {o for o in mask if plan.overrides[o].keep or {"wq", "aq"} & plan.overrides[o].model_fields_set and plan.overrides[o].wq is None}
    problems: list[Problem] = []
    wq = _scheme(state, "wq", dtype, problems)
    aq = _scheme(state, "aq", dtype, problems)
    if aq is not None and wq is None and state["wq.scheme"][0] is None:
        origin = state["aq.scheme"][1]
        problems.append(Problem("QP120", "activations are quantized and the weight is not", "add aq: null, or keep: true", origin.path))
    algorithm = _build(ALGORITHMS.get(state["algorithm.name"][0]), options(state, "algorithm"), state, "algorithm", problems)
    return _Treatment(wq, aq, algorithm or ALGORITHMS.get("rtn")(), origins(state), frozenset(live), state, tuple(problems))


def _scheme(state: State, part: str, dtype: str, problems: list[Problem]) -> SchemeConfig | None:
    name = state[f"{part}.scheme"][0]
    if name is None:
        return None
    member = SCHEMES.get(name)
    given = options(state, part)
    if part == "aq" and "granularity" not in given and "group_size" not in given and "token" in member.granularities:
        given["granularity"] = "token"
        state["aq.granularity"] = ("token", Origin(label="activations"))
    if "scale_dtype" in member.model_fields and "scale_dtype" not in given:
        given["scale_dtype"] = dtype if dtype in ("bfloat16", "float16") else "bfloat16"
        state[f"{part}.scale_dtype"] = (given["scale_dtype"], SOURCE_DTYPE)
    return _build(member, given, state, part, problems)


def _build(member: Any, given: Mapping[str, Any], state: State, part: str, problems: list[Problem]) -> Any:
    """A config from options gathered over several rules; a misfit is laid at the rule that set the option last."""
    known = member.plan_options()
    head = state[f"{part}.{'name' if part == 'algorithm' else 'scheme'}"]
    foreign = [o for o in given if o not in known]
    for option in foreign:
        text = f"{part} '{head[0]}' has no option '{printable(option)}'"
        path = state[f"{part}.{option}"][1].path
        problems.append(Problem("QP104", text, did_you_mean(option, known), path, True))
    if foreign:
        return None
    try:
        return member.model_validate(dict(given), strict=True)
    except ValidationError as error:
        for problem in schema_problems(error, member, given):
            option = str((problem.path or ("",))[-1])
            path = state.get(f"{part}.{option}", head)[1].path or head[1].path
            problems.append(Problem(problem.code, problem.message, problem.help, path))
        return None


def _check_matches(plan: Plan, matched: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[Problem]:
    for index, (override, found) in enumerate(zip(plan.overrides, matched, strict=True)):
        path: Path = ("overrides", index, "pattern")
        if override.expect is not None and len(found) != override.expect:
            text = f"override matches {len(found)} modules, not the {override.expect} it expects"
            yield Problem("QP111", text, listing([names[i] for i in found]) if found else "", ("overrides", index, "expect"))
        elif not found and not override.optional and override.expect is None:
            shown = ", ".join(f"'{printable(p)}'" for p in override.pattern)
            yield Problem("QP110", f"override matches no module: {shown}", _nearest_pattern(override, names), path)


def _nearest_pattern(override: Override, names: Sequence[str]) -> str:
    """A pattern that would match, with one part of a name replaced by the nearest that exists."""
    import difflib

    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for pattern in override.pattern:
        if pattern.startswith("re:"):
            continue
        pieces = pattern.split(".")
        for at, piece in enumerate(pieces):
            bare = piece.strip("*")
            if not bare or bare in parts or bare.isdigit():
                continue
            contained = [p for p in parts if bare in p]
            for candidate in (*contained, *difflib.get_close_matches(bare, parts, n=3, cutoff=0.4)):
                mended = ".".join((*pieces[:at], piece.replace(bare, candidate), *pieces[at + 1 :]))
                if match_names(mended, names):
                    return f"did you mean '{mended}'? mark it optional: true if it is for other models"
    return "mark it optional: true if it is for other models"


def _check_shadowed(
    plan: Plan,
    matched: Sequence[Sequence[int]],
    shared: Mapping[tuple[Any, ...], _Treatment],
    words: Mapping[int, set[int]],
    modules: Sequence[Module],
) -> Iterator[Problem]:
    """Overrides that match modules and change nothing on any of them."""
    live = {o for treatment in shared.values() for o in treatment.live}
    for index, (override, found) in enumerate(zip(plan.overrides, matched, strict=True)):
        if not found or index in live or override.optional:
            continue
        path: Path = ("overrides", index, "pattern")
        kept = {modules[i].keep for i in found}
        if all(keep is not None for keep in kept):
            rules = sorted({keep.name for keep in kept if keep})
            hard = all(modules[i].kind == "other" or modules[i].keep.name in UNTREATABLE for i in found)  # type: ignore[union-attr]
            why = "; ".join(sorted({keep.why for keep in kept if keep}))
            text = f"override changes nothing: built-in rule {' and '.join(repr(r) for r in rules)} keeps {listing([modules[i].name for i in found])}"
            yield Problem("QP117", text, why if hard else "add keep: false to quantize them all the same", path)
            continue
        sets = {"wq", "aq", "group_size", "algorithm", "keep"} & override.model_fields_set
        later = Counter({o: len(set(matched[o]) & set(found)) for o in words.get(index, ()) if o > index})
        if not sets:
            yield Problem("QP112", "override sets nothing", "give it wq, aq, group_size, algorithm or keep", path)
        elif later:
            hider = later.most_common(1)[0][0]
            shown = ", ".join(f"'{printable(p)}'" for p in plan.overrides[hider].pattern)
            text = f"override never has the last word: override {hider + 1} ({shown}) decides on {'all' if later[hider] == len(found) else later[hider]} of its {len(found)} modules"
            yield Problem("QP112", text, "move it below the other, or mark it optional: true", path)
        else:
            text = f"override changes nothing on {listing([modules[i].name for i in found])}"
            yield Problem("QP112", text, "its options belong to a scheme or algorithm that is not in use there", path)
