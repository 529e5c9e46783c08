"""Reading a plan: file -> plain data with places -> a valid `Plan`, or every problem at once."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from quantplan.algorithm import ALGORITHMS
from quantplan.engines import ENGINES
from quantplan.errors import Path, Problem, QuantplanError, did_you_mean, errors_in, fail, printable
from quantplan.format import FORMATS
from quantplan.observer import OBSERVERS, ObserverConfig
from quantplan.plan.calibration import KEY, check_source
from quantplan.plan.pattern import check_pattern
from quantplan.plan.schema import Calibration, KeyValueCache, Output, Override, Plan, Rule
from quantplan.plan.source import Source, read_source
from quantplan.plan.transforms import KEY as TRANSFORMS_KEY
from quantplan.plan.transforms import check_listed
from quantplan.registry import Registry
from quantplan.scheme import SCHEMES
from quantplan.transform import TRANSFORMS

CACHE = "kv_cache"
# names of the design whose machinery is not there yet: said so, not called unknown
PLANNED = {
    "format": ("gguf", "mlx", "onnx"),
    "engine": ("llama.cpp", "mlx", "onnxruntime", "sglang"),
}


@dataclass(frozen=True)
class LoadedPlan:
    """A valid plan, and where everything in it stands."""

    plan: Plan
    source: Source
    default_key: str = "default"

    def locate(self, problem: Problem) -> Problem:
        """The problem with its place in the file."""
        path = problem.path
        if path is None:
            return problem
        if path[:1] == ("default",):
            path = (self.default_key, *path[1:])
        return problem.at(self.source.locate(path, problem.at_key))

    def canonical(self) -> str:
        """The plan as one JSON text, the same for any spelling of the same plan; `$schema` is left out."""
        data = self.plan.model_dump(mode="json", exclude_unset=True, exclude={"schema_"})
        return json.dumps({"version": 1, **data}, sort_keys=True, separators=(",", ":"))


def load_plan(plan: str | os.PathLike[str] | Mapping[str, Any]) -> LoadedPlan:
    """A plan from a file, or from a dict. Raises QuantplanError with every problem that can be seen without a model."""
    loaded, problems = read_plan(plan)
    if problems:
        raise QuantplanError(problems)
    return loaded


def read_plan(plan: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[LoadedPlan, list[Problem]]:
    """A plan and what is wrong with it. What is wrong is left out of the plan, so that the rest can be checked too.

    Raises QuantplanError when the file is not JSON or YAML at all.
    """
    if isinstance(plan, Mapping):
        try:
            text = json.dumps(plan, indent=2)
        except (TypeError, ValueError) as error:
            raise fail("QP101", f"the plan is not JSON data: {error}") from None
        data, source = read_source("plan.json", text.encode())
    else:
        data, source = read_source(plan)
    if not isinstance(data, dict):
        problem = Problem("QP105", "a plan is an object with keys such as 'default'", path=())
        raise QuantplanError(problem.at(source.locate(())))
    return _validated(data, source)


def _validated(data: dict[str, Any], source: Source) -> tuple[LoadedPlan, list[Problem]]:
    key = "defaults" if "defaults" in data else "default"
    problems: list[Problem] = []
    if key == "defaults":
        if "default" in data:
            problem = Problem("QP102", "both 'default' and 'defaults'", "they are one key", ("defaults",), True)
            problems.append(problem.at(source.locate(("defaults",), True)))
        data = {("default" if k == "defaults" else k): v for k, v in data.items()}
    data = copy.deepcopy(data)
    while True:
        try:
            loaded = LoadedPlan(Plan.model_validate(data), source, key)
        except ValidationError as error:
            found = list(schema_problems(error, Plan, data))
            loaded = LoadedPlan(Plan(), source, key)
        else:
            found = list(check_plan(loaded.plan))
            if not found:
                return loaded, in_order(problems)
        problems += [loaded.locate(p) for p in found]
        for problem in found:
            _leave_out(data, problem)


def _leave_out(data: dict[str, Any], problem: Problem) -> None:
    """Removes the field a problem is about. An override whose pattern is bad matches nothing, and may."""
    path = problem.path or ()
    if path[:1] != ("overrides",) or len(path) < 2:
        inside = path[:1] in (("default",), ("output",), (KEY,), (CACHE,)) and path != (CACHE, "scheme")  # which it cannot lack
        names = [str(part) for part in path[: 2 if inside else 1]] or [""]
        holder = data if len(names) < 2 else data.get(names[0])
        if isinstance(holder, dict):
            holder.pop(names[-1], None)
        else:
            data.pop(names[0], None)
        return
    override = data["overrides"][path[1]]
    if not isinstance(override, dict):
        data["overrides"][path[1]] = {"pattern": "\0", "optional": True}
    elif len(path) == 2 or path[2] == "pattern":
        override |= {"pattern": "\0", "optional": True}
        override.pop("expect", None)
    else:
        override.pop(path[2], None)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems as one reads the file, notes last."""
    return sorted(problems, key=lambda p: (p.severity == "note", p.place.line or 0, p.place.column or 0, p.code))


def schema_problems(error: ValidationError, model: type[BaseModel], data: Any, prefix: Path = ()) -> Iterator[Problem]:
    """pydantic's findings as problems, with paths below `prefix`."""
    for item in error.errors(include_url=False, include_context=True):
        path = (*prefix, *item["loc"])
        kind, message = item["type"], item["msg"]
        if kind == "extra_forbidden":
            key = str(item["loc"][-1])
            yield Problem(
                "QP104", f"unknown key '{printable(key)}'", did_you_mean(key, _keys(item["loc"], model)), path, at_key=True
            )
        elif kind == "missing":
            yield Problem("QP105", f"key '{item['loc'][-1]}' is missing", path=path[:-1])
        elif kind == "literal_error" and item["loc"] == ("version",):
            yield Problem("QP106", f"this quantplan reads plans of version 1, not {item['input']!r}", path=path)
        elif kind == "value_error":
            # our own validators write "field: what is wrong"
            name, _, text = message.removeprefix("Value error, ").partition(": ")
            yield Problem("QP105", text or name, path=(*path, name) if text else path)
        else:
            yield Problem("QP105", f"{message[0].lower()}{message[1:]}", path=path)


def _keys(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    if len(loc) == 1:
        return [f.alias or n for n, f in model.model_fields.items()]
    if loc[0] in (KEY, "output", CACHE):
        parts: dict[str, type[BaseModel]] = {KEY: Calibration, "output": Output, CACHE: KeyValueCache}
        return list(parts[str(loc[0])].model_fields)
    return list((Override if loc[0] == "overrides" else Rule).model_fields)


def check_plan(plan: Plan) -> Iterator[Problem]:
    """What is wrong with a well-formed plan whatever the model: names, options, patterns, contradictions."""
    yield from _check_rule(plan.default, ("default",), is_default=True)
    for index, override in enumerate(plan.overrides):
        path: Path = ("overrides", index)
        yield from _check_rule(override, path)
        for place, pattern in enumerate(override.pattern):
            reason = check_pattern(pattern)
            if reason:
                yield Problem("QP109", f"pattern {reason}", path=(*path, "pattern", place))
    if plan.calibration is not None:
        yield from check_source(plan.calibration)
    for index, choice in enumerate(plan.transforms):
        yield from _check_choice(TRANSFORMS, choice, (TRANSFORMS_KEY, index), "name", True, {})
    yield from check_listed(plan)
    if plan.kv_cache is not None and plan.kv_cache.observer is not None:
        yield from _check_choice(OBSERVERS, plan.kv_cache.observer, (CACHE, "observer"), "name", True, {})
    yield from _check_name(FORMATS, plan.output.format, ("output", "format"))
    for index, engine in enumerate(plan.engines or ()):
        if engine not in ENGINES:
            yield _unknown("engine", engine, ENGINES, ("engines", index))


def _check_rule(rule: Rule, path: Path, is_default: bool = False) -> Iterator[Problem]:
    if rule.keep and (rule.wq is not None or rule.aq is not None):
        yield Problem("QP105", "keep: true beside a scheme", "keep means wq: null and aq: null", (*path, "keep"))
    if rule.group_size is not None and isinstance(rule.wq, dict) and "group_size" in rule.wq:
        yield Problem("QP105", "group_size is given twice", "it is short for wq.group_size", (*path, "group_size"))
    if is_default and rule.keep is False:
        yield Problem("QP105", "keep: false in the default", "lift built-in rules in overrides, by name", (*path, "keep"))
    short = {} if rule.group_size is None else {"group_size": rule.group_size}
    yield from _check_choice(SCHEMES, rule.wq, (*path, "wq"), "scheme", is_default, short)
    yield from _check_choice(SCHEMES, rule.aq, (*path, "aq"), "scheme", is_default, {})
    yield from _check_choice(ALGORITHMS, rule.algorithm, (*path, "algorithm"), "name", is_default, {})


def _check_choice(
    registry: Registry[Any], choice: Any, path: Path, key: str, is_default: bool, short: Mapping[str, Any]
) -> Iterator[Problem]:
    """A scheme or algorithm and its options: known names, known options, options it can take."""
    if choice is None:
        return
    options = dict(choice) if isinstance(choice, dict) else {key: choice}
    name = options.pop(key, None)
    where = (*path, key) if isinstance(choice, dict) else path
    activations = path[-1] == "aq"
    if activations and "observer" in options:
        yield from _check_choice(OBSERVERS, options.pop("observer"), (*path, "observer"), "name", True, {})
    if name is None:
        if is_default:
            yield Problem("QP105", f"key '{key}' is missing", f"say which {registry.kind}", path)
        known = {o for member in registry for o in _options_of(member, activations)}
        for option in options:
            if option not in known:
                yield Problem(
                    "QP104",
                    f"no {registry.kind} has an option '{printable(option)}'",
                    did_you_mean(option, known),
                    (*path, option),
                    True,
                )
        return
    if not isinstance(name, str):
        yield Problem("QP105", "expected a name", path=where)
        return
    problem = next(_check_name(registry, name, where), None)
    if problem:
        yield problem
        return
    member = registry.get(name)
    known = set(_options_of(member, activations))
    unknown = [o for o in options if o not in known]
    for option in unknown:
        text = f"{registry.kind} '{name}' has no option '{printable(option)}'"
        yield Problem(
            "QP104",
            text,
            did_you_mean(option, known | ({"observer"} if activations else set())),
            (*path, option),
            True,
        )
    if not unknown:
        yield from _try_options(member, options, path, short)


def _options_of(member: Any, activations: bool) -> Mapping[str, Any]:
    """What a plan may set of a scheme, an algorithm or an observer."""
    if issubclass(member, ObserverConfig):
        return member.options()
    options: Mapping[str, Any] = member.activation_options() if activations else member.plan_options()
    return options


def _try_options(member: Any, options: Mapping[str, Any], path: Path, short: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        member.model_validate({**options, **short}, strict=True)
    except ValidationError as error:
        for problem in schema_problems(error, member, options, path):
            assert problem.path is not None
            moved = problem.path[-1] in short or problem.path[-1] not in options
            yield Problem(
                problem.code,
                problem.message,
                problem.help,
                _nearest(problem.path, path, short) if moved else problem.path,
            )


def _nearest(found: Path, path: Path, short: Mapping[str, Any]) -> Path:
    """Where a finding about `wq.group_size` belongs when the plan wrote the short form, or nothing at all."""
    return (*path[:-1], found[-1]) if found[-1] in short else path


def _check_name(registry: Registry[Any], name: str, path: Path) -> Iterator[Problem]:
    if name not in registry:
        yield _unknown(registry.kind, name, registry.names(), path)


def _unknown(kind: str, name: str, known: Iterable[str], path: Path) -> Problem:
    if name in PLANNED.get(kind, ()):
        return Problem("QP108", f"{kind} '{name}' is not available yet", f"available: {', '.join(sorted(known))}", path)
    return Problem("QP107", f"unknown {kind} '{printable(name)}'", did_you_mean(name, known), path)


def has_errors(problems: Iterable[Problem]) -> bool:
    """Whether any problem stops the work."""
    return next(errors_in(problems), None) is not None
