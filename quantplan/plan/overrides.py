"""Findings about overrides: matching nothing, matching another number of modules than expected, never having the last word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from quantplan.errors import Path, Problem, QuantplanError, listing, printable
from quantplan.models.modules import Module
from quantplan.plan.pattern import match_names
from quantplan.plan.schema import Override, Plan


def match_overrides(plan: Plan, names: Sequence[str]) -> tuple[list[list[int]], list[Problem]]:
    """The indices of the names each override matches, and what is wrong with that."""
    matched: list[list[int]] = []
    problems: list[Problem] = []
    for index, override in enumerate(plan.overrides):
        try:
            matched.append(sorted({i for pattern in override.pattern for i in match_names(pattern, names)}))
        except QuantplanError as error:
            matched.append([])
            problems += [Problem(p.code, p.message, p.help, ("overrides", index, "pattern")) for p in error.problems]
    untried = {p.path for p in problems}  # an expression took too long: what it matches is not known
    return matched, problems + [p for p in check_matches(plan, matched, names) if p.path not in untried]


def check_matches(plan: Plan, matched: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[Problem]:
    """Overrides that match nothing, or not as many modules as they expect."""
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


def check_shadowed(
    plan: Plan, matched: Sequence[Sequence[int]], effective: set[int], words: Mapping[int, set[int]], modules: Sequence[Module]
) -> Iterator[Problem]:
    """Overrides that match modules and change nothing on any of them. `effective`: those with the last word somewhere;
    `words`: for each override, which have it where it matches."""
    for index, (override, found) in enumerate(zip(plan.overrides, matched, strict=True)):
        if not found or index in effective or override.optional:
            continue
        path: Path = ("overrides", index, "pattern")
        here = [modules[i] for i in found]
        later = Counter({o: len(set(matched[o]) & set(found)) for o in words.get(index, ()) if o > index})
        if all(m.keep for m in here):
            yield _kept(here, path)
        elif not {"wq", "aq", "group_size", "algorithm", "keep"} & override.model_fields_set:
            yield Problem("QP112", "override sets nothing", "give it wq, aq, group_size, algorithm or keep", path)
        elif later:
            hider, count = later.most_common(1)[0]
            shown = ", ".join(f"'{printable(p)}'" for p in plan.overrides[hider].pattern)
            decides = f"decides on {'all' if count == len(found) else count} of its {len(found)} modules"
            text = f"override never has the last word: override {hider + 1} ({shown}) {decides}"
            yield Problem("QP112", text, "move it below the other, or mark it optional: true", path)
        else:
            text = f"override changes nothing on {listing([m.name for m in here])}"
            yield Problem("QP112", text, "its options belong to a scheme or algorithm that is not in use there", path)


def _kept(modules: Sequence[Module], path: Path) -> Problem:
    rules = {m.keep.name: m.keep for m in modules if m.keep}
    named = " and ".join(repr(name) for name in sorted(rules))
    text = f"override changes nothing: built-in rule {named} keeps {listing([m.name for m in modules])}"
    if any(m.matrices for m in modules):
        return Problem("QP117", text, "add keep: false to quantize them all the same", path)
    return Problem("QP117", text, "; ".join(rule.why for rule in rules.values()), path)
