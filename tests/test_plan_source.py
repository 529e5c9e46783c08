"""Reading plan files: values, places, refusals and limits, in YAML and in JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from quantplan.errors import Problem, QuantplanError, render
from quantplan.plan.source import Source, read_source

BLOCK = """\
version: 1
default:   # for all
  wq: {scheme: int4, group_size: 64}
  "keep": false
overrides:
  - pattern: "*.down_proj"  # the wide ones
    wq: null
  - pattern: [a, b]
empty:
"""
FLOW = """\
{
  "version": 1,
\t"default": {"wq": {"scheme": "int4", "group_size": 64},
              "keep": false},
  "overrides": [
    {"pattern": "*.down_proj", "wq": null}, {
     "pattern": ["a", "b"]}], "empty": null
}
"""
DATA = {
    "version": 1,
    "default": {"wq": {"scheme": "int4", "group_size": 64}, "keep": False},
    "overrides": [{"pattern": "*.down_proj", "wq": None}, {"pattern": ["a", "b"]}],
    "empty": None,
}


def load(text: str | bytes, name: str = "plan.yaml") -> object:
    return read_source(name, text.encode() if isinstance(text, str) else text)[0]


def problem(text: str | bytes, name: str = "plan.yaml") -> Problem:
    """The one problem of a text that cannot be read."""
    with pytest.raises(QuantplanError) as caught:
        load(text, name)
    (found,) = caught.value.problems
    assert found.message[0].islower() or found.message.startswith(("YAML", "JSON", "'"))
    assert not found.message.endswith(".") and found.help and found.place.file == name
    assert render(found)
    return found


def at(found: Problem) -> tuple[str, int | None, int | None]:
    return found.code, found.place.line, found.place.column


# values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("no", "yes", "on", "off", "y", "No", "12:30", "1:2:3", "nULL", "tRUE", "1_000")],
        *[(word, word) for word in ("0b11", "0O17", "0X1F", "-0x1F", "1e", "e3", ".", "-.", "+", "1.2.3", "2020-01-01")],
        *[(word, word) for word in ("inf", "nan", "NaN", "Infinity", "=", "int4", "1e-3x", "١")],
        *[(word, None) for word in ("null", "Null", "NULL", "~", "# a comment", "")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, False) for word in ("false", "False", "FALSE")],
        *[("0", 0), ("-0", 0), ("+12", 12), ("017", 17), ("08", 8), ("0o17", 15), ("0x1F", 31), ("9" * 30, 10**30 - 1)],
        *[("1e-3", 0.001), ("1E3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-1.5e+2", -150.0), ("1e-999", 0.0)],
        *[('"1"', "1"), ("'no'", "no"), ('"null"', "null"), ('""', ""), (r'"a\tb\u00e9"', "a\tbé"), ("'<<'", "<<")],
        *[("a b\n  c", "a b c"), ("|\n  017\n", "017\n"), (">-\n  1\n", "1"), ("é 😀", "é 😀")],
        *[("[]", []), ("{}", {}), ("[a: 1, b]", [{"a": 1}, "b"]), ("{a, b: }", {"a": None, "b": None})],
        ("{yes: 1, 'no': 2, '1': 3, '<<': 4}", {"yes": 1, "no": 2, "1": 3, "<<": 4}),
    ],
)
def test_yaml_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    loaded = load(f"key: {text}\n")
    assert loaded == {"key": value}
    assert type(loaded["key"]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "null",
            "true",
            "0",
            "-0",
            "1e3",
            "-1.5E-2",
            "-0.0",
            "1e-999",
            "[]",
            "{}",
            ' [ 1 , "a" ] ',
            '{"a":{"b":[{}]}}',
        ],
        *['""', r'"\u00e9\/\n\ud83d\ude00"', '"é😀\u2028\x7f"', '"<<"', "\r\n\t[1]\r\n", '{"&a": "*b", "": "!!str"}'],
    ],
)
def test_json_reads_as_the_json_module_does(text: str) -> None:
    assert repr(load(text, "plan.json")) == repr(json.loads(text))


@pytest.mark.parametrize(("name", "text"), [("a.yaml", BLOCK), ("a.yml", FLOW), ("a.txt", BLOCK), ("a.JSON", FLOW)])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_newlines_and_byte_order_mark_change_nothing(name: str, text: str, bom: str, newline: str) -> None:
    if name == "a.yml":
        text = text.replace("\t", "  ")
    value, source = read_source(name, (bom + text.replace("\n", newline)).encode())
    plain = read_source(name, text.encode())[1]
    assert value == DATA
    assert (dict(source.keys), dict(source.values), source.lines) == (dict(plain.keys), dict(plain.values), plain.lines)


def test_reads_from_disk(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(BLOCK)
    value, source = read_source(file)
    assert value == DATA
    assert source.file == str(file)
    assert str(source.locate(("version",))) == f"{file}:1:10"


# places


@pytest.mark.parametrize(
    ("text", "name", "path", "at_key", "expected"),
    [
        (BLOCK, "p.yaml", (), False, (1, 1, "version")),
        (BLOCK, "p.yaml", ("version",), False, (1, 10, "1")),
        (BLOCK, "p.yaml", ("version",), True, (1, 1, "version")),
        (BLOCK, "p.yaml", ("default",), False, (3, 3, "wq")),
        (BLOCK, "p.yaml", ("default", "wq"), False, (3, 7, "{scheme: int4, group_size: 64}")),
        (BLOCK, "p.yaml", ("default", "wq", "group_size"), True, (3, 22, "group_size")),
        (BLOCK, "p.yaml", ("default", "wq", "group_size"), False, (3, 34, "64")),
        (BLOCK, "p.yaml", ("default", "keep"), True, (4, 3, '"keep"')),
        (BLOCK, "p.yaml", ("overrides",), False, (6, 3, "-")),
        (BLOCK, "p.yaml", ("overrides", 0), False, (6, 5, "pattern")),
        (BLOCK, "p.yaml", ("overrides", 0, "pattern"), False, (6, 14, '"*.down_proj"')),
        (BLOCK, "p.yaml", ("overrides", 0, "wq"), True, (7, 5, "wq")),
        (BLOCK, "p.yaml", ("overrides", 1), False, (8, 5, "pattern: [a, b]")),
        (BLOCK, "p.yaml", ("overrides", 1, "pattern", 1), False, (8, 18, "b")),
        (BLOCK, "p.yaml", ("empty",), False, (9, 7, "")),
        ("a: |\n  x\n  y\nb: 'c\n  d' # e\n", "p.yaml", ("a",), False, (1, 4, "|")),
        ("a: |\n  x\n  y\nb: 'c\n  d' # e\n", "p.yaml", ("b",), False, (4, 4, "'c")),
        ("é: 😀\nb: [é😀, x]", "p.yaml", ("b", 1), False, (2, 9, "x")),
        ("- - a\n  - b\n- c", "p.yaml", (0, 1), False, (2, 5, "b")),
        (FLOW, "p.json", (), False, (1, 1, "{")),
        (FLOW, "p.json", ("version",), True, (2, 3, '"version"')),
        (FLOW, "p.json", ("default",), True, (3, 2, '"default"')),
        (FLOW, "p.json", ("default",), False, (3, 13, "{")),
        (FLOW, "p.json", ("default", "wq"), False, (3, 20, '{"scheme": "int4", "group_size": 64}')),
        (FLOW, "p.json", ("overrides", 0), False, (6, 5, '{"pattern": "*.down_proj", "wq": null}')),
        (FLOW, "p.json", ("overrides", 0, "wq"), False, (6, 38, "null")),
        (FLOW, "p.json", ("overrides", 1), False, (6, 45, "{")),
        (FLOW, "p.json", ("overrides", 1, "pattern", 1), False, (7, 23, '"b"')),
        ('"\\ud83d\\ude00"', "p.json", (), False, (1, 1, '"\\ud83d\\ude00"')),
    ],
)
def test_places(text: str, name: str, path: tuple, at_key: bool, expected: tuple[int, int, str]) -> None:
    source = read_source(name, text.encode())[1]
    place = source.locate(path, at_key)
    line, column, marked = expected
    assert (place.file, place.line, place.column) == (name, line, column)
    assert place.text == text.split("\n")[line - 1]
    assert place.width == max(1, len(marked))
    assert place.text[column - 1 :][: place.width] == marked or not marked
    assert (source.keys if at_key else source.values)[path] == (line, column, place.width)


@pytest.mark.parametrize("at_key", [False, True])
def test_a_path_the_file_lacks_is_located_at_what_would_hold_it(at_key: bool) -> None:
    source = read_source("p.yaml", BLOCK.encode())[1]
    path: tuple[str | int, ...]
    for path in [("overrides", 0, "aq"), ("overrides", 0, "aq", "int4", "bits"), ("overrides", 0, 7)]:
        assert source.locate(path, at_key) == source.locate(("overrides", 0))
    for path in [("overrides", 2), ("overrides", -1), ("overrides", "0"), ("overrides", 9, "wq")]:
        assert source.locate(path, at_key) == source.locate(("overrides",))
    assert source.locate(("version", "x"), at_key) == source.locate(("version",))
    assert source.locate(("nothing",), at_key) == source.locate(())


def test_an_item_of_a_list_has_no_key_and_is_located_by_its_value() -> None:
    source = read_source("p.yaml", BLOCK.encode())[1]
    assert ("overrides", 0) not in source.keys and () not in source.keys
    assert source.locate(("overrides", 0), at_key=True) == source.locate(("overrides", 0))


def test_a_source_that_knows_nothing_still_names_the_file() -> None:
    assert str(Source("p.yaml", (), {}, {}).locate(("a", 1))) == "p.yaml"


# refusals


@pytest.mark.parametrize(
    ("text", "code", "line", "column", "part"),
    [
        ("", "QP101", 1, 1, "empty"),
        (" \n\n# only a comment\n", "QP101", 1, 1, "empty"),
        ("a: 1\n---\nb: 2\n", "QP101", 2, 1, "second document"),
        ("a: 1\n...\n---\n", "QP101", 3, 1, "second document"),
        ("a:\n\t- 1\n", "QP101", 2, 1, "tab"),
        ("a:\n  b: 1\n c: 2\n", "QP101", 3, 2, "block mapping"),
        ("a: b: c", "QP101", 1, 5, "mapping values"),
        ("a: [1, 2\nb: 3", "QP101", 2, 2, "flow sequence that starts in line 1"),
        ('a: "x\n\nb: 1\n', "QP101", 3, 5, "quoted scalar that starts in line 1"),
        ('a: "\\x"', "QP101", 1, 7, "hex"),
        ('a: "\\UFFFFFFFF"', "QP101", 1, 7, "escape"),
        ("a: @x", "QP101", 1, 4, "cannot start any token"),
        ("%YAML 2.0\n---\na: 1", "QP101", 1, 1, "incompatible"),
        ("a: *.down_proj", "QP101", 1, 4, "'*' begins an alias"),
        ("a: *lm_head*", "QP101", 1, 4, "'*' begins an alias"),
        ("a: [*lm_head, 1]", "QP101", 1, 5, "alias '*lm_head'"),
        ("a: &x [1]\nb: 2", "QP101", 1, 4, "anchor '&x'"),
        ("- &x {a: 1}\n", "QP101", 1, 3, "anchor '&x'"),
        ("&x a: 1", "QP101", 1, 1, "anchor '&x'"),
        ("a: !!str 1", "QP101", 1, 4, "tag '!!str'"),
        ("a: !!python/object/apply:os.system ['true']", "QP101", 1, 4, "tag '!!python/object/apply:os.system'"),
        ("--- !!map\na: 1", "QP101", 1, 5, "tag '!!map'"),
        ("a: ! x", "QP101", 1, 4, "tag '!'"),
        ("a: !<x:y> {}", "QP101", 1, 4, "tag '!<x:y>'"),
        ("b: 1\n<<: {a: 1}", "QP101", 2, 1, "merge key"),
        ("a: .nan", "QP101", 1, 4, "not a finite number"),
        ("a: [-.INF]", "QP101", 1, 5, "not a finite number"),
        ("a: 1e999", "QP101", 1, 4, "too large"),
        ("1: x", "QP101", 1, 1, "key '1' is not a string"),
        ("{a: 1, true: x}", "QP101", 1, 8, "key 'true' is not a string"),
        ("~: x", "QP101", 1, 1, "key '~' is not a string"),
        ("1.5: x", "QP101", 1, 1, "key '1.5' is not a string"),
        ("? [a]\n: x", "QP101", 1, 3, "not a string"),
        ("? - a\n: x", "QP101", 1, 3, "not a string"),
        ("a: {{name}}", "QP101", 1, 5, "key '{' is not a string"),
        ("a: 1\n?\n: x", "QP101", 2, 2, "not a string"),
        ("a: 1\nb: 2\na: 3", "QP102", 3, 1, "key 'a' is set twice, first in line 1"),
        ("a: {b: 1, 'b': 2}", "QP102", 1, 11, "first in line 1"),
        ("yes: 1\n'yes': 2", "QP102", 2, 1, "first in line 1"),
        ("a: " + "1" * 31, "QP103", 1, 4, "30 digits"),
        ("a: -" + "1" * 5000, "QP103", 1, 4, "30 digits"),
        ("a: 0x" + "f" * 5000, "QP103", 1, 4, "30 digits"),
        ("a: x\x00", "QP101", 1, 5, "U+0000"),
        ("a: \x1b[31m", "QP101", 1, 4, "U+001B"),
        ("a: 1\nb: \x85\x9f", "QP101", 2, 5, "U+009F"),
        ("- " * 65 + "a", "QP103", 1, 129, "deeper than 64"),
        ("[" * 65 + "]" * 65, "QP103", 1, 65, "deeper than 64"),
    ],
)
def test_yaml_refusals(text: str, code: str, line: int, column: int, part: str) -> None:
    found = problem(text)
    assert at(found) == (code, line, column)
    assert part in found.message


@pytest.mark.parametrize(
    ("text", "code", "line", "column", "part"),
    [
        ("", "QP101", 1, 1, "empty"),
        ("\n\t\n", "QP101", 1, 1, "empty"),
        ("[1,\n]", "QP101", 2, 1, "expected a value, found ']'"),
        ('{"a": 1,}', "QP101", 1, 9, "expected a key in double quotes, found '}'"),
        ("{,}", "QP101", 1, 2, "found ','"),
        ("[,1]", "QP101", 1, 2, "found ','"),
        ('{"a" 1}', "QP101", 1, 6, "expected ':', found '1'"),
        ('{"a": }', "QP101", 1, 7, "expected a value"),
        ('{"a": 1 "b": 2}', "QP101", 1, 9, "expected ',' or '}'"),
        ("[1 2]", "QP101", 1, 4, "expected ',' or ']'"),
        ("[1}", "QP101", 1, 3, "expected ',' or ']', found '}'"),
        ("[1\n\n", "QP101", 1, 3, "found the end of the file"),
        ('{"a"', "QP101", 1, 5, "found the end of the file"),
        ("{", "QP101", 1, 2, "found the end of the file"),
        ("[1] [2]", "QP101", 1, 5, "more text after"),
        ("01", "QP101", 1, 2, "more text after"),
        ("[1.]", "QP101", 1, 3, "found '.'"),
        ("[+1]", "QP101", 1, 2, "found '+'"),
        ("[-]", "QP101", 1, 2, "found '-'"),
        ("[\xa0]", "QP101", 1, 2, "expected a value"),
        ("[1, // no\n2]", "QP101", 1, 5, "found '/'"),
        ("# no\n1", "QP101", 1, 1, "found '#'"),
        ("{'a': 1}", "QP101", 1, 2, "found '''"),
        ("{1: 2}", "QP101", 1, 2, "a key in double quotes, found '1'"),
        ("[NaN]", "QP101", 1, 2, "'NaN' is not a JSON value"),
        ("[1, -Infinity]", "QP101", 1, 5, "'-Infinity' is not a JSON value"),
        ("[True]", "QP101", 1, 2, "'True' is not a JSON value"),
        ("nullx", "QP101", 1, 1, "'nullx' is not a JSON value"),
        ("[-1e999]", "QP101", 1, 2, "too large"),
        ('["a]', "QP101", 1, 2, "unterminated string"),
        ('["a\nb"]', "QP101", 1, 4, "invalid control character"),
        ('["a\tb"]', "QP101", 1, 4, "invalid control character"),
        ('["a\\x"]', "QP101", 1, 4, "invalid \\escape"),
        ('["\\u12"]', "QP101", 1, 4, "invalid \\uxxxx escape"),
        ('["\\ud800"]', "QP101", 1, 2, "surrogate"),
        ('{"\\udc00": 1}', "QP101", 1, 2, "surrogate"),
        ('{"a": 1,\n "a": 2}', "QP102", 2, 2, "key 'a' is set twice, first in line 1"),
        ('{"a": 1, "\\u0061": 2}', "QP102", 1, 10, "key 'a' is set twice"),
        ("[" + "1" * 31 + "]", "QP103", 1, 2, "30 digits"),
        ("-" + "1" * 5000, "QP103", 1, 1, "30 digits"),
        ('["\x00"]', "QP101", 1, 3, "U+0000"),
        ('{"a":' * 65, "QP103", 1, 321, "deeper than 64"),
    ],
)
def test_json_refusals(text: str, code: str, line: int, column: int, part: str) -> None:
    found = problem(text, "plan.json")
    assert at(found) == (code, line, column)
    assert part in found.message


def test_a_key_twice_has_its_path() -> None:
    for name in ("p.yaml", "p.json"):
        found = problem('{"a": [1, {"b": {}, "c": {"d": [], "x": 1, "x": 2}}]}', name)
        assert (found.code, found.path, found.at_key) == ("QP102", ("a", 1, "c", "x"), True)


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_a_file_that_is_not_utf8_text(name: str) -> None:
    found = problem(b"\xef\xbb\xbf[1,\r\n \xc3\x28]", name)
    assert (at(found), found.place.byte, found.place.text) == (("QP101", 2, 2), 9, " \ufffd(]")
    assert "byte 9 (0xc3) is not UTF-8" in found.message
    for encoding in ("utf-16", "utf-16-be", "utf-16-le", "utf-32"):
        assert problem("a: 1\n".encode(encoding), name).code == "QP101"
    assert "UTF-16" in problem("[1]".encode("utf-16"), name).message
    assert problem(bytes(range(256)), name).code == "QP101"
    assert problem(b"\x1f\x8b\x08\x00" + os.urandom(500), name).code == "QP101"


def test_control_characters_never_reach_the_message() -> None:
    for text, name in [('{"a\\u001b": 1, "a\\u001b": 2}', "p.json"), ("a: *\u202e", "p.yaml"), ("[\u200b]", "p.json")]:
        assert all(c.isprintable() for c in problem(text, name).message)


# files


def test_a_missing_or_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    def found(file: str | Path) -> str:
        with pytest.raises(QuantplanError) as caught:
            read_source(file)
        (problem,) = caught.value.problems
        assert (problem.code, problem.place.file) == ("QP100", str(file))
        assert caught.value.exit_status == 3
        return problem.message

    assert found(tmp_path / "none.yaml") == "plan file not found"
    assert found(tmp_path) == "plan file is a directory"
    assert "too long" in found("a" * 5000)
    assert "null" in found("a\0.json")
    (tmp_path / "a").write_text("a: 1")
    assert "not a directory" in found(tmp_path / "a" / "b.yaml")
    monkeypatch.setattr("builtins.open", refuse)
    assert found(tmp_path / "a") == "no permission to read the plan file"


@pytest.mark.parametrize(("name", "mib"), [("p.yaml", 8), ("p.json", 64)])
def test_size_limits(tmp_path: Path, name: str, mib: int) -> None:
    with open(tmp_path / name, "wb") as stream:
        stream.truncate(mib * 2**20 + 1)
    with pytest.raises(QuantplanError, match=f"QP103 .* larger than {mib} MiB"):
        read_source(tmp_path / name)
    assert load(b"[1]" + b" " * (mib * 2**20 - 3), name) == [1]


def test_an_endless_file_is_read_to_the_limit_only() -> None:
    with pytest.raises(QuantplanError, match="QP103"):
        read_source("/dev/zero")


# limits

BOMBS = {
    "brackets": "[" * 400_000,
    "braces": '{"a":' * 80_000,
    "mixed": '[{"a":' * 70_000,
    "closed": "[" * 200_000 + "]" * 200_000,
}


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_deep_nest_is_refused_at_once(name: str, bomb: str) -> None:
    found = problem(BOMBS[bomb], name)
    assert (found.code, found.message) == ("QP103", "nested deeper than 64 levels")


@pytest.mark.parametrize("text", ["- " * 200_000, "? " * 200_000, "".join(" " * i + "a:\n" for i in range(800))])
def test_a_deep_nest_of_yaml_blocks_is_refused(text: str) -> None:
    assert problem(text).code in ("QP101", "QP103")


def test_depth_64_is_read() -> None:
    for name in ("p.yaml", "p.json"):
        value, source = read_source(name, b"[" * 64 + b"]" * 64)
        assert len(source.values) == 64
        assert value == json.loads("[" * 64 + "]" * 64)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n",
        "&a [*a]",
        "a: &a {k: 1}\nb:\n  <<: *a\n",
        "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n",
    ],
)
def test_alias_and_merge_bombs_are_refused_at_the_first_anchor(text: str) -> None:
    assert problem(text).message == "anchor '&a' in the plan"


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_a_million_values_are_the_limit(name: str) -> None:
    assert problem("[" + "1," * 1_000_000 + "1]", name).message == "more than 1,000,000 keys and values"
    assert len(load("[" + "1," * 200_000 + "1]", name)) == 200_001  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", [b"", b"\xff"])
def test_empty_lines_are_limited_too(tail: bytes) -> None:
    for name, newline in [("p.json", b"\n"), ("p.json", b"\r\n"), ("p.yaml", b"\r")]:
        assert problem(newline * 2_000_001 + tail, name).message == "more than 2,000,000 lines"


def test_a_plan_of_5000_overrides_is_read_and_located() -> None:
    rules = [{"pattern": f"model.layers.{i}.mlp.*", "wq": {"scheme": "int4", "group_size": 64}} for i in range(5000)]
    lines = (f'- pattern: "{r["pattern"]}"\n  wq:\n    scheme: int4\n    group_size: 64\n' for r in rules)
    for name, text in [("p.yaml", "".join(lines)), ("p.json", json.dumps(rules))]:
        value, source = read_source(name, text.encode())
        assert value == rules
        assert all(source.locate((i, "wq", "scheme"), at_key=True).line for i in range(5000))


def test_importing_the_reader_imports_neither_yaml_nor_torch_nor_pydantic() -> None:
    code = "import sys, quantplan.plan.source; print([m for m in ('yaml', 'torch', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# without libyaml


@pytest.mark.parametrize("text", [BLOCK, "a:\n\t- 1", "a: *.x", "a: &x 1", 'a: "\\ud800"', 'a: "\\UFFFFFFFF"', "[" * 9999])
def test_without_libyaml_the_answer_is_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> object:
        try:
            value, source = read_source("p.yaml", text.encode())
        except QuantplanError as error:
            return error.problems[0].code
        return value, dict(source.keys), dict(source.values)

    expected = outcome()
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert outcome() == expected


# properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
KEYS = TEXT | st.sampled_from(["pattern", "wq", "no", "<<", "1", "", "~", "a.b", "*"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30) + 1, 10**30 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(["null", "no", "017", "1e-3", "12:30", ".nan", "<<", "*.x", "- a", "a: b", "# c", "&a", "!x"])
)
DATA_TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5))


class Dumper(yaml.SafeDumper):
    """All strings in quotes, for PyYAML knows YAML 1.1 only and would write '1e3' without. (It also breaks long lines
    wrongly after an escape, so lines are not broken.)"""

    def ignore_aliases(self, data: object) -> bool:
        return True


Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def paths(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in `value`, and of `value` itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in paths(item, (*path, key)))]


def at_path(value: object, path: tuple) -> object:
    for key in path:
        value = value[key]  # type: ignore[index]
    return value


@given(DATA_TREES, st.sampled_from([None, 2]), st.booleans(), st.sampled_from([None, False, True]))
def test_data_dumped_as_json_and_as_yaml_loads_to_the_same(
    data: object, indent: int | None, ascii: bool, flow: bool | None
) -> None:
    as_json = json.dumps(data, indent=indent, ensure_ascii=ascii)
    as_yaml = yaml.dump(data, Dumper=Dumper, default_flow_style=flow, sort_keys=False, width=10**9)
    for name, text in [("p.json", as_json), ("p.yaml", as_yaml)]:
        value, source = read_source(name, text.encode())
        assert repr(value) == repr(data)  # repr tells 1 from True and 1.0, and -0.0 from 0.0
        assert list(source.values) == paths(data)
        assert list(source.keys) == [p for p in paths(data) if p and isinstance(p[-1], str)]
        assert len(source.values) == len(paths(data))
        for path in paths(data):
            item = at_path(data, path)
            place = source.locate(path)
            marked = place.text[place.column - 1 :][: place.width]  # type: ignore[operator]
            if name == "p.json" and not isinstance(item, (dict, list)):
                assert json.loads(marked) == item
            elif name == "p.yaml" and isinstance(item, (int, float)):
                assert load(marked) == item
            if path and isinstance(path[-1], str):
                place = source.locate(path, at_key=True)
                marked = place.text[place.column - 1 :][: place.width]  # type: ignore[operator]
                assert marked[:1] in ('"', "?") and (name == "p.yaml" or json.loads(marked) == path[-1])


FRAGMENTS = st.sampled_from(
    [
        *"[]{}:,-?#&*!|>%@`'\"\\ \n\t\r~<=.0123456789aex\ufeff\x85\u2028\x7f\x00é😀",
        *[
            "\r\n",
            ": ",
            "- ",
            "? ",
            "---\n",
            "...\n",
            "<<: ",
            "&a ",
            "*a",
            "!!str ",
            "!<",
            "|+2\n",
            ">-\n",
            "  ",
            "    ",
        ],
        *["%YAML 1.2\n", "%TAG ! x\n", '"a":', "\\u", "\\ud800", "\\U00110000", "true", "null", "NaN", ".inf", "//"],
    ]
)


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
@example(b"")
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf\xef\xbb\xbfa: 1")
@example(b"\xff\xfe\x00\x00")
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    read_or_refused(name, data)


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
@given(st.lists(FRAGMENTS, max_size=40).map("".join))
def test_any_text_of_the_syntax_is_read_or_refused(name: str, text: str) -> None:
    read_or_refused(name, text.encode())


def read_or_refused(name: str, data: bytes) -> None:
    """Either a value with the place of each of its parts, or one problem with a place."""
    try:
        value, source = read_source(name, data)
    except QuantplanError as error:
        (found,) = error.problems
        assert found.code in ("QP101", "QP102", "QP103") and found.help and found.place.file == name
        assert found.code in render(found)
        return
    for path in paths(value):
        place = source.locate(path)
        assert place.line and place.column and place.column <= len(place.text) + 1
        assert place.text == source.lines[place.line - 1]


@given(st.text(max_size=60) | st.lists(FRAGMENTS, max_size=25).map("".join))
def test_json_takes_nothing_that_the_json_module_refuses(text: str) -> None:
    try:
        value = load(text.encode("utf-8", "replace"), "p.json")
    except QuantplanError:
        return
    assert repr(value) == repr(json.loads(text.lstrip("\ufeff")))


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.from_regex(r"[a-z0-9.]{1,9}", fullmatch=True)))
def test_plain_scalars_are_marked_exactly(data: dict[str, str]) -> None:
    data = {key: f"x{value}" for key, value in data.items() if key not in ("null", "true", "false")}
    text = "".join(f"{key}:{' ' * (i % 3 + 1)}{value}  # é😀\n" for i, (key, value) in enumerate(data.items())) or "{}"
    loaded, source = read_source("p.yaml", text.encode())
    assert loaded == data
    for line, (key, value) in enumerate(data.items(), 1):
        place, at_key = source.locate((key,)), source.locate((key,), at_key=True)
        assert (place.line, place.text[place.column - 1 :][: place.width]) == (line, value)  # type: ignore[operator]
        assert (at_key.line, at_key.text[: at_key.width]) == (line, key)
