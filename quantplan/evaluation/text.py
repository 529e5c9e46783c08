"""Text files as windows of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from quantplan.calibration.documents import ADVICE, read_documents
from quantplan.calibration.tokens import TOKENS, open_tokenizer, stored_ids
from quantplan.errors import fail
from quantplan.headers import PICKLES

if TYPE_CHECKING:
    from torch import Tensor


def token_windows(
    data: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    length: int = 1024,
    windows: int | None = None,
    field: str = "text",
) -> Tensor:
    """The first `windows` windows (all when None) of `data` as token ids, int64 `[windows, length]`.

    Text is tokenized whole, as one stream, by the tokenizer in the directory (or Hub id) `tokenizer`, with the special
    tokens that it adds to a text; the stream is cut into windows that do not overlap, and what is left at its end is
    dropped. The documents of a .jsonl, .json or .parquet file are its rows' `field`, joined by a newline. A .safetensors
    file holds `input_ids`, int64 `[n, tokens]`: windows as they are, whatever `length` says, and no tokenizer is needed.

    Raises QuantplanError: QP130 (the data is missing, empty, malformed or too short), QP105 (length or windows too small),
    QP222 (no tokenizer), QP301 (a pickle), QP201 to QP205 (a broken safetensors file).
    """
    check_sizes(length, windows)
    path = Path(data)
    if path.suffix in PICKLES:
        raise fail("QP301", "pickled data, which can run code when opened", ADVICE, file=str(path))
    if path.suffix == ".safetensors":
        return _stored_windows(path, windows)
    text = read_text(path, field)
    ids: Tensor = open_tokenizer(tokenizer)(text, return_tensors="pt", verbose=False).input_ids[0]
    found = len(ids) // length
    if found < max(1, windows or 1):
        wanted = f"{windows} windows of {length:,} take {windows * length:,}" if windows else f"one window takes {length:,}"
        raise fail(
            "QP130", f"has {len(ids):,} tokens, {wanted}", "give a longer text, fewer windows or a smaller length", file=str(path)
        )
    rows = found if windows is None else windows
    return ids[: rows * length].reshape(rows, length)


def check_sizes(length: int, windows: int | None) -> None:
    """Raises QP105 for windows of fewer than two tokens (nothing to predict), or fewer than one window."""
    if length < 2:
        raise fail("QP105", f"a window of {length} tokens has nothing to predict", "give a length of 2 or more")
    if windows is not None and windows < 1:
        raise fail("QP105", f"{windows} windows are no data", "give 1 or more")


def read_text(path: Path, field: str = "text") -> str:
    """The text of a file, with `\n` for every line end. Raises QP130: missing, unreadable, not UTF-8, empty, bad JSON, a chat."""
    documents = read_documents(path, field)
    texts = [d for d in documents if isinstance(d, str)]
    if len(texts) < len(documents):
        raise fail("QP130", "holds chats, which are no running text", f"give rows with '{field}'", file=str(path))
    return "\n".join(texts)


def _stored_windows(path: Path, windows: int | None) -> Tensor:
    ids = stored_ids(path)
    if ids.ndim != 2:
        message = f"is I64 {list(ids.shape)}, windows are I64 [windows, tokens]"
        raise fail("QP130", message, "save the ids as windows", file=str(path), tensor=TOKENS)
    if len(ids) < max(1, windows or 1):
        message = f"holds {len(ids)} windows, {windows or 'at least 1'} asked for"
        raise fail("QP130", message, "give more windows, or ask for fewer", file=str(path), tensor=TOKENS)
    return ids if windows is None else ids[:windows]
