"""Documents as token ids: the model's tokenizer, its special tokens and chat template, and ids that a file holds already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.calibration.documents import ADVICE, Chat, Document
from quantplan.calibration.pack import Specials
from quantplan.errors import did_you_mean, fail, printable
from quantplan.headers import read_header

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = "input_ids"  # the tensor of a .safetensors data file
BATCH = 256  # documents tokenized at once
PROBE = "a"  # a text that no tokenizer takes for nothing


def open_tokenizer(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory (or Hub id). Code it brings runs only with `trust_remote_code`. Raises QP222."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' and tokenizers' errors share no base class
        reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        advice = "copy the tokenizer's files beside the weights, or give token ids (.safetensors)"
        raise fail("QP222", f"the tokenizer cannot be loaded: {reason}", advice, file=str(model)) from error


def stored_ids(path: Path) -> Tensor:
    """The tensor `input_ids` of a .safetensors file, int64 of one or two dimensions.

    Raises QP130 (no such file or tensor, another dtype or shape, a negative id), QP201 to QP205 (a broken file), QP301.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise fail("QP130", "file not found", ADVICE, file=str(path))
    infos = {info.name: info for info in read_header(path)[0]}
    if TOKENS not in infos:
        held = did_you_mean(TOKENS, [printable(n, 60) for n in list(infos)[:5]]) or "the file holds no tensors"
        raise fail("QP130", f"has no tensor '{TOKENS}'", held, file=str(path))
    dtype, shape = infos[TOKENS].dtype, infos[TOKENS].shape
    if dtype != "I64" or len(shape) not in (1, 2) or shape[-1] < 2 or shape[0] < 1:
        message = f"is {dtype} {list(shape)}, token ids are I64 [sequences, tokens]"
        raise fail("QP130", message, "save the ids as int64, two tokens a sequence or more", file=str(path), tensor=TOKENS)
    with safe_open(path, "pt") as file:
        ids: Tensor = file.get_tensor(TOKENS)
    if int(ids.min()) < 0:
        message = f"holds the negative token id {int(ids.min())}"
        raise fail("QP130", message, "token ids count from 0", file=str(path), tensor=TOKENS)
    return ids


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what it adds to a text."""

    tokenizer: Any
    specials: Specials
    model: str  # where the tokenizer is, for messages

    @staticmethod
    def of(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Encoder:
        """That of the model in a directory. Between documents stand the tokens that the tokenizer puts around a text; where
        it puts none, an empty line. Raises QP222."""
        tokenizer = open_tokenizer(model, trust_remote_code)
        bare = tokenizer(PROBE, add_special_tokens=False).input_ids
        full = list(tokenizer(PROBE).input_ids)
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        if at is None:  # what is added changes the text itself: left out
            at, full = 0, bare
        prefix, suffix = tuple(full[:at]), tuple(full[at + len(bare) :])
        separator = (*suffix, *prefix) or tuple(tokenizer("\n\n", add_special_tokens=False).input_ids)
        return Encoder(tokenizer, Specials(prefix, suffix, separator), str(model))

    def encode(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        """The ids of each document, without the tokens put around it. Raises QP231 (no chat template, or it fails)."""
        for start in range(0, len(documents), BATCH):
            batch = documents[start : start + BATCH]
            texts = iter(self._texts([d for d in batch if isinstance(d, str)]))
            for document in batch:
                yield next(texts) if isinstance(document, str) else self._chat(document)

    def _texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        found: list[list[int]] = self.tokenizer(texts, verbose=False, **options).input_ids
        return found

    def _chat(self, chat: Chat) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            advice = "give rows with text, or a model with a chat template"
            raise fail("QP231", "the tokenizer has no chat template", advice, file=self.model)
        try:
            ids = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:  # templates raise whatever they like
            reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
            roles = printable(", ".join(str(turn.get("role")) for turn in chat), 80)
            message = f"the chat template refuses a chat of {roles}: {reason}"
            raise fail("QP231", message, "leave out such rows", file=self.model) from error
        return self.specials.bare(ids)
