"""Plan files as plain data: read strictly and within limits, with the place of every key and value.

A YAML reader (libyaml) and a JSON reader each turn a file into the same events: `{`, `[`, `end` and `scalar`, with the
offsets where they start and end. One builder makes the data from the events, without recursion, and counts depth and
nodes while it does; so a hostile file ends in a problem and not in a crash.

JSON is what the `json` module reads, less NaN, Infinity, a key twice and half a surrogate pair. YAML is one document
with the scalars of the YAML 1.2 core schema: `no`, `on` and `12:30` are strings, `1e-3` is a float, `017` is 17 (YAML
1.1 read 15), `0o17` is 15, `0x1F` is 31. Anchors, aliases, merge keys and tags are refused: a plan needs none of them,
and each has been a way to make a small file explode. Keys are strings in both.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantplan.errors import Path, Place, Problem, QuantplanError, fail, printable
from quantplan.plan.json_events import json_events
from quantplan.plan.text import MAX_DEPTH, MAX_NODES, Event, Mark, Text
from quantplan.plan.yaml_events import yaml_events

MAX_MIB = {"YAML": 8, "JSON": 64}

# what may not stand in a file at all: it is then not text, or not text that every reader takes alike
NOT_TEXT = {
    "JSON": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]"),
    "YAML": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]"),
}
SURROGATE = re.compile("[\ud800-\udfff]")

NO_FILE: dict[type, str] = {
    FileNotFoundError: "plan file not found",
    IsADirectoryError: "plan file is a directory",
    PermissionError: "no permission to read the plan file",
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
    text = Text(name, _decode(name, data))
    if bad := NOT_TEXT[kind].search(text.body):
        message = f"control character U+{ord(bad[0]):04X} in the file"
        raise text.error("QP101", message, bad.start(), help="save the plan as UTF-8 text")
    events = json_events(text) if kind == "JSON" else yaml_events(text)
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
        text = Text(name, data.decode(errors="replace").lstrip("\ufeff"))
        place = text.place(len(data[:start].decode().lstrip("\ufeff")))
        found = f"byte {start} (0x{data[start]:02x}) is not UTF-8"
        problem = Problem("QP101", found, "save the plan as UTF-8", place=Place(**vars(place) | {"byte": start}))
        raise QuantplanError(problem) from error


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

    def __init__(self, text: Text, root: _Node, of_keys: bool) -> None:
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


def _guarded(text: Text, events: Iterable[Event]) -> Iterator[Event]:
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


def _build(text: Text, events: Iterable[Event]) -> tuple[object, _Node]:
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
