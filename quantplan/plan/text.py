"""A plan's text: the way from offsets to lines and columns, and what both readers share."""

import math
import re
from bisect import bisect_right

from quantplan.errors import Place, Problem, QuantplanError, fail

Mark = tuple[int, int, int]  # line, column, width; line and column count from 1
Event = tuple[str, int, int, object]  # kind, start, end, value

MAX_DEPTH, MAX_NODES, MAX_DIGITS = 64, 1_000_000, 30
MAX_LINES = 2 * MAX_NODES  # every value and every closing bracket in a line of its own
BREAK = re.compile(r"\r\n|\n|\r")
# the YAML 1.2 core schema, section 10.3.2; JSON's numbers are a part of it
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
WORDS = {"null": None, "true": True, "false": False}


class Text:
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


def number(text: Text, literal: str, start: int, end: int) -> int | float:
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
