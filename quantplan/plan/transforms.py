"""The transforms of a plan: those it lists, and those its algorithms bring along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantplan.assignment import Assignment
from quantplan.errors import Path, Problem
from quantplan.headers import Checkpoint
from quantplan.plan.schema import Plan
from quantplan.transform import TRANSFORMS, Transform

KEY = "transforms"
LISTED = "a transform is done once"


def check_listed(plan: Plan) -> Iterator[Problem]:
    """Names given twice. What is wrong with single ones is checked as for algorithms."""
    seen: set[str] = set()
    for index, name in enumerate(_name(choice) for choice in plan.transforms):
        if name in seen:
            yield Problem("QP105", f"transform '{name}' is listed twice", LISTED, (KEY, index))
        seen.add(name)


def listed(plan: Plan) -> tuple[Transform, ...]:
    """The transforms a valid plan lists."""
    found = []
    for choice in plan.transforms:
        options = {k: v for k, v in choice.items() if k != "name"} if isinstance(choice, dict) else {}
        found.append(TRANSFORMS.get(_name(choice)).model_validate(options, strict=True))
    return tuple(found)


def with_implied(transforms: Sequence[Transform], assignments: Mapping[str, Assignment]) -> tuple[Transform, ...]:
    """The transforms, and those that algorithms imply: once each, and not where the plan lists them itself."""
    own = {t.name for t in transforms}
    algorithms = dict.fromkeys(a.algorithm for a in assignments.values() if a.wq is not None)
    implied = {n: options for algorithm in algorithms for n, options in algorithm.implies.items() if n not in own}
    return (*transforms, *(TRANSFORMS.get(n).model_validate(dict(options)) for n, options in implied.items()))


def check_fit(
    plan: Plan, transforms: Sequence[Transform], checkpoint: Checkpoint, assignments: Mapping[str, Assignment], in_memory: bool
) -> Iterator[Problem]:
    """Transforms that cannot work on this model, as far as headers tell."""
    places: dict[str, Path] = {_name(choice): (KEY, index) for index, choice in enumerate(plan.transforms)}
    for transform in transforms:
        path = places.get(transform.name)
        if in_memory:
            text = f"transform '{transform.name}' needs the model block by block, which a model in memory is not"
            yield Problem("QP122", text, "use quantplan.apply", path)
            continue
        for problem in transform.check(checkpoint, assignments):
            yield replace(problem, path=path)


def _name(choice: str | dict[str, object]) -> str:
    return choice if isinstance(choice, str) else str(choice.get("name"))
