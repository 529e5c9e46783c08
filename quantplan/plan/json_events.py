"""A JSON plan as events with offsets: what the `json` module reads, less NaN and infinity. Not recursive."""

import json
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs lack it

from quantplan.errors import QuantplanError, printable
from quantplan.plan.text import WORDS, Event, Text, number

SPACE = re.compile(r"[ \t\n\r]*")
WORD = re.compile(r"-?[A-Za-z]+")
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
JSON_HELP = {  # the character found -> what to do
    "": "close what is still open",
    "]": "remove the comma before it",
    "}": "remove the comma before it",
    "'": "JSON strings stand in double quotes",
    "/": "JSON has no comments; a plan with comments is a .yaml file",
    "#": "JSON has no comments; a plan with comments is a .yaml file",
}


def json_events(text: Text) -> Iterator[Event]:
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


def _json_string(text: Text, at: int) -> tuple[str, int]:
    try:
        found: tuple[str, int] = scanstring(text.body, at + 1, True)
        return found
    except json.JSONDecodeError as error:
        message = error.msg.lower().removesuffix(" at").removesuffix(" starting")
        help = "close the string, or write the character as an escape"
        raise text.error("QP101", message, error.pos, help=help) from error


def _json_scalar(text: Text, at: int, char: str) -> tuple[object, int]:
    if char == '"':
        return _json_string(text, at)
    if found := JSON_NUMBER.match(text.body, at):
        return number(text, found[0], at, found.end()), found.end()
    word = WORD.match(text.body, at)
    if not word:
        raise _unexpected(text, at, "a value")
    if word[0] not in WORDS:
        help = "JSON knows null, true, false, finite numbers and strings in double quotes"
        raise text.error("QP101", f"'{printable(word[0], 40)}' is not a JSON value", at, word.end(), help)
    return WORDS[word[0]], word.end()


def _unexpected(text: Text, at: int, expected: str) -> QuantplanError:
    char = text.body[at : at + 1]
    found = f"'{printable(char)}'" if char else "the end of the file"
    help = JSON_HELP.get(char, f"write {expected} here")
    return text.error("QP101", f"expected {expected}, found {found}", at, help=help)
