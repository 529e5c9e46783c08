"""Patterns over module names: shell globs, and full-match regular expressions after `re:`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import translate

from quantplan.errors import fail

REGEX_LIMIT = 512  # characters
REGEX_SECONDS = 0.05  # for one expression over all names, of CPU time: plans of strangers are checked in CI
REGEX_SECONDS_A_NAME = 2e-5  # on top, for each name: ten times what an honest expression takes
WILDCARDS = re.compile(r"[*?\[]")


def check_pattern(pattern: str) -> str | None:
    """Why a pattern cannot be used; None when it can."""
    if not pattern.startswith("re:"):
        return None
    if len(pattern) > REGEX_LIMIT:
        return f"is longer than {REGEX_LIMIT} characters"
    import regex

    try:
        regex.compile(pattern[3:])
    except regex.error as error:
        return f"is not a regular expression: {error}"
    return None


def is_literal(pattern: str) -> bool:
    """Whether a pattern can match one name only."""
    return not pattern.startswith("re:") and not WILDCARDS.search(pattern)


def match_names(pattern: str, names: Sequence[str]) -> list[int]:
    """Indices of the names a pattern matches. Raises QP109 when an expression takes too long."""
    if is_literal(pattern):
        return [i for i, name in enumerate(names) if name == pattern]
    if pattern.startswith("re:"):
        return _match_regex(pattern[3:], names)
    match: Callable[[str], object] = re.compile(translate(pattern)).match
    # the longest literal stretch rules most names out at a fraction of the cost of matching
    stretch = max(re.split(r"[*?]|\[.*?\]", pattern), key=len) if "[" not in pattern else ""
    return [i for i, name in enumerate(names) if stretch in name and match(name)]


def _match_regex(expression: str, names: Sequence[str]) -> list[int]:
    import time

    import regex

    # CPU time, as `regex` counts it: on a busy machine an honest expression is not refused
    deadline = time.thread_time() + REGEX_SECONDS + len(names) * REGEX_SECONDS_A_NAME
    compiled = regex.compile(expression)
    found = []
    try:
        for index, name in enumerate(names):
            left = deadline - time.thread_time()
            if left <= 0:
                raise TimeoutError
            if compiled.fullmatch(name, timeout=left):
                found.append(index)
    except TimeoutError:
        advice = "write it without nested repetition, or as a glob"
        raise fail("QP109", f"pattern 're:{expression}' takes too long to match", advice) from None
    return found
