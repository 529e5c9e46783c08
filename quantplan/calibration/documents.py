"""Files as documents: texts and chats. Strict: what cannot be read is named with its file, line and byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantplan.errors import QuantplanError, did_you_mean, fail, printable

ADVICE = "give UTF-8 text (.txt), one JSON object a line (.jsonl), or token ids (.safetensors)"
MESSAGES = "messages"  # the key of a chat
Chat = list[dict[str, Any]]
Document = str | Chat


def read_documents(path: Path, field: str = "text") -> list[Document]:
    """The documents of a file, in its order; those without text are left out.

    Text is one document. The documents of .jsonl, .json (a list, or one object) and .parquet are the rows' `field`; a row
    without it may hold a chat in `messages`. Raises QP130: missing, unreadable, not UTF-8, bad JSON, no such field, no text.
    """
    if path.suffix.lower() == ".parquet":
        found = list(_of_table(path, field))
    else:
        text = _decoded(path)
        read = {".jsonl": _of_lines, ".json": _of_json}.get(path.suffix.lower())
        found = [text] if read is None else list(read(text, field, str(path)))
    found = [d for d in found if not isinstance(d, str) or d.strip()]
    if not found:
        raise fail("QP130", "holds no text", ADVICE, file=str(path))
    return found


def document_of(row: Any, field: str, unit: str, place: Mapping[str, Any]) -> Document:
    """The text or chat of a row, which a message calls `unit`. Raises QP130 with the keys there are."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise fail("QP130", f"{unit} is not a JSON object", ADVICE, **place)
    value = row.get(field)
    if isinstance(value, str):
        return value
    if value is None and isinstance(row.get(MESSAGES), list):
        field, value = MESSAGES, row[MESSAGES]
    if isinstance(value, list):
        return _chat(value, f"{unit}'s '{printable(field, 60)}'", place)
    if field in row:
        raise fail("QP130", f"{unit}'s '{printable(field, 60)}' is not a string", ADVICE, **place)
    raise no_field(field, [k for k, v in row.items() if isinstance(v, str | list)], unit, place)


def no_field(field: str, present: Iterable[str], unit: str, place: Mapping[str, Any]) -> QuantplanError:
    """That `unit` lacks `field`, with the fields it has."""
    known = [printable(k, 60) for k in present]
    advice = did_you_mean(field, known)
    if advice and not advice.startswith("known"):
        advice += f" known: {', '.join(sorted(known))}"
    return fail("QP130", f"{unit} has no '{printable(field, 60)}'", advice or ADVICE, **place)


def _chat(value: list[Any], what: str, place: Mapping[str, Any]) -> Chat:
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            advice = 'a chat is a list of {"role": …, "content": …}'
            raise fail("QP130", f"{what} is neither a string nor a chat", advice, **place)
    if not value:
        raise fail("QP130", f"{what} is a chat without turns", "leave the row out", **place)
    return [dict(turn) for turn in value]


def _decoded(path: Path) -> str:
    """The text of a file, with `\\n` for every line end."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail("QP130", f"cannot be read: {error.strerror or error}", ADVICE, file=str(path)) from None
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise fail("QP130", "is not UTF-8", ADVICE, file=str(path), byte=error.start) from None


def _of_lines(text: str, field: str, file: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _loaded(line, "line", file, number)
        place = {"file": file, "line": number, "column": 1, "text": line}
        yield document_of(row, field, "line", place)


def _of_json(text: str, field: str, file: str) -> Iterator[Document]:
    if not text.strip():
        return
    data = _loaded(text, "file", file, 1)
    for number, row in enumerate(data if isinstance(data, list) else [data], 1):
        yield document_of(row, field, f"row {number:,}", {"file": file})


def _loaded(text: str, what: str, file: str, number: int) -> Any:
    """The data of JSON `text`, which begins in line `number`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        bad = isinstance(error, json.JSONDecodeError)
        line, column = (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (1, 1)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        shown = text.split("\n")[line - 1] if bad else text[:1000]
        message = f"{what} is not valid JSON: {reason}"
        raise fail("QP130", message, ADVICE, file=file, line=number + line - 1, column=column, text=shown) from None


def _of_table(path: Path, field: str) -> Iterator[Document]:
    """The rows of a parquet file; only the column that is needed is read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        advice = "pip install quantplan[datasets]"
        raise fail("QP405", "reading parquet takes the package pyarrow", advice, file=str(path)) from None
    place = {"file": str(path)}
    if not path.is_file():
        raise fail("QP130", "cannot be read: No such file", ADVICE, **place)
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = next((c for c in (field, MESSAGES) if c in columns), None)
            if column is None:
                raise no_field(field, columns, "the table", place)
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield document_of({column: value}, column, f"row {number:,}", place)
    except (ArrowException, OSError) as error:
        reason = printable(str(error).split("\n")[0] or type(error).__name__)
        raise fail("QP130", f"is not a readable parquet file: {reason}", ADVICE, **place) from None
