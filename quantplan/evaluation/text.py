"""Text files as windows of token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.errors import QuantplanError, did_you_mean, fail, printable
from quantplan.headers import PICKLES, read_header

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = "input_ids"  # the tensor of a .safetensors data file
ADVICE = "give UTF-8 text (.txt), one JSON object a line (.jsonl), or token ids (.safetensors)"


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
    dropped. The documents of a .jsonl file are its lines' `field`, joined by a newline. A .safetensors file holds
    `input_ids`, int64 `[n, tokens]`: windows as they are, whatever `length` says, and no tokenizer is needed.

    Raises QuantplanError: QP130 (the data is missing, empty, malformed or too short), QP105 (length or windows too small),
    QP222 (no tokenizer), QP301 (a pickle), QP201 to QP205 (a broken safetensors file).
    """
    check_sizes(length, windows)
    path = Path(data)
    if path.suffix in PICKLES:
        raise fail("QP301", "pickled data, which can run code when opened", ADVICE, file=str(path))
    if path.suffix == ".safetensors":
        return _stored_windows(path, windows)
    ids = _tokenize(read_text(path, field), tokenizer)
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
    """The text of a file, with `\\n` for every line end. Raises QP130: missing, unreadable, not UTF-8, empty, bad JSON."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail("QP130", f"cannot be read: {error.strerror or error}", ADVICE, file=str(path)) from None
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise fail("QP130", "is not UTF-8", ADVICE, file=str(path), byte=error.start) from None
    if path.suffix == ".jsonl":
        text = "\n".join(_documents(text, field, str(path)))
    if not text.strip():
        raise fail("QP130", "holds no text", ADVICE, file=str(path))
    return text


def _documents(text: str, field: str, file: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = error.colno if isinstance(error, json.JSONDecodeError) else 1
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            message = f"line is not valid JSON: {reason}"
            raise fail("QP130", message, ADVICE, file=file, line=number, column=column, text=line) from None
        if not isinstance(document, dict) or not isinstance(document.get(field), str):
            raise _no_field(document, field, {"file": file, "line": number, "column": 1, "text": line})
        yield document[field]


def _no_field(document: Any, field: str, place: dict[str, Any]) -> QuantplanError:
    if not isinstance(document, dict):
        return fail("QP130", "line is not a JSON object", ADVICE, **place)
    if field in document:
        return fail("QP130", f"'{printable(field)}' is not a string", ADVICE, **place)
    known = [printable(k, 60) for k, v in document.items() if isinstance(v, str)]
    return fail("QP130", f"line has no '{printable(field)}'", did_you_mean(field, known) or ADVICE, **place)


def _tokenize(text: str, tokenizer: str | os.PathLike[str]) -> Tensor:
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:  # transformers' and tokenizers' errors share no base class
        reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        advice = "copy the tokenizer's files beside the weights, or give token ids (.safetensors)"
        raise fail("QP222", f"the tokenizer cannot be loaded: {reason}", advice, file=str(tokenizer)) from error
    ids: Tensor = opened(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def _stored_windows(path: Path, windows: int | None) -> Tensor:
    from safetensors import safe_open

    if not path.is_file():
        raise fail("QP130", "file not found", ADVICE, file=str(path))
    infos = {info.name: info for info in read_header(path)[0]}
    if TOKENS not in infos:
        held = did_you_mean(TOKENS, [printable(n, 60) for n in list(infos)[:5]]) or "the file holds no tensors"
        raise fail("QP130", f"has no tensor '{TOKENS}'", held, file=str(path))
    dtype, shape = infos[TOKENS].dtype, infos[TOKENS].shape
    if dtype != "I64" or len(shape) != 2 or shape[1] < 2:
        message = f"is {dtype} {list(shape)}, token ids are I64 [windows, tokens]"
        raise fail("QP130", message, "save the ids as int64, two tokens a window or more", file=str(path), tensor=TOKENS)
    if shape[0] < max(1, windows or 1):
        message = f"holds {shape[0]} windows, {windows or 'at least 1'} asked for"
        raise fail("QP130", message, "give more windows, or ask for fewer", file=str(path), tensor=TOKENS)
    with safe_open(path, "pt") as file:
        ids: Tensor = file.get_slice(TOKENS)[: shape[0] if windows is None else windows]
    if int(ids.min()) < 0:
        raise fail(
            "QP130", f"holds the negative token id {int(ids.min())}", "token ids count from 0", file=str(path), tensor=TOKENS
        )
    return ids
