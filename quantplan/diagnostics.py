"""Problems for machines: the reports that CI systems read, one document for all checked files.

Names come from plans and checkpoints that nobody vouches for: control characters never reach a report raw, and nothing
in a message can end its field. The JSON and XML reports are plain ASCII, so a console in any encoding carries them.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantplan.errors import CodePage, Place, Problem, code_pages, render

FORMATS = ("text", "json", "github", "gitlab", "sarif", "junit")

# what XML 1.0 forbids, lone surrogates included, and the C1 controls that terminals obey
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_Found = list[tuple[str, Problem]]


@dataclass(frozen=True)
class Checked:
    """One checked file and what was found in it."""

    file: str
    problems: tuple[Problem, ...]


def emit(checked: Sequence[Checked], output_format: str, version: str) -> str:
    """The report on `checked` in one of `FORMATS`, without a final newline; `version` is the tool's."""
    if output_format == "text":
        return _text(checked)
    if output_format == "json":
        return _json(checked, version)
    if output_format == "github":
        return _github(checked)
    if output_format == "gitlab":
        return _gitlab(checked)
    if output_format == "sarif":
        return _sarif(checked, version)
    if output_format == "junit":
        return _junit(checked, version)
    raise ValueError(f"unknown output format {output_format!r}; known: {', '.join(FORMATS)}")


def _text(checked: Sequence[Checked]) -> str:
    shown = [_safe(render(p)) for c in checked for p in c.problems]
    errors, notes = _count(checked)
    summary = f"{_plural(len(checked), 'plan')} checked, {_plural(errors, 'problem') if errors else 'no problem'}"
    return "\n\n".join([*shown, summary + (f", {_plural(notes, 'note')}" if notes else "")])


def _json(checked: Sequence[Checked], version: str) -> str:
    errors, notes = _count(checked)
    files = [{"file": c.file, "problems": [p.as_dict() for p in c.problems]} for c in checked]
    return json.dumps({"version": version, "files": files, "errors": errors, "notes": notes}, indent=2)


def _github(checked: Sequence[Checked]) -> str:
    """Workflow commands, one line each; the runner turns them into annotations."""

    def data(text: str) -> str:
        return _safe(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    lines = []
    for path, problem in _found(checked):
        place = problem.place
        properties: dict[str, str | int | None] = {"file": path, "line": place.line}
        if place.line is not None and place.column is not None:
            properties |= {"col": place.column, "endColumn": place.column + place.width}
        properties["title"] = problem.code
        shown = (
            f"{name}={data(str(value)).replace(':', '%3A').replace(',', '%2C')}"
            for name, value in properties.items()
            if value is not None
        )
        command = "error" if problem.severity == "error" else "notice"
        lines.append(f"::{command} {','.join(shown)}::{data(_sentence(problem, 'help: ', chr(10)))}")
    return "\n".join(lines)


def _gitlab(checked: Sequence[Checked]) -> str:
    """A Code Quality report."""
    found = _found(checked)
    report = [
        {
            "description": _sentence(problem),
            "check_name": problem.code,
            "fingerprint": fingerprint,
            "severity": "major" if problem.severity == "error" else "info",
            "location": {"path": _safe(path), "lines": {"begin": problem.place.line or 1}},
        }
        for (path, problem), fingerprint in zip(found, _fingerprints(found), strict=True)
    ]
    return json.dumps(report, indent=2)


def _sarif(checked: Sequence[Checked], version: str) -> str:
    found = _found(checked)
    pages = _pages()
    codes = sorted({p.code for _, p in found})
    results = []
    for (path, problem), fingerprint in zip(found, _fingerprints(found), strict=True):
        # braces stay single: the standard doubles them, but no viewer undoes it where a message has no arguments
        message = _sentence(problem, "help: ", "\n").replace("](", "] (")  # `[text](target)` would be a link
        physical: dict[str, object] = {"artifactLocation": {"uri": _uri(path)}}
        if region := _region(problem.place):
            physical["region"] = region
        results.append(
            {
                "ruleId": problem.code,
                "ruleIndex": codes.index(problem.code),
                "level": problem.severity,  # both of ours are levels of SARIF
                "message": {"text": message},
                "locations": [{"physicalLocation": physical}],
                "partialFingerprints": {"quantplanProblem/v1": fingerprint},
            }
        )
    rules = [_rule(code, pages.get(code)) for code in codes]
    driver = {"name": "quantplan", "version": version, "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: str, page: CodePage | None) -> dict[str, object]:
    if page is None:
        return {"id": code, "name": code, "shortDescription": {"text": code}}
    name = "".join(word[0].upper() + word[1:] for word in re.findall(r"[A-Za-z0-9]+", page.title))
    text = page.text or page.title
    return {
        "id": code,
        "name": name or code,
        "shortDescription": {"text": page.title},
        "fullDescription": {"text": " ".join(text.split("\n\n")[0].split())},
        "help": {"text": text, "markdown": text},
    }


def _region(place: Place) -> dict[str, int]:
    if place.line is not None:
        region = {"startLine": place.line}
        if place.column is not None:
            region |= {"startColumn": place.column, "endColumn": place.column + place.width}
        return region
    return {} if place.byte is None else {"byteOffset": place.byte}


def _junit(checked: Sequence[Checked], version: str) -> str:
    """One test suite; every file is a test case, which fails once per error."""
    from xml.etree import ElementTree as ET

    failed = sum(any(p.severity == "error" for p in c.problems) for c in checked)
    counts = {"name": "quantplan", "tests": str(len(checked)), "failures": str(failed), "errors": "0"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", counts)
    properties = ET.SubElement(suite, "properties")
    ET.SubElement(properties, "property", {"name": "version", "value": version})
    for one in checked:
        case = ET.SubElement(suite, "testcase", {"name": _safe(_path(one.file)), "classname": "quantplan"})
        notes = []
        for problem in one.problems:
            shown = _safe(render(problem))
            if problem.severity == "note":
                notes.append(shown)
            else:
                attributes = {"type": problem.code, "message": _sentence(problem)}
                ET.SubElement(case, "failure", attributes).text = shown
        if notes:
            ET.SubElement(case, "system-out").text = "\n\n".join(notes)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="us-ascii").decode("ascii")


def _found(checked: Sequence[Checked]) -> _Found:
    """Every problem with the path it is reported at: its own, or that of the file in which it was found."""
    return [(_path(p.place.file or c.file), p) for c in checked for p in c.problems]


def _path(file: str) -> str:
    """`file` as CI systems compare paths: forward slashes, no leading `./`."""
    return file.replace(os.sep, "/").removeprefix("./")


def _uri(path: str) -> str:
    from urllib.parse import quote

    try:
        raw = path.encode("utf-8", "surrogateescape")  # the bytes of the name on disk
    except UnicodeEncodeError:
        raw = path.encode("utf-8", "surrogatepass")
    if not os.path.isabs(path):
        return quote(raw, safe="/")  # a colon would make the first part a scheme
    return "file://" + ("" if path.startswith("/") else "/") + quote(raw, safe="/:")


def _fingerprints(found: _Found) -> list[str]:
    """One distinct identity per problem that survives moved lines and inserted list entries."""
    import hashlib

    seen: Counter[str] = Counter()
    fingerprints = []
    for path, problem in found:
        keys = [key for key in problem.path or () if isinstance(key, str)]
        identity = json.dumps([problem.code, problem.message, path, problem.place.tensor, keys])
        seen[identity] += 1  # equal problems are told apart by their order
        fingerprints.append(hashlib.sha256(f"{identity} {seen[identity]}".encode()).hexdigest())
    return fingerprints


def _sentence(problem: Problem, before_help: str = "", separator: str = "; ") -> str:
    """The message, where a report has no other field for it the tensor and byte, and the help."""
    inside = str(replace(problem.place, file="")) if problem.place.line is None else ""
    message = f"{problem.message} ({inside})" if inside else problem.message
    return _safe(f"{message}{separator}{before_help}{problem.help}" if problem.help else message)


def _pages() -> dict[str, CodePage]:
    try:
        return code_pages()
    except FileNotFoundError:  # a report without descriptions is better than none
        return {}


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _count(checked: Sequence[Checked]) -> tuple[int, int]:
    severities = Counter(p.severity for c in checked for p in c.problems)
    return severities["error"], severities["note"]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
