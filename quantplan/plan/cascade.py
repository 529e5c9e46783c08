"""The cascade: `default`, then every override that matches, top to bottom, field by field; a later field wins, and naming
another scheme or algorithm drops the options of the one it replaces. Every value keeps where it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantplan.assignment import Origin
from quantplan.errors import Path
from quantplan.models.keep import KeepRule
from quantplan.plan.pattern import is_literal
from quantplan.plan.schema import Override, Rule

State = dict[str, tuple[Any, Origin]]  # field, as `wq.group_size` -> value and origin
BUILT_IN = Origin(label="default")
_PARTS = {"wq": "scheme", "aq": "scheme", "algorithm": "name"}


def cascade(rules: Iterable[tuple[Rule, Path]], keep: KeepRule | None) -> State:
    """The fields a module ends with. `keep`: the built-in rule that applies to it, already known not to be lifted."""
    state: State = {"wq.scheme": (None, BUILT_IN), "aq.scheme": (None, BUILT_IN), "algorithm.name": ("rtn", BUILT_IN)}
    for rule, path in rules:
        for field, value, origin in rule_fields(rule, path):
            _set(state, field, value, origin)
    if keep is not None:
        by_rule = Origin(label=f"built-in rule: {keep.name}")
        for field in ("wq.scheme", "aq.scheme"):
            if state[field][0] is not None or state[field][1].path is None:
                _set(state, field, None, by_rule)
    return state


def rule_fields(rule: Rule, path: Path) -> Iterator[tuple[str, Any, Origin]]:
    """The fields one rule sets, heads (scheme, name) before their options."""
    if rule.keep:
        yield "wq.scheme", None, Origin((*path, "keep"))
        yield "aq.scheme", None, Origin((*path, "keep"))
    if rule.keep is False:
        yield "keep", False, Origin((*path, "keep"))
    given = rule.model_fields_set
    for part, head in _PARTS.items():
        if part in given:
            yield from _choice(part, head, getattr(rule, part), path)
    if rule.group_size is not None:
        yield "wq.group_size", rule.group_size, Origin((*path, "group_size"))


def _choice(part: str, head: str, choice: Any, path: Path) -> Iterator[tuple[str, Any, Origin]]:
    if not isinstance(choice, dict):
        yield f"{part}.{head}", choice, Origin((*path, part))
        return
    if head in choice:
        yield f"{part}.{head}", choice[head], Origin((*path, part, head))
    for option, value in choice.items():
        if option != head:
            yield f"{part}.{option}", value, Origin((*path, part, option))


def _set(state: State, field: str, value: Any, origin: Origin) -> None:
    part, _, name = field.partition(".")
    if _PARTS.get(part) == name and state[field][0] != value:
        for option in [f for f in state if f.startswith(f"{part}.")]:
            del state[option]
    state[field] = (value, origin)


def keeps(override: Override) -> bool:
    """Whether an override says to leave the weight alone."""
    return bool(override.keep) or ("wq" in override.model_fields_set and override.wq is None)


def lifts(override: Override, name: str) -> bool:
    """Whether an override takes a module out of the built-in keep rules: by naming it, or with `keep: false`."""
    return override.keep is False or (
        override.wq is not None and name in override.pattern and any(map(is_literal, override.pattern))
    )


def options(state: State, part: str) -> dict[str, Any]:
    """The options of one part, without its head."""
    head = f"{part}.{_PARTS[part]}"
    return {f.partition(".")[2]: v for f, (v, _) in state.items() if f.startswith(f"{part}.") and f != head}


def origins(state: State) -> Mapping[str, Origin]:
    """Field -> origin."""
    return {field: origin for field, (_, origin) in state.items()}


def live_overrides(state: State, keep: KeepRule | None) -> set[int]:
    """Overrides that have the last word on some field that counts: options of a part that is null do not, nor does
    `keep: false` where the built-in rule stands all the same."""
    live = set()
    for field, (_, origin) in state.items():
        part = field.partition(".")[0]
        counts = (field == "keep" and keep is None) or field.endswith(".scheme") or _head(state, part) is not None
        if part == "algorithm" and _head(state, "wq") is None:
            counts = False
        if counts and origin.path is not None and origin.path[0] == "overrides":
            live.add(int(origin.path[1]))
    return live


def _head(state: State, part: str) -> Any:
    return state[f"{part}.{_PARTS[part]}"][0] if part in _PARTS else None
