"""Problems: what can be wrong, as data, and how it is shown.

A problem has a stable code, one sentence, a place and one help line. Deep code raises `QuantplanError` with a short
problem; whoever knows more (the file, the line) adds it. Every code has a page in `codes.md` beside this file, and its
first digit decides the exit status.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

Path = tuple[str | int, ...]
Severity = Literal["error", "note"]

# first digit of a code -> exit status (the README's table); 130 and 143 belong to signals, 70 to bugs
EXIT_STATUS = {"1": 3, "2": 3, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7, "8": 1}


@dataclass(frozen=True)
class Place:
    """Where a problem is: a file, and what is known inside it. `line` and `column` count from 1; `width` in characters."""

    file: str = ""
    line: int | None = None
    column: int | None = None
    width: int = 1
    text: str = ""  # the source line, for the caret
    tensor: str = ""
    byte: int | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}:{self.column}"
        parts = [self.file] if self.file else []
        if self.tensor:
            parts.append(f'tensor "{printable(self.tensor)}"')
        if self.byte is not None:
            parts.append(f"byte {self.byte}")
        return ": ".join(parts)


@dataclass(frozen=True)
class Problem:
    """One finding. `message`: lower case, no full stop, no advice; `help`: what to do; `path`: keys into the plan."""

    code: str
    message: str
    help: str = ""
    path: Path | None = None
    at_key: bool = False  # the place is the key itself (an unknown key), not its value
    place: Place = Place()
    severity: Severity = "error"

    def at(self, place: Place) -> "Problem":
        """The same problem with its place known."""
        return replace(self, place=place)

    def as_dict(self) -> dict[str, object]:
        """The problem as plain JSON data; empty fields are left out."""
        place = {k: v for k, v in vars(self.place).items() if v not in ("", None) and k != "text"}
        if "line" not in place:
            place.pop("width", None)
        data: dict[str, object] = {"code": self.code, "severity": self.severity, "message": self.message}
        if self.help:
            data["help"] = self.help
        if self.path is not None:
            data["path"] = list(self.path)
        if place:
            data["place"] = place
        return data


class QuantplanError(Exception):
    """One or more problems that stop the work. `exit_status` follows from the first problem's code."""

    def __init__(self, problems: "Problem | Iterable[Problem]") -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(render(p) for p in self.problems))

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.problems[0].code[2]]


def fail(code: str, message: str, help: str = "", **place: object) -> QuantplanError:
    """A `QuantplanError` of one problem; keyword arguments are the fields of `Place`."""
    return QuantplanError(Problem(code, message, help, place=Place(**place)))  # type: ignore[arg-type]


def printable(text: str, limit: int = 300) -> str:
    """`text` without control characters and not longer than `limit`: names in checkpoints and plans are not trusted."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + "…"


def render(problem: Problem) -> str:
    """A problem as a compiler would show it: place, code, sentence; the source line with a caret; the help line."""
    place = str(problem.place)
    note = "note: " if problem.severity == "note" else ""
    lines = [f"{place + ': ' if place else ''}{note}{problem.code} {problem.message}"]
    if problem.place.line is not None and problem.place.column is not None and problem.place.text:
        number, text, column = str(problem.place.line), problem.place.text, problem.place.column
        if column > 100:  # a plan in one long line: show the part around the caret
            cut = column - 60
            text, column = "…" + text[cut:], column - cut + 1
        text = printable(text.replace("\t", " "), 160)
        width = max(1, min(problem.place.width, len(text) - column + 1))
        lines += [f"{number} | {text}", f"{' ' * len(number)} | {' ' * (column - 1)}{'^' * width}"]
        indent = " " * len(number)
    else:
        indent = " "
    if problem.help:
        lines.append(f"{indent} = help: {problem.help}")
    return "\n".join(lines)


@dataclass(frozen=True)
class CodePage:
    """The documentation of one code."""

    code: str
    title: str
    text: str

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.code[2]]


@cache
def code_pages() -> dict[str, CodePage]:
    """Every problem code with its page, read from `codes.md`, in order."""
    from importlib import resources

    text = resources.files("quantplan").joinpath("codes.md").read_text("utf-8")
    parts = re.split(r"^## (QP\d{3}) (.+)$", text, flags=re.MULTILINE)[1:]
    return {c: CodePage(c, t.strip(), body.strip()) for c, t, body in zip(*[iter(parts)] * 3, strict=True)}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what is known when nothing is near."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if names else ""


def listing(names: Iterable[str], shown: int = 3) -> str:
    """`in 28 layers: a, b, c, …`: one problem for all layers, not one each."""
    names = list(names)
    head = ", ".join(printable(n) for n in names[:shown])
    more = ", …" if len(names) > shown else ""
    return f"{len(names)} module{'s' if len(names) != 1 else ''}: {head}{more}"


def errors_in(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems that stop the work; notes do not."""
    return (p for p in problems if p.severity == "error")


def size(count: float) -> str:
    """`116.8 MB`: decimal units, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
