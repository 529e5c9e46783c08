"""Plan files as plain data: read strictly and within limits, with the place of every key and value.

A YAML reader (libyaml) and a JSON reader each turn a file into the same events: `{`, `[`, `end` and `scalar`, with the
offsets where they start and end. One builder makes the data from the events, without recursion, and counts depth and
nodes while it does; so a hostile file ends in a problem and not in a crash.

JSON is what the `json` module reads, less NaN, Infinity, a key twice and half a surrogate pair. YAML is one document
with the scalars of the YAML 1.2 core schema: `no`, `on` and `12:30` are strings, `1e-3` is a float, `017` is 17 (YAML
1.1 read 15), `0o17` is 15, `0x1F` is 31. Anchors, aliases, merge keys and tags are refused: a plan needs none of them,
and each has been a way to make a small file explode. Keys are strings in both.
"""

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs lack it
from typing import Any

from quantplan.errors import Path, Place, Problem, QuantplanError, fail, printable

Mark = tuple[int, int, int]  # line, column, width; line and column count from 1
Event = tuple[str, int, int, object]  # kind, start, end, value

MAX_MIB = {"YAML": 8, "JSON": 64}
MAX_DEPTH, MAX_NODES, MAX_DIGITS = 64, 1_000_000, 30
MAX_LINES = 2 * MAX_NODES  # every value and every closing bracket in a line of its own

# what may not stand in a file at all: it is then not text, or not text that every reader takes alike
NOT_TEXT = {
    "JSON": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]"),
    "YAML": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]"),
}
BREAK = re.compile(r"\r\n|\n|\r")
SPACE = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile("[\ud800-\udfff]")
WORD = re.compile(r"-?[A-Za-z]+")
MARKER = re.compile(r"[^\s,\[\]{}]*")
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# the YAML 1.2 core schema, section 10.3.2
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
JSON_WORDS = {"null": None, "true": True, "false": False}
CORE_WORDS = {f(w): v for w, v in JSON_WORDS.items() for f in (str, str.title, str.upper)} | {"": None, "~": None}

NO_FILE: dict[type, str] = {
    FileNotFoundError: "plan file not found",
    IsADirectoryError: "plan file is a directory",
    PermissionError: "no permission to read the plan file",
}
YAML_HELP = {  # a part of libyaml's message -> what to do
    "alias": "put a pattern that starts with '*' in quotes",
    "mapping values are not allowed": "put text that holds ': ' in quotes, and check the indentation",
    "cannot start any token": "put text that starts with a special character in quotes",
    "scanning a quoted": "close the quotes",
    "parsing a quoted": "check the escape; single quotes know none",
    "flow": "check the commas and the closing bracket",
}
JSON_HELP = {  # the character found -> what to do
    "": "close what is still open",
    "]": "remove the comma before it",
    "}": "remove the comma before it",
    "'": "JSON strings stand in double quotes",
    "/": "JSON has no comments; a plan with comments is a .yaml file",
    "#": "JSON has no comments; a plan with comments is a .yaml file",
}


@dataclass(frozen=True)
class Source:
    """Where every key and value of a plan stands in its file. A collection in one line is marked whole."""

    file: str
    lines: tuple[str, ...]
    keys: Mapping[Path, Mark]
    values: Mapping[Path, Mark]

    def locate(self, path: Path, at_key: bool = False) -> Place:
        """The place of the value at `path`, or of its key; where the file lacks it, that of what would hold it."""
        mark = self.keys.get(path) if at_key else None
        while mark is None and (mark := self.values.get(path)) is None:
            if not path:
                return Place(self.file)
            path = path[:-1]
        line, column, width = mark
        return Place(self.file, line, column, width, self.lines[line - 1])


def read_source(file: str | os.PathLike[str], data: bytes | None = None) -> tuple[object, Source]:
    """The data of a plan file and its places; JSON when the name ends in `.json`, else YAML.

    `data` is the content where it is known already; then `file` is a name only. Whatever is wrong is a `QuantplanError`
    of one problem: QP100 (no such file), QP101 (not JSON or YAML), QP102 (a key twice), QP103 (over a limit).
    """
    name = os.fspath(file)
    kind = "JSON" if name.lower().endswith(".json") else "YAML"
    limit = MAX_MIB[kind] << 20
    if data is None:
        data = _read(name, limit + 1)
    if len(data) > limit:
        raise fail("QP103", f"{kind} plan is larger than {MAX_MIB[kind]} MiB", "use fewer, wider patterns", file=name)
    text = _Text(name, _decode(name, data))
    if bad := NOT_TEXT[kind].search(text.body):
        message = f"control character U+{ord(bad[0]):04X} in the file"
        raise text.error("QP101", message, bad.start(), help="save the plan as UTF-8 text")
    events = _json_events(text) if kind == "JSON" else _yaml_events(text)
    value, root = _build(text, _guarded(text, events))
    return value, Source(name, text.lines, _Marks(text, root, of_keys=True), _Marks(text, root, of_keys=False))


def _read(name: str, size: int) -> bytes:
    """At most `size` bytes of the file."""
    try:
        with open(name, "rb") as stream:
            return stream.read(size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        message = NO_FILE.get(type(error), f"plan file cannot be read: {reason}")
        raise fail("QP100", message, "check the path and its permissions", file=name) from error


def _decode(name: str, data: bytes) -> str:
    """The text of the file, without a byte order mark."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise fail("QP101", "plan file is UTF-16, not UTF-8", "save the plan as UTF-8", file=name, byte=0)
    try:
        return data.decode().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        start = error.start
        text = _Text(name, data.decode(errors="replace").lstrip("\ufeff"))
        place = text.place(len(data[:start].decode().lstrip("\ufeff")))
        found = f"byte {start} (0x{data[start]:02x}) is not UTF-8"
        problem = Problem("QP101", found, "save the plan as UTF-8", place=Place(**vars(place) | {"byte": start}))
        raise QuantplanError(problem) from error


class _Text:
    """The text of a file and the way from offsets in it to lines and columns."""

    def __init__(self, file: str, body: str) -> None:
        if max(body.count("\n"), body.count("\r")) > MAX_LINES:
            raise fail("QP103", f"more than {MAX_LINES:,} lines", "use fewer, wider patterns", file=file)
        self.file, self.body = file, body
        self.lines = tuple(BREAK.split(body))
        self.starts = [0, *(m.end() for m in BREAK.finditer(body))]

    def mark(self, start: int, end: int = 0) -> Mark:
        """The mark of `body[start:end]`, at most to the end of its first line."""
        line = bisect_right(self.starts, start)
        column = start - self.starts[line - 1]
        return line, column + 1, max(1, min(end - start, len(self.lines[line - 1].rstrip()) - column))

    def place(self, start: int, end: int = 0) -> Place:
        """Like `mark`; the end of the file is the end of its last word, where the caret can be seen."""
        line, column, width = self.mark(min(start, len(self.body.rstrip())), end)
        return Place(self.file, line, column, width, self.lines[line - 1])

    def error(self, code: str, message: str, start: int, end: int = 0, help: str = "") -> QuantplanError:
        return QuantplanError(Problem(code, message, help, place=self.place(start, end)))


@dataclass(slots=True)
class _Node:
    """The offsets of one value and of its key (0, 0 where it has none), and what it holds, by key or index."""

    start: int
    end: int
    key_start: int
    key_end: int
    children: "dict[str | int, _Node]"


class _Marks(Mapping[Path, Mark]):
    """The marks of all keys or of all values. Worked out when asked for: a million paths are not small."""

    def __init__(self, text: _Text, root: _Node, of_keys: bool) -> None:
        self._text, self._root, self._of_keys = text, root, of_keys

    def __getitem__(self, path: Path) -> Mark:
        node = self._root
        for key in path:
            node = node.children[key]
        if not self._of_keys:
            return self._of_value(node)
        if not node.key_end:
            raise KeyError(path)
        return self._text.mark(node.key_start, node.key_end)

    def _of_value(self, node: _Node) -> Mark:
        line, column, width = self._text.mark(node.start, node.end)
        if node.children and self._text.mark(node.end)[0] != line:  # over several lines: its first word stands for it
            first = next(iter(node.children.values()))
            width = max(1, first.key_end - first.key_start) if first.key_start == node.start else 1
        return line, column, width

    def __iter__(self) -> Iterator[Path]:
        todo: list[tuple[Path, _Node]] = [((), self._root)]
        while todo:
            path, node = todo.pop()
            if node.key_end or not self._of_keys:
                yield path
            todo += [((*path, key), child) for key, child in reversed(node.children.items())]

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _guarded(text: _Text, events: Iterable[Event]) -> Iterator[Event]:
    """The same events, as long as they stay within the limits."""
    count = depth = 0
    for event in events:
        kind, start, end, value = event
        count += kind != "end"
        depth += (kind in "{[") - (kind == "end")
        if count > MAX_NODES:
            message = f"more than {MAX_NODES:,} keys and values"
            raise text.error("QP103", message, start, help="use fewer, wider patterns")
        if depth > MAX_DEPTH:
            raise text.error("QP103", f"nested deeper than {MAX_DEPTH} levels", start, help="nest less")
        if isinstance(value, str) and SURROGATE.search(value):
            raise text.error("QP101", "half a surrogate pair in a string", start, end, "write the character itself")
        yield event


def _build(text: _Text, events: Iterable[Event]) -> tuple[object, _Node]:
    """The data that the events describe, and the offsets of all its parts."""
    top, nothing = _Node(0, 0, 0, 0, {}), dict[str | int, _Node]()
    holders: list[Any] = [[]]  # the collections open now, the innermost last; the first one is there to hold the whole
    nodes = [top]
    key, key_start, key_end, last = None, 0, 0, 0  # the key whose value comes next, the end of the last token
    for kind, start, end, value in events:
        holder, siblings = holders[-1], nodes[-1].children
        if kind == "end":  # that of a block collection is where the next token begins, which says nothing about it
            last = end if end > start else last
            nodes.pop().end = last
            holders.pop()
        elif isinstance(holder, dict) and key is None:
            if kind != "scalar" or not isinstance(value, str):
                shown = printable(text.body[start:end], 40)
                message = f"key '{shown}' is not a string" if shown else "key is not a string"
                raise text.error("QP101", message, start, end, "put the key in quotes")
            if value in holder:
                path = (*(next(reversed(n.children)) for n in nodes[1:-1]), value)  # what is open is the last so far
                first = text.mark(siblings[value].key_start)[0]
                message = f"key '{printable(value, 60)}' is set twice, first in line {first}"
                place = text.place(start, end)
                raise QuantplanError(Problem("QP102", message, "keep one of the two", path, at_key=True, place=place))
            key, key_start, key_end, last = value, start, end, end
        else:
            made: Any = {} if kind == "{" else [] if kind == "[" else value
            node = _Node(start, end, key_start, key_end, nothing if kind == "scalar" else {})
            if isinstance(holder, dict):
                holder[key] = made
                siblings[str(key)] = node
            else:
                siblings[len(holder)] = node
                holder.append(made)
            key, key_start, key_end, last = None, 0, 0, end
            if kind != "scalar":
                holders.append(made)
                nodes.append(node)
    if not top.children:
        raise text.error("QP101", "plan file is empty", 0, help="write at least a version and a default")
    return holders[0][0], top.children[0]


def _number(text: _Text, literal: str, start: int, end: int) -> int | float:
    """The number that a literal of the core schema, of which JSON's are a part, stands for."""
    if INT.fullmatch(literal):
        if len(literal.lstrip("+-").removeprefix("0x").removeprefix("0o")) > MAX_DIGITS:
            message = f"integer has more than {MAX_DIGITS} digits"
            raise text.error("QP103", message, start, end, "write a smaller number")
        return int(literal, {"0x": 16, "0o": 8}.get(literal[:2], 10))
    number = float(literal)
    if not math.isfinite(number):
        raise text.error("QP101", "number is too large for a float", start, end, "write a smaller number")
    return number


def _json_events(text: _Text) -> Iterator[Event]:
    """The events of a JSON file."""
    body, closers, state, at = text.body, "", "value", 0  # states: value, first item, key, first key, after
    while True:
        at = SPACE.match(body, at).end()  # type: ignore[union-attr]
        char, closer = body[at : at + 1], closers[-1:]
        if state == "after" and not closer:
            if char:
                raise text.error("QP101", "more text after the end of the JSON value", at, help="keep one value")
            return
        if not (char or closer):
            return
        if char and char == closer and state in ("first item", "first key", "after"):
            at, closers, state = at + 1, closers[:-1], "after"
            yield "end", at - 1, at, None
        elif state == "after":
            if char != ",":
                raise _unexpected(text, at, f"',' or '{closer}'")
            at, state = at + 1, "key" if closer == "}" else "value"
        elif state.endswith("key"):
            if char != '"':
                raise _unexpected(text, at, "a key in double quotes")
            key, end = _json_string(text, at)
            yield "scalar", at, end, key
            at = SPACE.match(body, end).end()  # type: ignore[union-attr]
            if body[at : at + 1] != ":":
                raise _unexpected(text, at, "':'")
            at, state = at + 1, "value"
        elif char in ("{", "["):
            yield char, at, at + 1, None
            at, closers, state = at + 1, closers + "}]"[char == "["], "first key" if char == "{" else "first item"
        else:
            value, end = _json_scalar(text, at, char)
            yield "scalar", at, end, value
            at, state = end, "after"


def _json_string(text: _Text, at: int) -> tuple[str, int]:
    try:
        found: tuple[str, int] = scanstring(text.body, at + 1, True)
        return found
    except json.JSONDecodeError as error:
        message = error.msg.lower().removesuffix(" at").removesuffix(" starting")
        help = "close the string, or write the character as an escape"
        raise text.error("QP101", message, error.pos, help=help) from error


def _json_scalar(text: _Text, at: int, char: str) -> tuple[object, int]:
    if char == '"':
        return _json_string(text, at)
    if number := JSON_NUMBER.match(text.body, at):
        return _number(text, number[0], at, number.end()), number.end()
    word = WORD.match(text.body, at)
    if not word:
        raise _unexpected(text, at, "a value")
    if word[0] not in JSON_WORDS:
        help = "JSON knows null, true, false, finite numbers and strings in double quotes"
        raise text.error("QP101", f"'{printable(word[0], 40)}' is not a JSON value", at, word.end(), help)
    return JSON_WORDS[word[0]], word.end()


def _unexpected(text: _Text, at: int, expected: str) -> QuantplanError:
    char = text.body[at : at + 1]
    found = f"'{printable(char)}'" if char else "the end of the file"
    help = JSON_HELP.get(char, f"write {expected} here")
    return text.error("QP101", f"expected {expected}, found {found}", at, help=help)


def _yaml_events(text: _Text) -> Iterator[Event]:
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


def _refused(text: _Text, start: int) -> QuantplanError:
    """The problem of an anchor, an alias or a tag."""
    marker = printable(MARKER.match(text.body, start)[0], 60)  # type: ignore[index]
    name = {"&": "anchor", "*": "alias"}.get(marker[:1], "tag")
    help = YAML_HELP["alias"] if name == "alias" else f"remove the {name}"
    return text.error("QP101", f"{name} '{marker}' in the plan", start, start + len(marker), help)


def _core_value(text: _Text, plain: str, start: int, end: int) -> object:
    """What a scalar without quotes stands for."""
    if plain in CORE_WORDS:
        return CORE_WORDS[plain]
    if plain[0] in "+-.0123456789":
        if INT.fullmatch(plain) or FLOAT.fullmatch(plain):
            return _number(text, plain, start, end)
        if NOT_FINITE.fullmatch(plain):
            raise text.error("QP101", f"'{plain}' is not a finite number", start, end, "write a finite number")
    if plain == "<<":
        raise text.error("QP101", "merge key '<<' in the plan", start, end, "write the keys out")
    return plain


def _malformed(text: _Text, error: Any) -> QuantplanError:
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
