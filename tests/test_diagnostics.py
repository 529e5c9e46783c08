"""The machine-readable reports: valid for their official schemas, escaped, stable."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from quantplan import diagnostics
from quantplan.diagnostics import FORMATS, Checked, emit
from quantplan.errors import CodePage, Place, Problem

SCHEMAS = Path(__file__).parent / "schemas"

TYPO = Problem(
    "QP110",
    "override matches no layer: '*.down_porj'",
    "did you mean 'down_proj'?",
    path=("overrides", 0, "pattern"),
    place=Place("plans/bad.yaml", 7, 14, 13, '  - pattern: "*.down_porj"'),
)
NOTE = Problem("QP190", "lm_head is tied and stays in float", place=Place("plans/bad.yaml"), severity="note")
TENSOR = Problem("QP402", "offsets overlap", place=Place("m/model.safetensors", tensor="a.weight", byte=8))
RUN = (Checked("plans/bad.yaml", (TYPO, NOTE)), Checked("good.yaml", ()), Checked("third.yaml", (TENSOR,)))

NASTY = (
    'quotes " \' and <tag a="b"> & ]]> <![CDATA[',
    "controls \x00 \x07 \x1b[31m \x7f \x9b31m \ufffe \uffff",
    "line\nbreak\r\nand\rreturn, tab\t, nel\x85, ls\u2028",
    "größe 量子化 🦙 \u202e right to left",
    "lone surrogate \ud800 and \udcff",
    "percent %0A 100% ::error file=x,line=1::no :, end",
    "link [text](0) brace {0} {a,b} back\\slash \\u0041",
    "x" * 200_000,
    "",
)
FILES = (
    "a b/c#d?e%20.yaml",
    "./plans/größe.yaml",
    "c:d,e=f.yaml",
    "/abs/ä b:c.yaml",
    "-",
    "\udcff.yaml",
    "\ud800.yaml",
    "x\x01<&\"'>.yaml",
    "",
)


def nasty() -> tuple[Checked, ...]:
    """Every nasty string as message, help, tensor, source line and file name."""
    places = [Place(file=f, line=i, column=i, width=i, text=t) for i, (f, t) in enumerate(zip(FILES, NASTY, strict=True), 1)]
    problems = [Problem("QP110", t, t, ("a", 0, t), place=p) for t, p in zip(NASTY, places, strict=True)]
    problems += [Problem("QP402", t, place=Place(tensor=t, byte=3), severity="note") for t in NASTY]
    problems += [Problem("QP999", t, place=Place(line=2)) for t in NASTY]
    return (
        Checked("plan.yaml", tuple(problems)),
        *(Checked(f, tuple(problems[:3])) for f in FILES),
        Checked("ok.yaml", ()),
    )


RUNS = pytest.mark.parametrize("checked", [(), RUN[1:2], RUN, nasty()], ids=["nothing", "clean", "found", "nasty"])


@pytest.fixture(params=["pages", "no pages"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a page for some codes, and with no `codes.md` at all."""

    def missing() -> dict[str, CodePage]:
        raise FileNotFoundError("codes.md")

    page = CodePage("QP110", "An override matches no layer", "A pattern\nmatches `nothing`.\n\nHow to fix it.")
    known = request.param == "pages"
    monkeypatch.setattr(diagnostics, "code_pages", (lambda: {"QP110": page}) if known else missing)
    return known


def report(output_format: str, checked: tuple[Checked, ...] = RUN) -> Any:
    return json.loads(emit(checked, output_format, "1.2.3"))


def one(*problems: Problem, file: str = "p.yaml") -> tuple[Checked, ...]:
    return (Checked(file, problems),)


def test_text() -> None:
    shown = emit(RUN, "text", "1.2.3").split("\n\n")
    assert shown[0].splitlines()[0] == "plans/bad.yaml:7:14: QP110 override matches no layer: '*.down_porj'"
    assert shown[0].splitlines()[-1] == "  = help: did you mean 'down_proj'?"
    assert shown[-1] == "3 plans checked, 2 problems, 1 note"
    assert emit(RUN[1:2], "text", "1.2.3") == "1 plan checked, no problem"
    assert emit((RUN[1], RUN[2]), "text", "1.2.3").endswith("\n\n2 plans checked, 1 problem")
    assert "\x1b" not in emit(nasty(), "text", "1.2.3")


def test_json() -> None:
    data = report("json")
    assert data["version"] == "1.2.3" and data["errors"] == 2 and data["notes"] == 1
    assert [f["file"] for f in data["files"]] == ["plans/bad.yaml", "good.yaml", "third.yaml"]
    assert data["files"][0]["problems"] == [TYPO.as_dict() | {"path": ["overrides", 0, "pattern"]}, NOTE.as_dict()]


def test_github() -> None:
    assert emit(RUN, "github", "1.2.3").splitlines() == [
        "::error file=plans/bad.yaml,line=7,col=14,endColumn=27,title=QP110"
        "::override matches no layer: '*.down_porj'%0Ahelp: did you mean 'down_proj'?",
        "::notice file=plans/bad.yaml,title=QP190::lm_head is tied and stays in float",
        '::error file=m/model.safetensors,title=QP402::offsets overlap (tensor "a.weight": byte 8)',
    ]
    assert emit(RUN[1:2], "github", "1.2.3") == ""


def test_github_escapes() -> None:
    problem = Problem("QP110", "50%\r\n::error::a, b", place=Place("c:d,e%f\n.yaml", line=2))
    expected = "::error file=c%3Ad%2Ce%25f%0A.yaml,line=2,title=QP110::50%25%0D%0A::error::a, b"
    assert emit(one(problem), "github", "1.2.3") == expected


def test_github_commands_read_back() -> None:
    """The runner's own way to read a command finds one per problem, with the message unchanged."""
    checked = nasty()
    problems = [p for c in checked for p in c.problems]
    lines = re.split("\r\n|\r|\n", emit(checked, "github", "1.2.3"))
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        head, _, message = line.removeprefix("::").partition("::")
        command, _, properties = head.partition(" ")
        assert command == ("error" if problem.severity == "error" else "notice")
        values = dict(pair.split("=", 1) for pair in properties.split(","))
        assert set(values) <= {"file", "line", "col", "endColumn", "title"} and values["title"] == problem.code
        assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", line.replace("\t", ""))
        for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            message = message.replace(code, character)
        assert message.startswith(diagnostics._safe(problem.message))


def test_gitlab() -> None:
    entries = report("gitlab")
    assert entries[0].pop("fingerprint") and entries[0] == {
        "description": "override matches no layer: '*.down_porj'; did you mean 'down_proj'?",
        "check_name": "QP110",
        "severity": "major",
        "location": {"path": "plans/bad.yaml", "lines": {"begin": 7}},
    }
    assert entries[1]["severity"] == "info" and entries[1]["location"]["lines"]["begin"] == 1
    assert report("gitlab", ()) == []


@RUNS
def test_gitlab_entries_are_complete(checked: tuple[Checked, ...]) -> None:
    entries = report("gitlab", checked)
    severities = {"info", "minor", "major", "critical", "blocker"}
    for entry in entries:
        assert entry["severity"] in severities and isinstance(entry["description"], str)
        assert entry["location"]["lines"]["begin"] >= 1 and not entry["location"]["path"].startswith("./")
    assert len({e["fingerprint"] for e in entries}) == len(entries) == sum(len(c.problems) for c in checked)


def fingerprint(*problems: Problem, file: str = "p.yaml") -> list[str]:
    return [e["fingerprint"] for e in report("gitlab", one(*problems, file=file))]


def test_fingerprints_survive_moves() -> None:
    moved = Problem(TYPO.code, TYPO.message, "other help", ("overrides", 4, "pattern"), place=Place("plans/bad.yaml", 90, 3))
    assert fingerprint(TYPO) == fingerprint(moved) == fingerprint(TYPO.at(Place("./plans/bad.yaml", 1, 1)))
    assert fingerprint(NOTE, TYPO)[1] == fingerprint(TYPO)[0]
    sarif = report("sarif")["runs"][0]["results"][0]["partialFingerprints"]
    assert list(sarif.values()) == fingerprint(TYPO)


def test_fingerprints_differ() -> None:
    others = [
        Problem("QP111", TYPO.message, path=TYPO.path, place=TYPO.place),
        Problem("QP110", "another", path=TYPO.path, place=TYPO.place),
        Problem("QP110", TYPO.message, path=("layers", 0, "pattern"), place=TYPO.place),
        TYPO.at(Place("other.yaml", 7, 14)),
        TYPO.at(Place("plans/bad.yaml", tensor="a")),
    ]
    assert len({fingerprint(p)[0] for p in [TYPO, *others]}) == len(others) + 1
    assert len(set(fingerprint(TYPO, TYPO, TYPO))) == 3
    assert fingerprint(TYPO.at(Place()), file="a.yaml") != fingerprint(TYPO.at(Place()), file="b.yaml")


@RUNS
def test_sarif_is_valid(checked: tuple[Checked, ...], pages: bool) -> None:
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text("utf-8"))
    log = report("sarif", checked)
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(log)
    run = log["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert len(run["results"]) == sum(len(c.problems) for c in checked)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9/._~%:-]*", uri) and urlsplit(uri).scheme in ("", "file")
        assert "](" not in result["message"]["text"]


def test_sarif_schema_bites() -> None:
    """The vendored schema refuses a wrong report, so that passing it says something."""
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text("utf-8"))
    log = report("sarif")
    log["runs"][0]["results"][0]["level"] = "major"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(log)


def test_sarif(pages: bool) -> None:
    log = report("sarif")
    assert log["$schema"] == "https://json.schemastore.org/sarif-2.1.0.json" and log["version"] == "2.1.0"
    run = log["runs"][0]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("quantplan", "1.2.3")
    typo, note, tensor = run["results"]
    assert (typo["level"], note["level"]) == ("error", "note")
    assert typo["message"]["text"] == "override matches no layer: '*.down_porj'\nhelp: did you mean 'down_proj'?"
    region = typo["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 7, "startColumn": 14, "endColumn": 27}
    assert "region" not in note["locations"][0]["physicalLocation"]
    assert tensor["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "m/model.safetensors"},
        "region": {"byteOffset": 8},
    }
    assert driver["rules"][1] == {"id": "QP190", "name": "QP190", "shortDescription": {"text": "QP190"}}
    if pages:
        text = "A pattern\nmatches `nothing`.\n\nHow to fix it."
        assert driver["rules"][0] == {
            "id": "QP110",
            "name": "AnOverrideMatchesNoLayer",
            "shortDescription": {"text": "An override matches no layer"},
            "fullDescription": {"text": "A pattern matches `nothing`."},
            "help": {"text": text, "markdown": text},
        }


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("a b/c#d?e%.yaml", "a%20b/c%23d%3Fe%25.yaml"),
        ("./plans/größe.yaml", "plans/gr%C3%B6%C3%9Fe.yaml"),
        ("c:d.yaml", "c%3Ad.yaml"),
        ("/abs/a b.yaml", "file:///abs/a%20b.yaml"),
        ("\udcff.yaml", "%FF.yaml"),
    ],
)
def test_sarif_uris(file: str, uri: str) -> None:
    result = report("sarif", one(Problem("QP110", "m"), file=file))["runs"][0]["results"][0]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri
    assert unquote(urlsplit(uri).path, errors="surrogateescape") == file.removeprefix("./")


@RUNS
def test_junit_is_valid(checked: tuple[Checked, ...]) -> None:
    from lxml import etree

    schema = etree.XMLSchema(etree.parse(SCHEMAS / "junit-10.xsd"))
    document = emit(checked, "junit", "1.2.3")
    schema.assertValid(etree.fromstring(document.encode("ascii")))
    cases = ET.fromstring(document).findall("testsuite/testcase")
    assert len(cases) == len(checked)
    for case, one_checked in zip(cases, checked, strict=True):
        errors = [p for p in one_checked.problems if p.severity == "error"]
        failures = case.findall("failure")
        assert [f.get("type") for f in failures] == [p.code for p in errors]
        for failure, problem in zip(failures, errors, strict=True):
            assert failure.get("message", "").startswith(diagnostics._safe(problem.message))
        assert (case.find("system-out") is not None) == (len(errors) < len(one_checked.problems))


def test_junit() -> None:
    suite = ET.fromstring(emit(RUN, "junit", "1.2.3"))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    bad, good, _ = suite.findall("testcase")
    assert (bad.get("name"), bad[0].get("type")) == ("plans/bad.yaml", "QP110")
    assert bad[0].get("message") == "override matches no layer: '*.down_porj'; did you mean 'down_proj'?"
    assert "^^^^^^^^^^^^^" in (bad[0].text or "")
    assert "note: QP190" in (bad.findtext("system-out") or "")
    assert good.get("name") == "good.yaml" and len(good) == 0


@pytest.mark.parametrize("output_format", FORMATS)
def test_reports_are_pure_and_printable(output_format: str) -> None:
    checked = nasty()
    document = emit(checked, output_format, "1.2.3")
    assert document == emit(checked, output_format, "1.2.3")
    document.encode("utf-8" if output_format in ("text", "github") else "ascii")


@pytest.mark.parametrize("output_format", ["", "SARIF", "rdjson"])
def test_unknown_format(output_format: str) -> None:
    with pytest.raises(ValueError, match="known: text, json"):
        emit(RUN, output_format, "1.2.3")
