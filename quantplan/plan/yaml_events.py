"""A YAML plan as events with offsets: one document, the scalars of the YAML 1.2 core schema, no anchors, aliases or tags."""

import re
from collections.abc import Iterator
from typing import Any

from quantplan.errors import QuantplanError, fail, printable
from quantplan.plan.text import FLOAT, INT, WORDS, Event, Text, number

MARKER = re.compile(r"[^\s,\[\]{}]*")
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
CORE_WORDS = {f(w): v for w, v in WORDS.items() for f in (str, str.title, str.upper)} | {"": None, "~": None}
YAML_HELP = {  # a part of libyaml's message -> what to do
    "alias": "put a pattern that starts with '*' in quotes",
    "mapping values are not allowed": "put text that holds ': ' in quotes, and check the indentation",
    "cannot start any token": "put text that starts with a special character in quotes",
    "scanning a quoted": "close the quotes",
    "parsing a quoted": "check the escape; single quotes know none",
    "flow": "check the commas and the closing bracket",
}


def yaml_events(text: Text) -> Iterator[Event]:
    """The events of a YAML file that holds one document."""
    import yaml

    kinds: dict[type, str] = {yaml.MappingStartEvent: "{", yaml.SequenceStartEvent: "[", yaml.ScalarEvent: "scalar"}
    kinds |= {yaml.MappingEndEvent: "end", yaml.SequenceEndEvent: "end"}
    documents = 0
    try:
        event: Any
        for event in yaml.parse(text.body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            start, end = event.start_mark.index, event.end_mark.index
            kind = kinds.get(type(event))
            if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
                raise _refused(text, start)
            if kind == "scalar":
                value = _core_value(text, event.value, start, end) if event.implicit[0] else event.value
                yield kind, start, end, value
            elif kind:
                yield kind, start, end, None
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise text.error("QP101", "second document in the file", start, end, "keep one plan in a file")
    except yaml.MarkedYAMLError as error:
        raise _malformed(text, error) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: "\\UFFFFFFFF" without libyaml
        raise fail("QP101", "malformed YAML", "check the escapes in double quotes", file=text.file) from error


def _refused(text: Text, start: int) -> QuantplanError:
    """The problem of an anchor, an alias or a tag."""
    marker = printable(MARKER.match(text.body, start)[0], 60)  # type: ignore[index]
    name = {"&": "anchor", "*": "alias"}.get(marker[:1], "tag")
    help = YAML_HELP["alias"] if name == "alias" else f"remove the {name}"
    return text.error("QP101", f"{name} '{marker}' in the plan", start, start + len(marker), help)


def _core_value(text: Text, plain: str, start: int, end: int) -> object:
    """What a scalar without quotes stands for."""
    if plain in CORE_WORDS:
        return CORE_WORDS[plain]
    if plain[0] in "+-.0123456789":
        if INT.fullmatch(plain) or FLOAT.fullmatch(plain):
            return number(text, plain, start, end)
        if NOT_FINITE.fullmatch(plain):
            raise text.error("QP101", f"'{plain}' is not a finite number", start, end, "write a finite number")
    if plain == "<<":
        raise text.error("QP101", "merge key '<<' in the plan", start, end, "write the keys out")
    return plain


def _malformed(text: Text, error: Any) -> QuantplanError:
    """The problem that a `yaml.MarkedYAMLError` tells of."""
    where: Any = error.problem_mark or error.context_mark
    opened: Any = error.context_mark or where
    start, context = where.index, error.context or ""
    if context == "while scanning an alias":
        return text.error("QP101", "'*' begins an alias", opened.index, start, YAML_HELP["alias"])
    if text.body[start : start + 1] == "\t":
        return text.error("QP101", "tab in the indentation", start, help="indent with spaces")
    message, line = f"{error.problem} {context}".strip(), text.mark(opened.index)[0]
    if line != text.place(start).line:
        message += f" that starts in line {line}"
    help = next((h for part, h in YAML_HELP.items() if part in message), "check the indentation and the quotes")
    return text.error("QP101", printable(message), start, help=help)
