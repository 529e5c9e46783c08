"""Plan + checkpoint headers -> assignments, with every finding at once. Pure: no weights, no files, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.assignment import Assignment, Origin
from quantplan.errors import Problem, QuantplanError, did_you_mean, errors_in, printable
from quantplan.headers import Checkpoint
from quantplan.kv_cache import KVCache
from quantplan.models.keep import KeepRule
from quantplan.models.modules import Module, find_modules
from quantplan.observer import ObserverConfig
from quantplan.plan.activations import build_observer
from quantplan.plan.calibration import check_default
from quantplan.plan.cascade import State, cascade, keeps, lifts, live_overrides, options, origins
from quantplan.plan.kv_cache import bind_cache
from quantplan.plan.lint import lint
from quantplan.plan.load import LoadedPlan, in_order, schema_problems
from quantplan.plan.overrides import check_shadowed, match_overrides
from quantplan.plan.schema import Calibration, Plan
from quantplan.plan.transforms import check_fit, listed, with_implied
from quantplan.scheme import SCHEMES, SchemeConfig
from quantplan.transform import Transform

SOURCE_DTYPE = Origin(label="dtype of the source")


@dataclass(frozen=True)
class Resolution:
    """A plan bound to a checkpoint: an assignment for every module, and what was found."""

    loaded: LoadedPlan
    checkpoint: Checkpoint
    assignments: Mapping[str, Assignment]
    problems: tuple[Problem, ...] = ()
    matches: Mapping[int, int] = field(default_factory=dict)  # override -> how many modules it matches
    transforms: tuple[Transform, ...] = ()
    kv_cache: KVCache | None = None
    collected: Calibration | None = None  # what statistics that were collected before were collected with

    @property
    def plan(self) -> Plan:
        return self.loaded.plan

    @property
    def quantized(self) -> list[Assignment]:
        """The assignments that change a weight."""
        return [a for a in self.assignments.values() if a.wq is not None]

    @property
    def needs_data(self) -> list[Assignment]:
        """The assignments that take calibration: for their weights, or for a static range of their activations."""
        return [a for a in self.quantized if a.algorithm.takes_data or a.observer is not None]

    @property
    def takes_data(self) -> bool:
        """Whether anything must see activations: an assignment, a transform, or the key-value cache."""
        return bool(self.needs_data) or any(t.needs_data for t in self.transforms) or self.kv_cache is not None

    @property
    def calibration(self) -> Calibration:
        """The calibration settings: of statistics collected before, or the plan's; the defaults, text the model writes itself,
        where it has none."""
        return self.collected or self.plan.calibration or Calibration()

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
    observer: ObserverConfig | None = None


def resolve(loaded: LoadedPlan, checkpoint: Checkpoint, live: Mapping[str, Module] | None = None) -> Resolution:
    """Every module's treatment, and every problem: overrides that match nothing or never have the last word, options that
    do not go together, groups that do not divide, what the format or an engine cannot hold, fused siblings that differ.

    `live`: the modules of a model in memory, instead of those the checkpoint stores; no format or engine has to hold them.
    """
    plan, transforms = loaded.plan, listed(loaded.plan)
    for transform in transforms if live is None else ():
        checkpoint = transform.stored(checkpoint)
    modules = find_modules(checkpoint) if live is None else live
    names = list(modules)
    matched, problems = match_overrides(plan, names)
    masks: dict[int, list[int]] = {}
    for index, found in enumerate(matched):
        for i in found:
            masks.setdefault(i, []).append(index)
    shared: dict[tuple[Any, ...], _Treatment] = {}
    schemes: dict[SchemeConfig | None, SchemeConfig | None] = {}  # equal ones are one object: quick to compare
    assignments: dict[str, Assignment] = {}
    words: dict[int, set[int]] = {}  # override -> overrides that had the last word where it matched
    for i, module in enumerate(modules.values()):
        mask = tuple(masks.get(i, ()))
        lifted = module.keep is not None and module.kind != "other" and any(lifts(plan.overrides[o], module.name) for o in mask)
        keep = None if lifted else module.keep
        key = (mask, keep.name if keep else None, module.dtype)
        if key not in shared:
            shared[key] = _treat(plan, mask, keep, module.dtype, schemes)
            problems += shared[key].problems
            for o in mask:
                words.setdefault(o, set()).update(shared[key].live)
        treatment = shared[key]
        assignments[module.name] = Assignment(
            module, treatment.wq, treatment.aq, treatment.algorithm, treatment.origin, treatment.observer
        )
    effective = {o for treatment in shared.values() for o in treatment.live}
    problems += check_shadowed(plan, matched, effective, words, list(modules.values()))
    kv_cache = bind_cache(plan, checkpoint, modules, problems, in_memory=live is not None)
    problems += lint(plan, checkpoint, assignments, in_memory=live is not None)
    transforms = with_implied(transforms, assignments)
    problems += check_fit(plan, transforms, checkpoint, assignments, in_memory=live is not None)
    counts = {i: len(found) for i, found in enumerate(matched)}
    resolution = Resolution(loaded, checkpoint, assignments, (), counts, transforms, kv_cache=kv_cache)
    if live is None and resolution.takes_data:
        problems += check_default(plan.calibration, checkpoint.config)
    return replace(resolution, problems=_placed(loaded, problems))


def _placed(loaded: LoadedPlan, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(in_order(dict.fromkeys(loaded.locate(p) for p in problems)))


def _treat(
    plan: Plan,
    mask: tuple[int, ...],
    keep: KeepRule | None,
    dtype: str,
    schemes: dict[SchemeConfig | None, SchemeConfig | None],
) -> _Treatment:
    rules = [(plan.default, ("default",)), *((plan.overrides[o], ("overrides", o)) for o in mask)]
    state = cascade(rules, keep)
    live = live_overrides(state, keep)
    if keep is not None:  # an override that keeps what is kept anyway is right, if redundant
        live |= {o for o in mask if keeps(plan.overrides[o])}
    problems: list[Problem] = []
    chosen = state.pop("aq.observer", None)  # the one option of `aq` that is not its scheme's
    wq, aq = (_scheme(state, part, dtype, problems) for part in ("wq", "aq"))
    observer = _observer(chosen, aq, state, problems)
    wq, aq = (schemes.setdefault(config, config) for config in (wq, aq))
    if aq is not None and wq is None and state["wq.scheme"][0] is None:
        origin = state["aq.scheme"][1]
        problems.append(
            Problem("QP120", "activations are quantized and the weight is not", "add aq: null, or keep: true", origin.path)
        )
    algorithm = _build(ALGORITHMS.get(state["algorithm.name"][0]), options(state, "algorithm"), state, "algorithm", problems)
    return _Treatment(
        wq, aq, algorithm or ALGORITHMS.get("rtn")(), origins(state), frozenset(live), state, tuple(problems), observer
    )


def _scheme(state: State, part: str, dtype: str, problems: list[Problem]) -> SchemeConfig | None:
    name = state[f"{part}.scheme"][0]
    if name is None:
        return None
    member = SCHEMES.get(name)
    given = options(state, part)
    by_token = "token" in member.granularities and given.get("dynamic") is not False
    if part == "aq" and "granularity" not in given and "group_size" not in given and by_token:
        given["granularity"] = "token"
        state["aq.granularity"] = ("token", Origin(label="activations"))
    if "scale_dtype" in member.model_fields and "scale_dtype" not in given:
        given["scale_dtype"] = dtype if dtype in ("bfloat16", "float16") else "bfloat16"
        state[f"{part}.scale_dtype"] = (given["scale_dtype"], SOURCE_DTYPE)
    return _build(member, given, state, part, problems)


def _observer(
    chosen: tuple[Any, Origin] | None, aq: SchemeConfig | None, state: State, problems: list[Problem]
) -> ObserverConfig | None:
    """What finds the range of static activations; None for dynamic ones, which may have lost their `dynamic: false` to a later
    rule, but not never had it."""
    if aq is None:
        return None
    if chosen is not None:
        state["aq.observer"] = chosen
    if aq.dynamic:
        if chosen is not None and "aq.dynamic" not in state:
            text = "an observer finds the range of static activations, and these are dynamic"
            problems.append(Problem("QP105", text, "add dynamic: false", chosen[1].path))
        return None
    made = build_observer(chosen[0] if chosen else None, aq)
    if isinstance(made, ObserverConfig):
        return made
    code, text, advice = made
    problems.append(Problem(code, text, advice, chosen[1].path if chosen else None))
    return None


def _build(member: Any, given: Mapping[str, Any], state: State, part: str, problems: list[Problem]) -> Any:
    """A config from options gathered over several rules; a misfit is laid at the rule that set the option last."""
    known = member.activation_options() if part == "aq" else member.plan_options()
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
