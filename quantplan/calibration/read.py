"""From calibration settings to token ids: read, tokenize, pack, choose, mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.calibration.documents import Document
from quantplan.calibration.pack import Specials, counted, cut, join, padded, seeded_order
from quantplan.calibration.sources import enough, find_documents
from quantplan.calibration.tokens import Encoder, stored_ids
from quantplan.calibration.written import written
from quantplan.errors import Problem, QuantplanError, errors_in, fail
from quantplan.headers import read_config
from quantplan.models.modules import text_config
from quantplan.plan.calibration import KEY, TOKEN_IDS, check_fit, check_source, extension, length_for, positions
from quantplan.plan.schema import SELF, Calibration

if TYPE_CHECKING:
    from torch import Tensor

# characters tokenized for each token asked for. English has 4 to 5 a token, and a choice takes several times as many sequences
# to choose from; where tokens are longer than that, more is read
ENOUGH, CHOICE = 8, 32
MARGIN = 64  # tokens beside a cut through a text, which may be others than those of the whole text


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """What is run through a model to see its activations. `samples` is at most what the plan asks for; `notes` say so."""

    input_ids: Tensor  # int64 [samples, length]
    mask: Tensor  # bool [samples, length]: positions that count in statistics
    lengths: Tensor  # int64 [samples]: tokens of each sequence; what follows is padding
    hash: str  # sha256 of ids, mask and settings
    source: str  # a name, without its folder
    notes: tuple[Problem, ...] = ()

    @property
    def samples(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.input_ids.shape[1])

    @property
    def counted(self) -> int:
        """How many tokens count in statistics."""
        return int(self.mask.sum())


def read_calibration(
    settings: Calibration,
    model: Path,
    base: Path,
    on_step: Callable[[int, int], None] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> CalibrationSet:
    """The sequences that `settings` describe, for the checkpoint in the directory `model`. Paths in them are relative to
    `base`, the folder of the plan's file. For the source `self`, `on_step(tokens done, tokens in all)` is called as the model
    writes, on `device` (None: cuda where there is one). Code of the checkpoint's runs only with `trust_remote_code`.

    Raises QuantplanError with every problem of one stage: settings (QP105, QP132, QP301), settings and model (QP133, QP134),
    data (QP130, QP230), tokenizer (QP222, QP231), packages and network (QP405, QP406). Paths of problems lead into the plan.
    """
    config = read_config(model)
    problems = [*check_source(settings), *check_fit(settings, config)]
    if any(errors_in(problems)):
        raise QuantplanError(errors_in(problems))
    length = length_for(settings, config)
    if settings.source == SELF:
        begin = [token for key in ("bos_token_id", "eos_token_id") for token in _entries(config, key)]
        rows, name, specials = written(settings, model, length, begin, on_step, device, trust_remote_code), SELF, Specials()
    elif extension(settings.source) == TOKEN_IDS:
        rows, name, specials = _stored(settings, base, length, positions(config))
    else:
        rows, name, specials = _tokenized(settings, base, length, Encoder.of(model, trust_remote_code))
    return _finished(rows, settings, config, name, specials)


def batches(data: CalibrationSet, config: Any, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments for the forward of a model with `config` (an object or a dict), `size` sequences at a time:
    `input_ids` int64 `[size, length]`; `attention_mask` of the same shape only where there is padding; for encoder-decoders
    `decoder_input_ids`, the same text shifted right behind the decoder's start token."""
    get: Callable[[str], Any] = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    for ids, lengths in zip(data.input_ids.split(size), data.lengths.split(size), strict=True):
        made = {"input_ids": ids}
        if int(lengths.min()) < ids.shape[1]:
            made["attention_mask"] = _upto(lengths, ids.shape[1]).long()
        if get("is_encoder_decoder"):
            known = [t for key in ("decoder_start_token_id", "pad_token_id", "bos_token_id") for t in _ids(get(key))]
            shifted = ids.roll(1, 1)
            shifted[:, 0] = known[0] if known else 0
            made["decoder_input_ids"] = shifted
        yield made


def _upto(lengths: Tensor, columns: int) -> Tensor:
    import torch

    return torch.arange(columns) < lengths[:, None]


def _stored(settings: Calibration, base: Path, length: int, most: int | None) -> tuple[list[list[int]], str, Specials]:
    """The rows of a file of ids as they are; one long row is cut. `most`: the positions of the model."""
    path = base / Path(settings.source).expanduser()
    ids = stored_ids(path)
    if ids.ndim == 1:
        rows = cut(ids.tolist(), length, Specials())
        _check_enough(rows, length, path.name)
    else:
        if "sequence_length" in settings.model_fields_set and ids.shape[1] != length:
            message = f"holds sequences of {ids.shape[1]:,} tokens, sequence_length says {length:,}"
            raise fail("QP130", message, "leave sequence_length out: stored ids are taken as they are", file=str(path))
        if most is not None and ids.shape[1] > most:
            message = f"holds sequences of {ids.shape[1]:,} tokens, the model has {most:,} positions"
            raise fail("QP133", message, f"store sequences of {most} tokens or less, or one row, which is cut", file=str(path))
        rows = ids.tolist()
    return _chosen(rows, settings), path.name, Specials()


def _tokenized(settings: Calibration, base: Path, length: int, encoder: Encoder) -> tuple[list[list[int]], str, Specials]:
    """Text and chats, tokenized and packed."""
    documents, name = find_documents(settings, base)
    specials = encoder.specials
    if length <= len(specials.prefix) + len(specials.suffix):
        added = len(specials.prefix) + len(specials.suffix)
        message = f"sequences of {length} tokens have no room beside the {added} special tokens that the tokenizer adds"
        raise QuantplanError(Problem("QP105", message, "give a larger sequence_length", (KEY, "sequence_length")))
    rows = cut(_stream(documents, encoder, settings, length), length, specials)
    _check_enough(rows, length, name)
    return _chosen(rows, settings), name, specials


def _stream(documents: Sequence[Document], encoder: Encoder, settings: Calibration, length: int) -> list[int]:
    """Tokens of `documents`, as many as it takes or more: not of all, where there is far more text than is asked for."""
    wanted = settings.samples * length
    limit = wanted * (CHOICE if settings.shuffle else ENOUGH)
    while True:
        some, all_of_them = enough(documents, limit, settings.seed if settings.shuffle else None)
        stream = join(encoder.encode(some), encoder.specials)
        if all_of_them or len(stream) > wanted + MARGIN:
            return stream
        limit *= 8


def _check_enough(rows: Sequence[Sequence[int]], length: int, name: str) -> None:
    """Raises QP230 when the data do not fill one sequence."""
    found = len(rows[0]) if rows else 0
    if found < length:
        message = f"has {found:,} tokens, one sequence takes {length:,}"
        raise fail("QP230", message, "give a longer text, or a smaller sequence_length", file=name)


def _chosen(rows: list[list[int]], settings: Calibration) -> list[list[int]]:
    """`samples` of the sequences: the first ones, or those that the seed puts first. One that is not full comes last."""
    full = len(rows) - (len(rows[-1]) < len(rows[0]))
    order = [*seeded_order(full, settings.seed), *range(full, len(rows))] if settings.shuffle else range(len(rows))
    return [rows[i] for i in islice(order, settings.samples)]


def _finished(
    rows: list[list[int]], settings: Calibration, config: Mapping[str, Any], name: str, specials: Specials
) -> CalibrationSet:
    text = text_config(config)
    length = len(rows[0])
    padding = next((t for key in ("pad_token_id", "eos_token_id") for t in _entries(config, key)), 0)
    ids, lengths = padded(rows, length, padding)
    vocabulary, largest = text.get("vocab_size"), int(ids.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        message = f"has the token id {largest:,}, the model's vocabulary {vocabulary:,}"
        raise fail("QP232", message, "use ids that this model's tokenizer made", file=name)
    begins = {*specials.prefix, *_entries(config, "bos_token_id")}
    mask = counted(ids, lengths, settings.skip_tokens, begins)
    notes = []
    if len(rows) < settings.samples:
        short = int(lengths[-1])
        held = f"{len(rows):,} sequences of {length:,} tokens" + (f", the last with {short:,}" if short < length else "")
        text_of = f"{name} holds {held}; {settings.samples:,} are asked for"
        notes.append(Problem("QP233", text_of, "go on with these, or give more data", (KEY, "samples"), severity="note"))
    if not mask.any():
        raise fail("QP230", "no token counts: all are begin-of-sequence tokens", "set skip_tokens: 0", file=name)
    described = json.dumps({**settings.model_dump(mode="json"), "source": name, "sequence_length": length}, sort_keys=True)
    digest = hashlib.sha256(described.encode())
    for tensor in (ids, mask):
        digest.update(tensor.contiguous().numpy().tobytes())
    return CalibrationSet(ids, mask, lengths, digest.hexdigest(), name, tuple(notes))


def _entries(config: Mapping[str, Any], key: str) -> list[int]:
    """The token ids under a config's key, which holds one, a list or nothing; the language model's own part first."""
    return [t for part in (text_config(config), config) for t in _ids(part.get(key))]


def _ids(value: Any) -> list[int]:
    return [t for t in (value if isinstance(value, list) else [value]) if type(t) is int and t >= 0]
