"""Documents of token ids as sequences of one length, no token dropped; which sequences are taken; which positions count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True)
class Specials:
    """The tokens that a tokenizer puts before and after a text, and what goes between two documents."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()

    def bare(self, ids: Ids) -> list[int]:
        """`ids` without the prefix and suffix, where they have them."""
        start = len(self.prefix) if tuple(ids[: len(self.prefix)]) == self.prefix else 0
        end = len(ids) - len(self.suffix) if self.suffix and tuple(ids[-len(self.suffix) :]) == self.suffix else len(ids)
        return list(ids[start : max(start, end)])


def join(documents: Iterable[Ids], specials: Specials) -> list[int]:
    """One stream: the documents, a separator between each two."""
    stream: list[int] = []
    for number, ids in enumerate(documents):
        if number:
            stream += specials.separator
        stream += ids
    return stream


def cut(stream: Ids, length: int, specials: Specials) -> list[list[int]]:
    """The stream in sequences of `length` tokens, each with the prefix (once, where the stream has it there) and the suffix;
    the last may be shorter. Without them, the sequences are the stream. `length` has room for more than both."""
    assert length > len(specials.prefix) + len(specials.suffix)
    rows, at = [], 0
    while at < len(stream):
        begins = specials.prefix and tuple(stream[at : at + len(specials.prefix)]) == specials.prefix
        head = () if begins else specials.prefix
        body = stream[at : at + length - len(head) - len(specials.suffix)]
        rows.append([*head, *body, *specials.suffix])
        at += len(body)
    return rows


def seeded_order(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count` in an order that `seed` decides: the same everywhere and for ever, whatever becomes of a
    library's generators. A shuffle by Fisher and Yates that works out only as much of the order as is asked for."""
    moved: dict[int, int] = {}
    for place in range(count):
        drawn = int.from_bytes(hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=16).digest(), "big")
        other = place + drawn % (count - place)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)


def padded(rows: Sequence[Ids], length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Rows as int64 `[rows, length]`, filled up on the right with `padding`, and their lengths, int64 `[rows]`."""
    import torch

    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows], dtype=torch.int64)
    return ids, lengths


def counted(ids: Tensor, lengths: Tensor, skip: int, begins: Iterable[int]) -> Tensor:
    """Which positions of `ids` `[rows, length]` count in statistics, bool `[rows, length]`: not padding, not the first
    `skip` of a sequence, and unless `skip` is 0 none of the tokens `begins`.

    Models park attention on the first token and on begin-of-sequence tokens; activations there can be hundreds of times
    larger than anywhere else, and second moments over them would be about nothing else.
    """
    import torch

    positions = torch.arange(ids.shape[1])
    mask = positions < lengths[:, None]
    if skip:
        mask &= (positions >= skip) & ~torch.isin(ids, torch.tensor(sorted(begins), dtype=torch.int64))
    return mask
