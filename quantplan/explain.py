"""`explain`: each field's value and the line that set it. `diff`: what two plans treat differently, and the bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantplan.assignment import Assignment, Origin
from quantplan.checkpoint.layout import output_layout
from quantplan.plan.pattern import match_names
from quantplan.plan.resolve import Resolution


@dataclass(frozen=True)
class Field:
    """One decided field: `wq.group_size`, its value, and where it comes from (`plan.yaml:7:12`, or what decided instead)."""

    name: str
    value: Any
    origin: str


def describe_origin(resolution: Resolution, origin: Origin | None) -> str:
    """`plan.yaml:7:12`, or the built-in rule, or the scheme's default."""
    if origin is None:
        return "default"
    if origin.path is None:
        return origin.label
    path = origin.path
    if path[:1] == ("default",):
        path = (resolution.loaded.default_key, *path[1:])
    return str(resolution.loaded.source.locate(path))


def explain_module(resolution: Resolution, assignment: Assignment) -> list[Field]:
    """Every field of one module's treatment: both schemes with all their options, then the algorithm."""
    fields = []
    for part, head, config in (
        ("wq", "scheme", assignment.wq),
        ("aq", "scheme", assignment.aq),
        ("algorithm", "name", assignment.algorithm),
    ):
        if part == "algorithm" and assignment.wq is None:
            continue
        name = config.name if config is not None else None
        fields.append(Field(f"{part}.{head}", name, describe_origin(resolution, assignment.origin.get(f"{part}.{head}"))))
        for option in _options(part, config):
            value = getattr(config, option)
            origin = assignment.origin.get(f"{part}.{option}")
            if origin is None and option in ("granularity", "group_size"):
                value = config.strategy if option == "granularity" else config.group  # type: ignore[union-attr]
            fields.append(Field(f"{part}.{option}", value, describe_origin(resolution, origin)))
        if part == "aq" and assignment.observer is not None:
            shown = {"name": assignment.observer.name, **assignment.observer.model_dump(mode="json")}
            fields.append(Field("aq.observer", shown, describe_origin(resolution, assignment.origin.get("aq.observer"))))
    return fields


def _options(part: str, config: Any) -> Iterable[str]:
    if config is None:
        return ()
    options: Iterable[str] = config.activation_options() if part == "aq" else config.plan_options()
    return options


def summary(assignment: Assignment) -> str:
    """A treatment in a few words: `int4 group 64, activations int8 token, rtn`, or `kept (embeddings)`."""
    if assignment.wq is None:
        rule = assignment.module.keep
        by_rule = assignment.origin["wq.scheme"].path is None and rule is not None
        return f"kept ({rule.name})" if by_rule and rule else "kept"
    text = scheme_text(assignment.wq)
    if assignment.aq is not None:
        text += f", activations {scheme_text(assignment.aq)}"
    return text if assignment.algorithm.name == "rtn" else f"{text}, {assignment.algorithm.name}"


def transform_text(resolution: Resolution) -> list[str]:
    """The transforms in the order they are done, with options that are not the defaults, and what brought each along."""
    lines = []
    own = {c if isinstance(c, str) else c.get("name") for c in resolution.plan.transforms}
    for transform in resolution.transforms:
        changed = {n: v for n, v in transform.model_dump(mode="json").items() if v != type(transform).model_fields[n].default}
        options = f" ({', '.join(f'{n}: {v}' for n, v in changed.items())})" if changed else ""
        origin = "the plan" if transform.name in own else "an algorithm"
        lines.append(f"{transform.name}{options}, from {origin}")
    return lines


def scheme_text(config: Any) -> str:
    """`int4 group 64 asymmetric`."""
    words = [config.name, "" if config.dynamic else "static", config.strategy, str(config.group or "")]
    return " ".join(word for word in [*words, "" if config.symmetric_grid else "asymmetric"] if word)


def totals(resolution: Resolution) -> list[tuple[str, int, int]]:
    """(treatment, modules, weights) for every treatment, most weights first."""
    import math

    found: dict[str, list[int]] = {}
    for a in resolution.assignments.values():
        entry = found.setdefault(summary(a), [0, 0])
        entry[0] += 1
        entry[1] += math.prod(a.module.tensor.shape)
    return sorted(((t, n, w) for t, (n, w) in found.items()), key=lambda item: -item[2])


def chosen(resolution: Resolution, patterns: Sequence[str]) -> list[Assignment]:
    """The assignments whose names match any of `patterns`; all of them without patterns."""
    names = list(resolution.assignments)
    if not patterns:
        return list(resolution.assignments.values())
    return [resolution.assignments[names[i]] for i in sorted({i for p in patterns for i in match_names(p, names)})]


@dataclass(frozen=True)
class Change:
    """A module that two plans treat differently. Bytes are what is stored for it."""

    module: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int


def diff(a: Resolution, b: Resolution) -> list[Change]:
    """The modules that `a` and `b`, plans on the same checkpoint, treat differently, in the checkpoint's order."""
    stored_a, stored_b = stored_bytes(a), stored_bytes(b)
    changes = []
    for name in dict.fromkeys((*a.assignments, *b.assignments)):
        before, after = a.assignments.get(name), b.assignments.get(name)
        if before is None or after is None:  # a head that one of them unties from the embedding
            said = [summary(found) if found is not None else "tied" for found in (before, after)]
            changes.append(Change(name, said[0], said[1], stored_a.get(name, 0), stored_b.get(name, 0)))
        elif _treatment(before) != _treatment(after) or stored_a[name] != stored_b[name]:
            options = _changed_options(before, after)
            shown = f"{summary(after)} ({options})" if summary(before) == summary(after) and options else summary(after)
            changes.append(Change(name, summary(before), shown, stored_a[name], stored_b[name]))
    return changes


def _treatment(a: Assignment) -> tuple[Any, ...]:
    return (a.wq, a.aq, a.observer, a.algorithm if a.wq is not None else None)


def _changed_options(before: Assignment, after: Assignment) -> str:
    changed = []
    for part in ("wq", "aq", "algorithm"):
        old, new = getattr(before, part), getattr(after, part)
        if old is not None and new is not None and old.name == new.name:
            changed += [
                f"{part}.{o}: {getattr(old, o)} → {getattr(new, o)}"
                for o in _options(part, old)
                if getattr(old, o) != getattr(new, o)
            ]
    return ", ".join(changed)


def stored_bytes(resolution: Resolution) -> Mapping[str, int]:
    """Module -> bytes of its tensors in the output."""
    owner = {a.module.tensor.name: a.name for a in resolution.assignments.values()}
    found = dict.fromkeys(resolution.assignments, 0)
    for file in output_layout(resolution).files:
        for unit in file.units:
            if unit.source.name in owner:
                found[owner[unit.source.name]] += unit.size
    return found
