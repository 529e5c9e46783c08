"""A plan's word for calibration data, as documents: a file, a folder, a data set."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantplan.calibration.documents import ADVICE, MESSAGES, Document, document_of, no_field, read_documents
from quantplan.calibration.pack import seeded_order
from quantplan.errors import QuantplanError, fail, printable
from quantplan.plan.calibration import ROWS, TEXTS, extension
from quantplan.plan.schema import Calibration

IN_FOLDERS = (*(t for t in TEXTS if t != ".md"), *ROWS)  # a README is no data
PIECE = 1 << 14  # characters
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Rows(Sequence[Document]):
    """The rows of a data set that lies on disk, read when they are asked for."""

    def __init__(self, table: Any, field: str, name: str) -> None:
        self.table, self.field, self.name = table, field, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return document_of(self.table[index], self.field, f"row {index:,}", {"file": self.name})


def find_documents(settings: Calibration, base: Path) -> tuple[Sequence[Document], str]:
    """The documents of a source that holds text, and its name without its folder. A path is relative to `base`.

    A folder is taken before a data set of its name. Raises QP130 (not found, unreadable, no text, no such field), QP405 (a
    package is missing), QP406 (the Hub cannot be reached).
    """
    path = base / Path(settings.source).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return _saved(path, settings), path.name
        return _folder(path, settings.field), path.name
    if extension(settings.source):
        return read_documents(path, settings.field), path.name
    if not _ID.fullmatch(settings.source):
        raise fail("QP130", "not found", "give a file, a folder or the id of a data set", file=str(path))
    name = ":".join(part for part in (settings.source, settings.subset, settings.split) if part)
    return _hub(path, settings), name


def _folder(path: Path, field: str) -> list[Document]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IN_FOLDERS and p.is_file() and not p.name.startswith("."))
    if not files:
        raise fail("QP130", f"the folder has no {', '.join(IN_FOLDERS)} file", ADVICE, file=str(path))
    return [document for file in files for document in read_documents(file, field)]


def _saved(path: Path, settings: Calibration) -> Sequence[Document]:
    datasets = _package(str(path))
    try:
        table = datasets.load_from_disk(os.fspath(path))
    except Exception as error:  # whatever a damaged folder makes it raise
        raise _refused(error, str(path)) from error
    if isinstance(table, datasets.DatasetDict):
        name, _, cut = settings.split.partition("[")
        if name not in table:
            raise no_field(settings.split, map(str, table), "the data set", {"file": str(path)})
        if cut:
            raise fail("QP130", f"'{settings.split}' is a part of a split", "save that part, and name its folder", file=str(path))
        table = table[name]
    return _rows(table, settings.field, str(path))


def _hub(path: Path, settings: Calibration) -> Sequence[Document]:
    datasets = _package(str(path))
    try:
        table = datasets.load_dataset(settings.source, settings.subset, split=settings.split)
    except Exception as error:  # the library, its builders and the network share no base class
        raise _refused(error, settings.source) from error
    return _rows(table, settings.field, settings.source)


def _rows(table: Any, field: str, name: str) -> Rows:
    if field not in table.column_names and MESSAGES not in table.column_names:
        raise no_field(field, table.column_names, "the data set", {"file": name})
    if not len(table):
        raise fail("QP130", "holds no rows", ADVICE, file=name)
    return Rows(table.select_columns([field if field in table.column_names else MESSAGES]), field, name)


def _package(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        message = "neither a file nor a folder, and the package that knows data sets is missing"
        raise fail("QP405", message, "pip install quantplan[datasets], or give the path of a file", file=name) from None
    return datasets


def _refused(error: Exception, name: str) -> QuantplanError:
    reason = printable((str(error).strip() or type(error).__name__).split("\n")[0])
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(e, ConnectionError | TimeoutError) or "Offline" in type(e).__name__ for e in chain):
        advice = "is the network up? A folder that save_to_disk wrote, or a file, needs none"
        return fail("QP406", f"the data set cannot be fetched: {reason}", advice, file=name)
    return fail("QP130", f"the data set cannot be opened: {reason}", "are its name, subset and split right?", file=name)


def enough(documents: Sequence[Document], limit: int, seed: int | None) -> tuple[list[Document], bool]:
    """Some of the documents with `limit` characters or a little more, in their order, and whether these are all: the first
    ones with `seed` None, else those that the seed chooses. A text longer than `limit` is cut: off, or into pieces at the ends
    of lines, which are then chosen like documents."""
    if seed is not None and isinstance(documents, list):
        documents = [piece for document in documents for piece in _pieces(document, limit)]
    chosen: dict[int, Document] = {}
    held = 0
    for index in range(len(documents)) if seed is None else seeded_order(len(documents), seed):
        document = documents[index]
        held += _size(document)
        if held > limit and isinstance(document, str) and seed is None:
            return [*chosen.values(), document[: len(document) - held + limit]], False
        if not isinstance(document, str) or document.strip():
            chosen[index] = document
        if held > limit and len(chosen) < len(documents):
            return [chosen[i] for i in sorted(chosen)], False
    return [chosen[i] for i in sorted(chosen)], True


def _size(document: Document) -> int:
    """Characters."""
    return len(document) if isinstance(document, str) else sum(len(str(turn["content"])) for turn in document)


def _pieces(document: Document, limit: int) -> list[Document]:
    """The document, or where it is a text longer than `limit` its pieces of about `PIECE` characters."""
    if not isinstance(document, str) or len(document) <= limit:
        return [document]
    pieces: list[Document] = []
    at = 0
    while at < len(document):
        end = document.find("\n", at + PIECE) + 1 or len(document)
        end = min(end, at + 2 * PIECE)
        pieces.append(document[at:end])
        at = end
    return pieces
